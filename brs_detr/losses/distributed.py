"""Rankings over one process or over all processes of a distributed run."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

SCOPES = ("process", "global")
_alone = False


def world_size() -> int:
    """Return the number of processes; 1 without torch.distributed, and inside `without_other_processes`."""
    return dist.get_world_size() if not _alone and dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def without_other_processes() -> Iterator[None]:
    """Compute losses inside as if there were one process: for trials that may fail in some processes only."""
    global _alone
    former, _alone = _alone, True
    try:
        yield
    finally:
        _alone = former


def process_sum(value: Tensor) -> Tensor:
    """Sum a tensor over all processes, without gradient."""
    value = value.detach()
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def process_mean(value: Tensor) -> Tensor:
    """Average a normalizer over all processes: at least 1, float32, without gradient."""
    # The mean and not the sum: DDP averages the gradients, so loss / mean is, over all processes, sum / sum.
    return (process_sum(value.float()) / world_size()).clamp(min=1)


def scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """Convert a number, or a tensor of one element, to () float32 on a device, without gradient."""
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
        """Average over all processes: at least 1, () float32 on the device of the exchange."""
        if self._mean is None:
            self._mean = process_mean(scalar(self.count, device))
        return self._mean


def sum_over(values: Tensor, scope: str) -> Tensor:
    """Sum values along their last dimension, of this process or of all; the gradient is that of this process's."""
    own = values.sum(-1)
    if scope == "process" or world_size() == 1:
        return own
    return own + (process_sum(own) - own.detach())


def scale_for_ddp(term: Tensor, scope: str) -> Tensor:
    """Multiply the gradient of a term by the number of processes, not its value: DDP divides gradients by it."""
    if scope == "process" or world_size() == 1:
        return term
    return term + (world_size() - 1) * (term - term.detach())


class Group:
    """The processes that rank together, and the number of positives in each.

    Args:
        scope: "process", or "global" for all processes; these exchange their numbers of positives, once for all
            rankings, for which the host waits.
        positives: number of positives of this process in each ranking.
        undefined: (L,) bool on the device where tensors are exchanged, True where this process's part of the loss is
            undefined.

    Attributes:
        counts: number of positives of each process.
        rank: index of this process in `counts`.
        nan_or_one: (L,) float, NaN where the loss of any process is undefined, else 1; every value and every gradient
            is multiplied by it, so that no process steps on a loss that is undefined in another.

    Raises:
        ValueError: for an unknown scope.
    """

    def __init__(self, scope: str, positives: int, undefined: Tensor) -> None:
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
        self.counts = [positives]
        self.rank = 0
        if scope == "global" and world_size() > 1:
            # Every process's count and each ranking's number of undefined parts in one all-reduce.
            counts = torch.zeros(world_size() + len(undefined), dtype=torch.int64, device=undefined.device)
            counts[dist.get_rank()] = positives
            counts[world_size() :] = undefined
            counts = process_sum(counts)
            undefined = counts[world_size() :] > 0
            self.counts = counts[: world_size()].tolist()
            self.rank = dist.get_rank()
        self.nan_or_one = torch.where(undefined, torch.nan, 1.0)

    @property
    def positives(self) -> int:
        """Return the number of positives of each ranking in the group."""
        return sum(self.counts)

    def total(self, value: Tensor) -> Tensor:
        """Sum a tensor over the group."""
        return value if len(self.counts) == 1 else process_sum(value)

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate the values (L, P) of each process's positives in the order of the processes."""
        if len(self.counts) == 1:
            return values
        # all_gather needs equal shapes: padded to the largest count, and cut again.
        padded = values.new_zeros(len(values), max(self.counts))
        padded[:, : values.shape[1]] = values
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:, :count] for part, count in zip(parts, self.counts)], 1)

    def local_slice(self, values: Tensor) -> Tensor:
        """Return this process's part (L, P) of gathered values."""
        return values.narrow(1, sum(self.counts[: self.rank]), self.counts[self.rank])
