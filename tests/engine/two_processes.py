"""Checks that need two processes; started by test_distributed.py through torchrun, prints a line for each that holds.

torchrun --nproc-per-node 2 two_processes.py FOLDER
"""

import importlib.util
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from brs_detr.config import apply_overrides, load_config
from brs_detr.engine.evaluate import predict
from brs_detr.engine.guard import NonFiniteError
from brs_detr.engine.logging import read_metrics
from brs_detr.engine.state import latest_state, read_facts
from brs_detr.models.build import build_model
from brs_detr.ops.images import ImageBatch

HERE = Path(__file__).resolve()
SPEC = importlib.util.spec_from_file_location("toy_run", HERE.with_name("toy_run.py"))
toy = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(toy)

TINY = [
    "model.dim=64",
    "model.heads=2",
    "model.ffn_dim=32",
    "model.queries=10",
    "model.max_aux_queries=10",
    "model.encoder_layers=1",
    "model.decoder_layers=2",
    "model.roi.fc_dim=32",
    "model.rpn.proposals=20",
]


class Quadratic(nn.Module):
    """Without randomness and with a loss that is a mean over pictures."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, images, targets):
        truth = torch.stack([target["boxes"].mean(0) for target in targets])
        return {"decoder.0.l1": (self.linear(images.pixels.float().mean((2, 3)) / 255) - truth).square().mean()}


def gradient_of(model, batches):
    model.zero_grad()
    for images, targets in batches:
        (sum(model(images, targets).values()) / len(batches)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def check_gradient(accelerator):
    """DDP's gradient is that of all pictures at once."""
    torch.manual_seed(0)
    single = Quadratic()
    everything = [next(iter(toy.ToyBatches(1, rank=rank, world=2).epoch(0))) for rank in (0, 1)]
    expected = gradient_of(single, everything)
    torch.manual_seed(0)
    shared = accelerator.prepare_model(Quadratic())
    torch.testing.assert_close(gradient_of(shared, [everything[accelerator.process_index]]), expected)


def check_gathering(accelerator):
    """Each picture once, in order, in both processes, though one process has more and one picture comes twice."""
    ids = [[5, 1, 9], [2, 9]][accelerator.process_index]

    class Echo(nn.Module):
        def forward(self, images, targets):
            return [
                {
                    "boxes": p.float().mean((1, 2))[[0, 1, 2, 0]][None],
                    "scores": torch.ones(1),
                    "labels": torch.zeros(1).long(),
                }
                for p in images.pixels
            ]

    batches = [
        (ImageBatch(torch.full((1, 3, 4, 4), i, dtype=torch.uint8), [(4, 4)], [(4, 4)]), [{"image_id": i}]) for i in ids
    ]
    found = predict(Echo(), batches, accelerator)
    assert [f["image_id"] for f in found] == [1, 2, 5, 9]
    assert all(np.all(f["boxes"] == f["image_id"]) for f in found)


def check_empty_rank(accelerator):
    """A process whose pictures hold nothing steps with the others: no hang, no parameter without a gradient."""
    config = apply_overrides(load_config(HERE.parents[2] / "configs" / "demo.yaml"), TINY)
    torch.manual_seed(0)
    model = accelerator.prepare_model(build_model(config.model, 3))
    full = accelerator.process_index == 0
    boxes = torch.tensor([[8.0, 8, 40, 40], [20, 10, 60, 50]]) if full else torch.zeros(0, 4)
    targets = [{"boxes": boxes, "labels": torch.arange(len(boxes)), "image_id": 0}]
    images = ImageBatch(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), [(64, 64)], [(64, 64)])
    for _ in range(2):
        model.zero_grad()
        loss = sum(model(images, targets).values())
        assert torch.isfinite(loss)
        loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, missing
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).sum()
    assert torch.isfinite(norm)
    torch.testing.assert_close(accelerator.reduce(norm.clone(), "mean"), norm)


def check_resume(accelerator, folder):
    """Stopped in the middle of an epoch and resumed, two processes end where they would have ended."""
    names = ("whole", "stopped")
    whole, _ = toy.build(folder / "whole", accelerator=accelerator, ema=0.9)
    whole.fit()
    reference = [p.detach().clone() for p in whole.model.parameters()]
    stopped, _ = toy.build(folder / "stopped", accelerator=accelerator, ema=0.9)
    stopped.batches.stop_at = (1, 0, stopped)  # between two reports
    assert stopped.fit() is False
    state, _ = latest_state(folder / "stopped" / "state")
    resumed, _ = toy.build(folder / "stopped", accelerator=accelerator, ema=0.9, resumed_at=read_facts(state))
    accelerator.load_state(str(state))
    assert 0 < resumed.position.step < whole.position.step
    resumed.fit()
    for ours, theirs in zip(resumed.model.parameters(), reference):
        assert torch.equal(ours, theirs)
    if accelerator.is_main_process:
        logged = [[line.get("terms") for line in read_metrics(folder / name / "metrics.jsonl")] for name in names]
        assert len(logged[0]) == len(logged[1])
        for ours, theirs in zip(*logged):
            assert ours is theirs is None or ours == pytest.approx(theirs, rel=1e-6)


def check_buffers(accelerator, folder):
    """Batch statistics differ between processes; validated, in each process, are those that are saved."""
    trainer, _ = toy.build(folder / "buffers", accelerator=accelerator, ema=0.9)
    for module in (accelerator.unwrap_model(trainer.model), trainer.ema.module):
        module.register_buffer("running_mean", torch.tensor([float(accelerator.process_index)]))
    seen = []
    trainer.validate = lambda module: seen.append(module.running_mean.clone()) or {"AP": 0.0}
    trainer._validate()
    assert seen[0].item() == 0.0


def check_non_finite(accelerator, folder):
    """One process meets a NaN: both stop, at the same step, and name its term, pictures and batch."""
    poison = (0, 3) if accelerator.process_index == 1 else None
    trainer, _ = toy.build(folder / "poison", accelerator=accelerator, poison=poison)
    try:
        trainer.fit()
    except NonFiniteError as error:
        assert str(error).startswith("step 1: process 1: loss term")
        (_, targets), *_ = islice(toy.ToyBatches(7, rank=1, world=2).epoch(0), 3, 4)
        ids = ", ".join(str(target["image_id"]) for target in targets)
        assert "decoder.0.l1" in str(error) and f"(images {ids})" in str(error) and "1-process1.pt" in str(error)
        assert all((folder / "poison" / f"nonfinite-1-process{process}.pt").exists() for process in (0, 1))
    else:
        raise AssertionError("nobody stopped")


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    checks = {
        "gradient": lambda: check_gradient(accelerator),
        "gathering": lambda: check_gathering(accelerator),
        "empty rank": lambda: check_empty_rank(accelerator),
        "resume": lambda: check_resume(accelerator, folder),
        "buffers": lambda: check_buffers(accelerator, folder),
        "non-finite": lambda: check_non_finite(accelerator, folder),
    }
    for name, check in checks.items():
        check()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            print(f"holds: {name}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
