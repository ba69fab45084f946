"""From the recipe's total batch to what each process holds at once.

The recipe states the pictures of one optimiser step over all processes; the share of a process and the number of
accumulated batches follow from the launch, so the learning rate never has to.
"""

from __future__ import annotations

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
            f"{self.per_device} pictures x {self.accumulate} accumulated"
        )


def plan_batches(total: int, per_device: int | None, processes: int) -> BatchPlan:
    """Split a total batch over processes and accumulated batches.

    Args:
        total: pictures an optimiser step.
        per_device: most pictures a process holds at once; None: its whole share.
        processes: of the launch.

    Raises:
        ValueError: the total cannot be split evenly; says which numbers would do.
    """
    if total % processes:
        raise ValueError(
            f"train.total_batch_size={total} cannot be shared by {processes} processes; "
            f"launch a divisor of {total} processes, or set train.total_batch_size to a multiple of {processes}"
        )
    share = total // processes
    per_device = per_device or share
    if share % per_device:
        fitting = [n for n in range(1, share + 1) if share % n == 0]
        raise ValueError(
            f"train.per_device_batch_size={per_device} does not divide the {share} pictures of each of {processes} "
            f"processes; choose one of {', '.join(map(str, fitting))}"
        )
    return BatchPlan(total, processes, per_device, share // per_device)
