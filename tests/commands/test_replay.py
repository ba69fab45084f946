"""A saved batch is run again as the training ran it."""

import pytest
import torch
from support import DEMO, SMALL_DETECTOR
from torch import nn

from brs_detr import cli
from brs_detr.commands import replay
from brs_detr.config import load_config, to_dict
from brs_detr.engine.distributed import seed_step
from brs_detr.engine.nonfinite import save_batch
from brs_detr.ops.images import ImageBatch
from brs_detr.run.setup import build_detector

SMALL = [*SMALL_DETECTOR, "train.freeze=[backbone]"]


def batch(image):
    images = ImageBatch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [(64, 64)], [(64, 64)])
    return images, [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.zeros(1).long(), "image_id": image}]


@pytest.fixture
def saved(tmp_path):
    """Two accumulated batches."""
    config, path = load_config(DEMO, SMALL), tmp_path / "nonfinite-7.pt"
    facts = {"config": to_dict(config), "classes": ["ring"]}
    model = build_detector(config, 1)
    save_batch(path, seed=3, step=7, process=1, batches=[batch(21), batch(22)], model=model, facts=facts)
    return path


def test_it_draws_the_steps_numbers_freezes_what_was_frozen_and_names_the_batch(saved, monkeypatch, capsys):
    seen = []

    def look(model, images, targets, precision):
        frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
        left = any(p.grad is not None and p.grad.any() for p in model.parameters())
        seen.append((torch.rand(3).tolist(), frozen, model.training, left))
        next(p for p in model.parameters() if p.requires_grad).sum().backward()
        return ["something is not finite"] if targets[0]["image_id"] == 22 else []

    monkeypatch.setattr(replay, "replay_batch", look)
    assert cli.main(["replay", str(saved), "--device", "cpu"]) == 0
    seed_step(3, 7, 1)
    assert [draws for draws, *_ in seen] == [torch.rand(3).tolist(), torch.rand(3).tolist()]
    assert all(frozen >= {"backbone"} and training and not left for _, frozen, training, left in seen)
    assert "batch 2: something is not finite" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["nonsense", "meta:0:1", "cuda:99"])
def test_a_device_that_is_not_there_is_one_sentence(saved, capsys, device):
    assert cli.main(["replay", str(saved), "--device", device]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: device={device}: ") and "write cpu" in error and "\n" not in error


class Root(torch.autograd.Function):
    """A square root whose derivative at 0 is infinite."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / (2 * ctx.saved_tensors[0].sqrt())


class Toy(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.first.weight, weight)

    def forward(self, images, targets):
        return {"loss": Root.apply(self.first(targets[0]["boxes"][:, :1])).sum(), "other": self.second.weight.sum()}


def test_the_first_module_the_terms_and_the_gradients_are_named():
    assert replay.replay_batch(Toy(1.0), *batch(1), "no") == []
    assert replay.replay_batch(Toy(0.0), *batch(1), "no") == [
        "gradients that are not finite: 1 parameters, the first is first.weight"
    ]
    faults = replay.replay_batch(Toy(float("inf")), *batch(1), "no")
    assert faults[0] == "the first module whose output is not finite: first (1 in total)"
    assert faults[1] == "loss terms that are not finite: loss"


def test_a_file_with_other_contents_is_refused_in_a_sentence(saved, tmp_path, capsys):
    content = torch.load(saved, weights_only=True)
    path = tmp_path / "nonfinite-8.pt"
    stored = content["batches"][0]
    odd = [{"facts": []}, {"facts": {"config": {}}}, {"facts": content["facts"] | {"classes": 3}}, {"weights": [1]}]
    odd += [{"seed": "x"}, {"batches": [1]}, {"batches": [{"pixels": 1}]}, {"batches": [stored | {"targets": [1]}]}]
    odd += [{"batches": [stored | {"sizes": []}]}, {"facts": content["facts"] | {"config": {"model": {"dim": []}}}}]
    for change in odd:
        torch.save({**content, **change}, path)
        assert cli.main(["replay", str(path), "--device", "cpu"]) == 2, change
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: {path}: ") and "\n" not in error, error
