"""Data loaders that return padded batches, and the batch samplers behind them.

Which images form which batch of which rank depends on (seed, epoch) alone, so that every rank computes the same
assignment without communication, and a run resumes in the middle of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from brs_detr.data.coco import CocoDetection, Target
from brs_detr.data.federated import repeat_factors
from brs_detr.data.shared_memory import move_to_shared_memory
from brs_detr.data.watched_loader import WatchedLoader
from brs_detr.ops.images import Batch, ImageBatch, ImageViews, Size


def collate(
    samples: Sequence[tuple[Tensor | list[Tensor], Target]],
) -> tuple[ImageBatch | ImageViews, list[Target]]:
    """Pad images to a batch and keep the targets as a list.

    Args:
        samples: pairs of a (3, h, w) uint8 image, or a list of several sizes of it, and its target.

    Returns:
        the padded batch, or one for each size, and one target per image.
    """
    images, targets = [image for image, _ in samples], [target for _, target in samples]
    counts = [len(target["labels"]) for target in targets]
    # views of one tensor of each kind: workers pass one file descriptor per storage, and many exhaust the limit
    boxes = torch.cat([target["boxes"] for target in targets]).split(counts)
    labels = torch.cat([target["labels"] for target in targets]).split(counts)
    targets = [{**t, "boxes": b, "labels": l} for t, b, l in zip(targets, boxes, labels, strict=True)]
    if "masks" in targets[0]:
        shapes = [target["masks"].shape for target in targets]
        masks = torch.cat([target["masks"].flatten() for target in targets]).split([s.numel() for s in shapes])
        targets = [{**t, "masks": m.view(s)} for t, m, s in zip(targets, masks, shapes, strict=True)]
    contents = [target["content_sizes"] for target in targets] if "content_sizes" in targets[0] else None
    return to_batch(images, [target["original_size"] for target in targets], contents), targets


def to_batch(
    images: Sequence[Tensor | list[Tensor]],
    original_sizes: Sequence[Size],
    content_sizes: Sequence[Sequence[Size]] | None = None,
) -> ImageBatch | ImageViews:
    """Pad images (3, h, w) to a batch; of lists of several sizes of each image, pad each size to a batch.

    Args:
        images: at least one; all lists have the same length.
        original_sizes: (height, width) of each image as stored on disk.
        content_sizes: of each image, in each of its sizes, (height, width) inside the canvas; None without a canvas.
    """
    views = [[image] if isinstance(image, Tensor) else image for image in images]
    scales = list(zip(*views, strict=True))
    contents = [None] * len(scales) if content_sizes is None else list(zip(*content_sizes, strict=True))
    batches = [ImageBatch.from_list(scale, original_sizes, own) for scale, own in zip(scales, contents, strict=True)]
    return batches[0] if len(batches) == 1 else ImageViews(batches)


def _collate_for_transfer(samples: Sequence[tuple[Tensor | list[Tensor], Target]]) -> Any:
    """Collate, and in a worker convert the batch to what can be sent to the training process."""
    batch = collate(samples)
    return batch if get_worker_info() is None else move_to_shared_memory(batch)


def build_train_loader(
    dataset: CocoDetection,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    timeout: float | None = None,
    repeat_threshold: float | None = None,
) -> WatchedLoader:
    """Build the training loader of `(ImageBatch, targets)`.

    Call `loader.batch_sampler.set_epoch(epoch, start_batch)` before iterating.

    Args:
        dataset: images and boxes.
        batch_size: images per process and step.
        workers: number of processes that read and augment; results do not depend on it.
        seed: seed of the shuffling (the augmentation has its own in the dataset).
        rank, world_size: rank of this process and number of processes.
        timeout: seconds to wait for a batch; None waits indefinitely.
        repeat_threshold: show images of classes that are in a smaller fraction of the images more often, see
            `federated.repeat_factors`; None shows each image once.
    """
    repeats = None if repeat_threshold is None else repeat_factors(dataset.packed, repeat_threshold)
    batches = TrainBatches(dataset.packed.image_sizes, batch_size, seed, rank, world_size, repeats)
    return _loader(dataset, batches, workers, timeout)


def build_eval_loader(
    dataset: CocoDetection,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    timeout: float | None = None,
) -> WatchedLoader:
    """Build the evaluation loader of `(ImageBatch, targets)`, with every image exactly once over all processes.

    Only images of the same resized shape share a batch, so that there is no padding.

    Args:
        dataset: images and boxes, opened with `train=False`.
        batch_size: maximum number of images in a batch.
        workers, rank, world_size, timeout: as for `build_train_loader`.
    """
    # of every scale: two images of one shape in one of them may differ in another, by rounding
    resize = getattr(dataset.transforms, "output_sizes", lambda height, width: (height, width))
    shapes = [resize(h, w) for h, w in dataset.packed.image_sizes.tolist()]
    batches = EvalBatches(len(dataset), batch_size, rank, world_size, shapes)
    return _loader(dataset, batches, workers, timeout)


def _loader(
    dataset: CocoDetection,
    batches: TrainBatches | EvalBatches,
    workers: int,
    timeout: float | None,
) -> WatchedLoader:
    return WatchedLoader(
        dataset,
        workers=workers,
        timeout=timeout,
        batch_sampler=batches,
        collate_fn=_collate_for_transfer,
        pin_memory=torch.cuda.is_available(),
        # its own generator: otherwise each epoch draws from the global random state, and a resumed run differs
        generator=torch.Generator(),
    )


class TrainBatches:
    """Batch sampler that shuffles, groups images by orientation (landscape or not), and splits batches among ranks.

    Every image occurs once per epoch. All batches are full and all ranks get the same number: missing images at the
    end are taken from the beginning of the epoch's order. At most one batch mixes both orientations.

    Args:
        sizes: (I, 2) (h, w) of the images.
        batch_size: images per process and batch.
        seed: seed of the shuffling.
        rank, world_size: rank of this process and number of processes.
        repeats: (I,) how often each image occurs in an epoch instead of once, on average over the epochs: a factor of
            2.3 is twice or three times. Epochs have the same length.

    Yields lists of (image index, epoch), or (image index, epoch, n) for an image's occurrence after n others in an
    epoch with repeats, so that it is augmented in another way. The state is the pair (epoch, start_batch), see
    `set_epoch`.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeats: np.ndarray | None = None,
    ) -> None:
        if len(sizes) == 0 or batch_size < 1:
            raise ValueError("training loader: needs at least one image and a batch size of at least 1.")
        self._wide = np.asarray(sizes)[:, 1] > np.asarray(sizes)[:, 0]
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.repeats = repeats
        # rounded first, so that a sum of 12.000000001 does not add an image
        self._length = len(sizes) if repeats is None else math.ceil(round(float(np.sum(repeats)), 6))
        self.epoch = self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Set the epoch to iterate, and how many of this rank's batches to skip at its beginning."""
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Return the number of batches of one rank in an epoch, skipped ones included."""
        return -(-self._length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        batches = self._all_batches()
        times = np.zeros_like(batches) if self.repeats is None else _occurrences(batches.ravel()).reshape(batches.shape)
        mine = slice(self.rank + self.start_batch * self.world_size, None, self.world_size)
        for batch, earlier in zip(batches[mine].tolist(), times[mine].tolist(), strict=True):
            yield [
                (index, self.epoch, n) if n else (index, self.epoch) for index, n in zip(batch, earlier, strict=True)
            ]

    def _all_batches(self) -> np.ndarray:
        """Return (number of batches of all ranks, batch_size) image indices, the same in every rank."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self._wide))
        if self.repeats is not None:
            order = self._repeated(order, random)
        full, rest = [], []
        for group in (order[self._wide[order]], order[~self._wide[order]]):
            cut = len(group) // self.batch_size * self.batch_size
            full.append(group[:cut].reshape(-1, self.batch_size))
            rest.append(group[cut:])
        num_missing_batches = len(self) * self.world_size - sum(map(len, full))
        last = np.concatenate(rest)
        num_missing = num_missing_batches * self.batch_size - len(last)
        # resize repeats the order if a tiny dataset has fewer images than are missing
        last = np.concatenate([last, np.resize(order, num_missing)]).reshape(-1, self.batch_size)
        batches = np.concatenate([*full, last])
        # shuffled again: otherwise all landscape batches would come before all portrait ones
        return batches[random.permutation(len(batches))]

    def _repeated(self, order: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return the epoch's images (M,) in random order, each floor(r) or ceil(r) times, r on average."""
        assert self.repeats is not None
        # systematic sampling: one random offset for all keeps the total, so that every epoch has the same length
        ends = np.floor(np.cumsum(self.repeats[order]) + random.random()).astype(np.int64)
        chosen = np.repeat(order, np.diff(ends, prepend=0))[: self._length]
        return random.permutation(np.concatenate([chosen, order[: self._length - len(chosen)]]))


def _occurrences(values: np.ndarray) -> np.ndarray:
    """Count for each value (n,) how often it occurs before."""
    order = np.argsort(values, kind="stable")
    first = np.flatnonzero(np.diff(values[order], prepend=-1))
    counts = np.arange(len(values)) - np.repeat(first, np.diff(first, append=len(values)))
    before = np.empty_like(counts)
    before[order] = counts
    return before


class EvalBatches:
    """Batch sampler with each image exactly once over all ranks, in a fixed order.

    Args:
        count: number of images.
        batch_size: maximum number of images in a batch.
        rank, world_size: rank of this process and number of processes; ranks may differ by one batch.
        shapes: (h, w) of each image as the model sees it, or of each scale of it; if given, a batch has images of one
            shape only, so that no image is padded and its detections do not depend on the rest of the batch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shapes: Sequence[Hashable] | None = None,
    ) -> None:
        groups: dict[Hashable, list[int]] = {}
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
    """Training batches by epoch and position, for the trainer.

    Args:
        loader: a loader whose `batch_sampler` has `set_epoch(epoch, start_batch)`.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        # DataLoader's type allows any batch sampler, or None
        self._batch_sampler: Any = loader.batch_sampler

    def __len__(self) -> int:
        return len(self._batch_sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over an epoch from batch `start`, which may be past its end; skipped batches are not read."""
        self._batch_sampler.set_epoch(epoch, start)
        # if accumulation does not divide the epoch, its last step counts as a full one, so `start` may be too large
        return islice(iter(self.loader), max(0, len(self) - start))
