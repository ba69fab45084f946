"""Which pictures make which batch, in which process: decided from (seed, epoch) alone, alike in every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


class TrainBatches:
    """Shuffled batches of pictures that are all wide (w > h) or all not, shared out among processes.

    Every picture comes once per epoch. All batches are full and all processes get equally many: what is missing at the
    end is filled with pictures from the beginning of the epoch's order. At most one batch mixes both orientations.

    Args:
        sizes: (I, 2) (h, w) of the pictures.
        batch_size: pictures in a batch of one process.
        seed: of the shuffling.
        rank, world_size: this process and their number.

    Yields lists of (image number, epoch). The state is the pair (epoch, start_batch), see `set_epoch`.
    """

    def __init__(self, sizes: np.ndarray, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if len(sizes) == 0 or batch_size < 1:
            raise ValueError("a training loader needs at least one picture and a batch size of at least 1.")
        self._wide = np.asarray(sizes)[:, 1] > np.asarray(sizes)[:, 0]
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.epoch = self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to iterate, and how many of this process's batches to leave out at its beginning."""
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Batches of one process in a whole epoch."""
        return -(-len(self._wide) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self._all_batches()[self.rank :: self.world_size]
        for batch in batches[self.start_batch :]:
            yield [(int(index), self.epoch) for index in batch]

    def _all_batches(self) -> np.ndarray:
        """(batches of all processes, batch_size) image numbers."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self._wide))
        full, rest = [], []
        for group in (order[self._wide[order]], order[~self._wide[order]]):
            cut = len(group) // self.batch_size * self.batch_size
            full.append(group[:cut].reshape(-1, self.batch_size))
            rest.append(group[cut:])
        wanted = len(self) * self.world_size - sum(map(len, full))
        last = np.concatenate(rest)
        missing = wanted * self.batch_size - len(last)
        last = np.concatenate([last, np.resize(order, missing)]).reshape(-1, self.batch_size)
        batches = np.concatenate([*full, last])
        return batches[random.permutation(len(batches))]


class EvalBatches:
    """Batches that show each picture exactly once over all processes, in a fixed order.

    Args:
        count: number of pictures.
        batch_size: largest number of pictures in a batch.
        rank, world_size: this process and their number; they may get one batch more or fewer.
        shapes: (h, w) of each picture as the model sees it; if given, a batch holds pictures of one shape only, so that
            no picture is padded and what else is in its batch cannot change what is found in it.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shapes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        groups: dict[tuple[int, int] | None, list[int]] = {}
        for index in range(count):
            groups.setdefault(shapes[index] if shapes is not None else None, []).append(index)
        batches = [
            group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
        ]
        self._batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)
