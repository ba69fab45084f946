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
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader.batch_sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from position `start`, which may lie past its end; earlier ones are not even read."""
        self.loader.batch_sampler.set_epoch(epoch, start)
        # accumulation that does not divide the epoch counts its last step as a full one, so `start` may be too large
        return islice(iter(self.loader), max(0, len(self) - start))
