"""Who takes part in one ranking: this process alone, or all processes of a distributed run."""

import torch
import torch.distributed as dist
from torch import Tensor

SCOPES = ("process", "global")


def world_size() -> int:
    """Number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_sum(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes, without gradient."""
    value = value.detach()
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def process_mean(value: Tensor) -> Tensor:
    """Mean of a normalizer over all processes, at least 1, in float32 and without gradient."""
    return (process_sum(value.float()) / world_size()).clamp(min=1)


def scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """A number, or a tensor of one element, as () float32 on a device, without gradient."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float32).reshape(())
    return torch.full((), float(value), device=device)


class SharedCount:
    """A number of positives, averaged over all processes when it is first asked for, and then kept.

    Several prediction sets with as many positives can share one: processes then exchange a single number for all of
    them, and none where no loss asks.

    Args:
        count: number of positives of this process.
    """

    def __init__(self, count: Tensor | float) -> None:
        self.count = count
        self._mean: Tensor | None = None

    def mean(self, device: torch.device) -> Tensor:
        """Mean over all processes, at least 1: () float32 on the device of the exchange."""
        if self._mean is None:
            self._mean = process_mean(scalar(self.count, device))
        return self._mean


def sum_over(values: Tensor, scope: str) -> Tensor:
    """Sum of all values, here or of all processes; the gradient is that of this process's values."""
    own = values.sum()
    if scope == "process" or world_size() == 1:
        return own
    return own + (process_sum(own) - own.detach())


def scale_for_ddp(term: Tensor, scope: str) -> Tensor:
    """The same value with the gradient times the number of processes, for data-parallel training to divide by it."""
    if scope == "process" or world_size() == 1:
        return term
    return term + (world_size() - 1) * (term - term.detach())


class Group:
    """The processes that rank together, and how many positives each has.

    Args:
        scope: "process", or "global" for all processes; these tell each other their numbers of positives, for which
            the host waits.
        positives: number of positives here.
        undefined: () bool on the device where tensors are exchanged: is this process's part of the loss undefined?

    Raises:
        ValueError: for an unknown scope.
    """

    def __init__(self, scope: str, positives: int, undefined: Tensor):
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
        self.counts = [positives]
        self.own = 0
        if scope == "global" and world_size() > 1:
            counts = torch.zeros(world_size() + 1, dtype=torch.int64, device=undefined.device)
            counts[dist.get_rank()] = positives
            counts[-1] = undefined
            counts = process_sum(counts)
            undefined = counts[-1] > 0
            self.counts = counts[:-1].tolist()
            self.own = dist.get_rank()
        # What every value and gradient is multiplied with: NaN for all where the loss of one is undefined, else 1.
        self.sound = torch.where(undefined, torch.nan, 1.0)

    @property
    def positives(self) -> int:
        """Number of positives of all processes together."""
        return sum(self.counts)

    def total(self, value: Tensor) -> Tensor:
        """Sum over the group."""
        return value if len(self.counts) == 1 else process_sum(value)

    def gather(self, values: Tensor) -> Tensor:
        """Values of this process's positives (P,) to those of all positives of the group, process by process."""
        if len(self.counts) == 1:
            return values
        padded = values.new_zeros(max(self.counts))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts)])

    def local_slice(self, values: Tensor) -> Tensor:
        """The part of gathered values that belongs to this process, (P,)."""
        start = sum(self.counts[: self.own])
        return values[start : start + self.counts[self.own]]
