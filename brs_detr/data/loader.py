"""Batches of padded pictures from a dataset, with workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from brs_detr.data.coco import CocoDetection, Target
from brs_detr.data.samplers import EvalBatches, TrainBatches
from brs_detr.data.shared_memory import move_to_shared_memory
from brs_detr.data.watched_loader import WatchedLoader
from brs_detr.ops.images import ImageBatch


def collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[ImageBatch, list[Target]]:
    """Pad pictures to one batch and keep the targets as a list.

    Args:
        samples: pairs of a (3, h, w) uint8 picture and its target.

    Returns:
        the padded batch, and one target per picture.
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
        dataset: pictures and boxes.
        batch_size: pictures of one process in one step.
        workers: processes that read and augment; results do not depend on their number.
        seed: of the shuffling (the dataset has its own for the augmentation).
        rank, world_size: this process and their number.
        pin_memory: page-locked batches; by default when there is a GPU.
        timeout: seconds to wait for a batch; None waits for ever.
    """
    batches = TrainBatches(dataset.packed.picture_sizes, batch_size, seed, rank, world_size)
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
    """Loader of `(ImageBatch, targets)` for evaluation: every picture exactly once over all processes.

    Args:
        dataset: pictures and boxes, opened with `train=False`.
        batch_size: largest number of pictures in a batch.
        workers, rank, world_size, pin_memory, timeout: as for `build_train_loader`.
        group_equal_shapes: put only pictures of the same resized shape in a batch, so that there is no padding.
    """
    shapes = None
    if group_equal_shapes:
        resize = getattr(dataset.transforms, "output_size", lambda height, width: (height, width))
        shapes = [resize(h, w) for h, w in dataset.packed.picture_sizes.tolist()]
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
