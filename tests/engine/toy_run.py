"""A complete run of the trainer with a toy detector, for tests that kill it.

python toy_run.py FOLDER [--resume] [--epochs 3] [--accumulate 2] [--save-every 3] [--ema 0.9] [--pause 0.0]
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn

from brs_detr.engine.batch_plan import TrainingLength
from brs_detr.engine.checkpoint import Weights, save_weights
from brs_detr.engine.config import OptimConfig, TrainConfig
from brs_detr.engine.logging import RunLog
from brs_detr.engine.optim import Schedule, build_optimizer
from brs_detr.engine.state import latest_state, read_metadata
from brs_detr.engine.trainer import Trainer
from brs_detr.ops.images import ImageBatch
from brs_detr.train import fit


class ToyDetector(nn.Module):
    """Two linear maps with a random draw in between, obeying the detector convention."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, images, targets):
        features = torch.relu(self.backbone(images.pixels.float().mean((2, 3)) / 255))
        boxes = self.head(features * torch.rand_like(features))
        if not self.training:
            return [
                {"boxes": b[None], "scores": b.sigmoid().mean()[None], "labels": torch.zeros(1).long()} for b in boxes
            ]
        truth = torch.stack([target["boxes"].mean(0) for target in targets])
        return {"decoder.0.l1": (boxes - truth).abs().mean(), "decoder.0.giou": (boxes - truth).square().mean()}


class Normalized(nn.Module):
    """Batch normalization of what an image and its targets say: a NaN in a box reaches the running statistics."""

    def __init__(self, aside=False):
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.aside = aside  # the statistics are bad although no loss term is

    def forward(self, images, targets):
        features = self.linear(images.pixels.float().mean((2, 3)) / 255)
        truth = torch.stack([target["boxes"].mean(0) for target in targets])
        if self.aside:
            self.norm(features.detach() * (1 + truth.sum() * 0))
            return {"decoder.0.l1": self.head(features).square().mean()}
        features = self.norm(features * (1 + truth.sum() * 0))
        return {"decoder.0.l1": (self.head(features) - truth).square().mean()}


class ToyTrainer(Trainer):
    """A trainer with the loop of `brs_detr/train.py` at hand."""

    def fit(self):
        return fit(self)


class ToyBatches:
    """Batches that are a function of (epoch, position)."""

    def __init__(self, count, batch_size=2, rank=0, world=1, poison=None, pause=0.0):
        self.count, self.batch_size, self.rank, self.world = count, batch_size, rank, world
        self.poison, self.pause, self.stop_at = poison, pause, None

    def __len__(self):
        return self.count

    def epoch(self, epoch, start=0):
        for index in range(start, self.count):
            time.sleep(self.pause)
            if self.stop_at is not None and (epoch, index) == self.stop_at[:2] and self.rank == 1:
                self.stop_at[2].asked_to_stop = True
            seed = 10_000 * epoch + index * self.world + self.rank
            generator = torch.Generator().manual_seed(seed)
            pixels = torch.randint(0, 256, (self.batch_size, 3, 4, 4), dtype=torch.uint8, generator=generator)
            ids = [seed * self.batch_size + row for row in range(self.batch_size)]
            targets = [
                {"boxes": torch.rand(2, 4, generator=generator), "labels": torch.zeros(2).long(), "image_id": i}
                for i in ids
            ]
            if (epoch, index) == self.poison:
                targets[0]["boxes"][0, 0] = float("nan")
            yield ImageBatch(pixels, [(4, 4)] * self.batch_size, [(4, 4)] * self.batch_size), targets


def build(
    folder,
    *,
    epochs=3,
    accumulate=2,
    count=7,
    save_every=3,
    ema=None,
    on_nonfinite="stop",
    max_skipped=20,
    model=None,
    resumed_at=None,
    accelerator=None,
    gradient_ratio=False,
    optimizer="adamw",
    **more,
):
    """(trainer, accelerator) of a toy run; further keywords go to ToyBatches."""
    accelerator = accelerator or Accelerator(cpu=True)
    accelerator._models, accelerator._optimizers = [], []  # of a run before
    torch.manual_seed(0)
    model = model or ToyDetector()
    average = None if ema is None else ModelEmaV3(model, decay=ema, use_warmup=True)
    config = OptimConfig(name=optimizer, lr=1e-2, weight_decay=1e-2, fused=False)
    model, optimizer = accelerator.prepare(model, build_optimizer(config, model))
    batches = ToyBatches(count, rank=accelerator.process_index, world=accelerator.num_processes, **more)

    def validate(module):
        return {"AP": sum(p.detach().sum().item() for p in module.parameters())} if accelerator.is_main_process else {}

    log = RunLog(folder, accelerator)
    log.begin(resumed_at)
    steps = epochs * -(-count // accumulate)
    trainer = ToyTrainer(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        schedule=Schedule("cosine", steps, warmup_steps=3),
        batches=batches,
        folder=folder,
        log=log,
        config=TrainConfig(
            log_every=2,
            save_every=save_every,
            on_nonfinite=on_nonfinite,
            max_skipped=max_skipped,
            gradient_ratio=gradient_ratio,
        ),
        length=TrainingLength(epochs, -(-count // accumulate), 1),
        accumulate=accumulate,
        seed=5,
        clip_norm=0.5,
        metadata={"who": "toy"},
        validate=validate,
        save=lambda name, tensors, facts: save_weights(folder / name, Weights(tensors, ["thing"], [7], {}, facts)),
        ema=average,
    )
    return trainer, accelerator


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--count", type=int, default=7)
    parser.add_argument("--ema", type=float)
    parser.add_argument("--pause", type=float, default=0.0)
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    folder, resume = options.pop("folder"), options.pop("resume")
    state, notes = latest_state(folder / "state") if resume else (None, [])
    print(*notes, sep="\n", flush=True)
    trainer, _ = build(folder, resumed_at=None if state is None else read_metadata(state), **options)
    if state is not None:
        trainer.resume(state)
    print("running", flush=True)
    return 0 if trainer.fit() else 75


if __name__ == "__main__":
    sys.exit(main())
