"""Training batches by (epoch, position), from a DataLoader whose batch sampler can be placed there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from torch.utils.data import DataLoader

from brs_detr.engine.guard import Batch


class EpochBatches:
    """The trainer's view of a training loader.

    Args:
        loader: its `batch_sampler` has `set_epoch(epoch, start_batch)`.
        limit: batches of an epoch; None for all of them.
    """

    def __init__(self, loader: DataLoader, limit: int | None = None):
        self.loader, self.limit = loader, limit

    def __len__(self) -> int:
        whole = len(self.loader.batch_sampler)
        return whole if self.limit is None else min(whole, self.limit)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from position `start`; earlier ones are neither read nor augmented."""
        self.loader.batch_sampler.set_epoch(epoch, start)
        return islice(iter(self.loader), len(self) - start)
