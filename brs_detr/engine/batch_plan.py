"""Batch size per process and length of the training, from a recipe, the launch and the dataset.

The recipe states the images of one optimizer step over all processes; the share of a process and the number of
accumulated batches follow from the launch, so that the learning rate need not be changed with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from brs_detr.engine.config import TrainConfig


@dataclass(frozen=True)
class BatchPlan:
    """Split of a total batch: total = processes x per_device x accumulate, in images."""

    total: int
    processes: int
    per_device: int
    accumulate: int

    def __str__(self) -> str:
        return (
            f"total batch {self.total} = {self.processes} process{'es' if self.processes > 1 else ''} x "
            f"{self.per_device} images x {self.accumulate} accumulated"
        )


def split_batch_size(total: int, per_device: int | None, processes: int) -> BatchPlan:
    """Split a total batch over processes and accumulated batches.

    Args:
        total: images per optimizer step.
        per_device: largest number of images that a process holds at once; None: its full share. If it does not divide
            the share, the next smaller number that does is taken.
        processes: of the launch.

    Raises:
        ValueError: the total cannot be split evenly; names numbers that would work.
    """
    if total % processes:
        raise ValueError(
            f"train.total_batch_size={total}: cannot be split evenly over {processes} processes. "
            f"Launch a divisor of {total} processes, or set train.total_batch_size to a multiple of {processes}."
        )
    share = total // processes
    # The largest divisor of the share: every accumulated batch is then equally large, as a mean over them needs.
    max_per_device = min(per_device or share, share)
    per_device = next(n for n in range(max_per_device, 0, -1) if share % n == 0)
    return BatchPlan(total, processes, per_device, share // per_device)


FEW_STEPS = 500  # a shorter training gets a warning: detectors usually need thousands of steps
VALIDATIONS = 20  # of a training whose recipe does not say how often to validate


@dataclass(frozen=True)
class TrainingLength:
    """Length of a training: full epochs, optimizer steps per epoch, epochs between validations."""

    epochs: int
    steps_per_epoch: int
    eval_every: int

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps of all epochs."""
        return self.epochs * self.steps_per_epoch

    def __str__(self) -> str:
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs:,} epochs"
        every = "every epoch" if self.eval_every == 1 else f"every {self.eval_every} epochs"
        return f"{epochs} of {self.steps_per_epoch:,} optimizer steps, {self.steps:,} in all; validation {every}"


def plan_length(batches: int, plan: BatchPlan, config: TrainConfig) -> TrainingLength:
    """Determine the number of epochs, steps and validations for a dataset.

    Args:
        batches: of one epoch in one process.
        plan: gives the number of batches per optimizer step.
        config: `epochs` is ignored where `steps`, the minimum number of optimizer steps, is given.
    """
    # Rounded up: the last step of an epoch may accumulate fewer batches.
    steps_per_epoch = math.ceil(batches / plan.accumulate)
    epochs = config.epochs if config.steps is None else math.ceil(config.steps / steps_per_epoch)
    return TrainingLength(epochs, steps_per_epoch, config.eval_every or max(1, epochs // VALIDATIONS))
