"""From a recipe's numbers to those of a launch and a dataset: what each process holds at once, and how long it trains.

The recipe states the images of one optimizer step over all processes; the share of a process and the number of
accumulated batches follow from the launch, so the learning rate never has to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """total = processes x per_device x accumulate."""

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
        total: images an optimizer step.
        per_device: most images a process holds at once; None: its whole share. Where it does not divide the share,
            the next smaller number that does is taken.
        processes: of the launch.

    Raises:
        ValueError: the total cannot be shared evenly; says which numbers would do.
    """
    if total % processes:
        raise ValueError(
            f"train.total_batch_size={total} cannot be shared by {processes} processes; "
            f"launch a divisor of {total} processes, or set train.total_batch_size to a multiple of {processes}"
        )
    share = total // processes
    max_per_device = min(per_device or share, share)
    per_device = next(n for n in range(max_per_device, 0, -1) if share % n == 0)
    return BatchPlan(total, processes, per_device, share // per_device)


FEW_STEPS = 500
VALIDATIONS = 20


@dataclass(frozen=True)
class TrainingLength:
    """How long a training is: whole epochs, each of so many optimizer steps, validated every so many epochs."""

    epochs: int
    steps_per_epoch: int
    eval_every: int

    @property
    def steps(self) -> int:
        """Optimizer steps altogether."""
        return self.epochs * self.steps_per_epoch

    def __str__(self) -> str:
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs:,} epochs"
        every = "every epoch" if self.eval_every == 1 else f"every {self.eval_every} epochs"
        return f"{epochs} of {self.steps_per_epoch:,} optimizer steps, {self.steps:,} in all; validation {every}"


def plan_length(
    batches: int, plan: BatchPlan, *, epochs: int, steps: int | None, eval_every: int | None
) -> TrainingLength:
    """Settle the number of epochs for a dataset.

    Args:
        batches: of one epoch in one process.
        plan: tells how many of them make an optimizer step.
        epochs: the recipe's; ignored where it asks for steps.
        steps: optimizer steps that the training takes at least; None: as many as the epochs have.
        eval_every: epochs between validations; None: about twenty validations altogether.
    """
    steps_per_epoch = math.ceil(batches / plan.accumulate)
    if steps is not None:
        epochs = math.ceil(steps / steps_per_epoch)
    return TrainingLength(epochs, steps_per_epoch, eval_every or max(1, epochs // VALIDATIONS))
