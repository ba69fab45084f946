"""The step that is tried before a training is a step of that training."""

import contextlib

import torch

from brs_detr.engine.diagnostics import filled_masks, largest_step


def test_gradients_are_exchanged_with_the_last_accumulated_batch_only(toy, tmp_path, monkeypatch):
    """As in training: sharded gradients are unsharded until then, which the reported memory has to show."""
    trainer, accelerator = toy.build(tmp_path)
    events = []

    @contextlib.contextmanager
    def no_sync(model):
        events.append("alone")
        yield

    backward = accelerator.backward
    monkeypatch.setattr(accelerator, "no_sync", no_sync)
    monkeypatch.setattr(accelerator, "backward", lambda loss: events.append("backward") or backward(loss))
    size = {"batch_size": 2, "accumulate": 3, "size": (8, 8), "num_objects": 4, "num_classes": 1}
    said = largest_step(trainer.model, trainer.optimizer, accelerator, **size)
    assert events == ["alone", "backward", "backward"] * 2
    assert f"{sum(p.numel() for p in trainer.model.parameters())} parameters, twice" in said
    assert all(torch.isfinite(p).all() and p.grad is None for p in trainer.model.parameters())


def test_the_bitmaps_of_a_dry_run_fill_their_boxes():
    boxes = torch.tensor([[1.0, 2, 4, 3], [0, 0, 6, 5], [-3, -3, 1, 1]])
    masks = filled_masks(boxes, (5, 6))
    assert masks.shape == (3, 5, 6) and masks.dtype == torch.uint8
    assert masks.sum((1, 2)).tolist() == [3, 30, 1]
    assert masks[0, 2, 1:4].all() and masks[2, 0, 0] == 1
