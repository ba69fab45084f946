"""Batches of padded images from a dataset, with workers.

Which images make which batch, in which process: decided from (seed, epoch) alone, alike in every process.

Training batches by (epoch, position), from a DataLoader whose batch sampler can be placed there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from brs_detr.data.coco import CocoDetection, Target
from brs_detr.data.shared_memory import move_to_shared_memory
from brs_detr.data.watched_loader import WatchedLoader
from brs_detr.ops.images import Batch, ImageBatch


def collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[ImageBatch, list[Target]]:
    """Pad images to one batch and keep the targets as a list.

    Args:
        samples: pairs of a (3, h, w) uint8 image and its target.

    Returns:
        the padded batch, and one target per image.
    """
    images, targets = zip(*samples, strict=True)
    counts = [len(target["labels"]) for target in targets]
    # views of two tensors: workers hand over one open file per storage, and many small ones exhaust the limit
    boxes = torch.cat([target["boxes"] for target in targets]).split(counts)
    labels = torch.cat([target["labels"] for target in targets]).split(counts)
    targets = [{**t, "boxes": b, "labels": l} for t, b, l in zip(targets, boxes, labels, strict=True)]
    return ImageBatch.from_list(images, [target["original_size"] for target in targets]), targets


def _collate_for_transfer(samples: Sequence[tuple[Tensor, Target]]) -> Any:
    """`collate`, and in a worker what may be sent to the training process."""
    batch = collate(samples)
    return batch if get_worker_info() is None else move_to_shared_memory(batch)


def build_train_loader(
    dataset: CocoDetection,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool | None = None,
    timeout: float | None = None,
) -> WatchedLoader:
    """Loader of `(ImageBatch, targets)` for training; `loader.batch_sampler.set_epoch(epoch, start_batch)` before use.

    Args:
        dataset: images and boxes.
        batch_size: images of one process in one step.
        workers: processes that read and augment; results do not depend on their number.
        seed: of the shuffling (the dataset has its own for the augmentation).
        rank, world_size: this process and their number.
        pin_memory: page-locked batches; by default when there is a GPU.
        timeout: seconds to wait for a batch; None waits for ever.
    """
    batches = TrainBatches(dataset.packed.image_sizes, batch_size, seed, rank, world_size)
    return _loader(dataset, batches, workers, pin_memory, timeout)


def build_eval_loader(
    dataset: CocoDetection,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    group_equal_shapes: bool = True,
    pin_memory: bool | None = None,
    timeout: float | None = None,
) -> WatchedLoader:
    """Loader of `(ImageBatch, targets)` for evaluation: every image exactly once over all processes.

    Args:
        dataset: images and boxes, opened with `train=False`.
        batch_size: largest number of images in a batch.
        workers, rank, world_size, pin_memory, timeout: as for `build_train_loader`.
        group_equal_shapes: put only images of the same resized shape in a batch, so that there is no padding.
    """
    shapes = None
    if group_equal_shapes:
        resize = getattr(dataset.transforms, "output_size", lambda height, width: (height, width))
        shapes = [resize(h, w) for h, w in dataset.packed.image_sizes.tolist()]
    batches = EvalBatches(len(dataset), batch_size, rank, world_size, shapes)
    return _loader(dataset, batches, workers, pin_memory, timeout)


def _loader(
    dataset: CocoDetection,
    batches: TrainBatches | EvalBatches,
    workers: int,
    pin_memory: bool | None,
    timeout: float | None,
) -> WatchedLoader:
    return WatchedLoader(
        dataset,
        workers=workers,
        timeout=timeout,
        batch_sampler=batches,
        collate_fn=_collate_for_transfer,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        generator=torch.Generator(),  # else each epoch draws from the global state, and a resumed run differs
    )


class TrainBatches:
    """Shuffled batches of images that are all wide (w > h) or all not, shared out among processes.

    Every image comes once per epoch. All batches are full and all processes get equally many: what is missing at the
    end is filled with images from the beginning of the epoch's order. At most one batch mixes both orientations.

    Args:
        sizes: (I, 2) (h, w) of the images.
        batch_size: images in a batch of one process.
        seed: of the shuffling.
        rank, world_size: this process and their number.

    Yields lists of (image number, epoch). The state is the pair (epoch, start_batch), see `set_epoch`.
    """

    def __init__(self, sizes: np.ndarray, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if len(sizes) == 0 or batch_size < 1:
            raise ValueError("a training loader needs at least one image and a batch size of at least 1.")
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
    """Batches that show each image exactly once over all processes, in a fixed order.

    Args:
        count: number of images.
        batch_size: largest number of images in a batch.
        rank, world_size: this process and their number; they may get one batch more or fewer.
        shapes: (h, w) of each image as the model sees it; if given, a batch holds images of one shape only, so that
            no image is padded and what else is in its batch cannot change what is found in it.
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
