"""Batches of padded pictures from a dataset, with workers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from brs_detr.data.coco import CocoDetection, Target
from brs_detr.data.samplers import EvalBatches, TrainBatches
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


def build_train_loader(
    dataset: CocoDetection,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool | None = None,
) -> DataLoader:
    """Loader of `(ImageBatch, targets)` for training; `loader.batch_sampler.set_epoch(epoch, start_batch)` before use.

    Args:
        dataset: pictures and boxes.
        batch_size: pictures of one process in one step.
        workers: processes that read and augment; results do not depend on their number.
        seed: of the shuffling (the dataset has its own for the augmentation).
        rank, world_size: this process and their number.
        pin_memory: page-locked batches; by default when there is a GPU.
    """
    batches = TrainBatches(dataset.packed.picture_sizes, batch_size, seed, rank, world_size)
    return _loader(dataset, batches, workers, pin_memory)


def build_eval_loader(
    dataset: CocoDetection,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    group_equal_shapes: bool = True,
    pin_memory: bool | None = None,
) -> DataLoader:
    """Loader of `(ImageBatch, targets)` for evaluation: every picture exactly once over all processes.

    Args:
        dataset: pictures and boxes, opened with `train=False`.
        batch_size: largest number of pictures in a batch.
        workers, rank, world_size, pin_memory: as for `build_train_loader`.
        group_equal_shapes: put only pictures of the same resized shape in a batch, so that there is no padding.
    """
    shapes = None
    if group_equal_shapes:
        resize = getattr(dataset.transforms, "output_size", lambda height, width: (height, width))
        shapes = [resize(h, w) for h, w in dataset.packed.picture_sizes.tolist()]
    return _loader(dataset, EvalBatches(len(dataset), batch_size, rank, world_size, shapes), workers, pin_memory)


def _loader(
    dataset: CocoDetection, batches: TrainBatches | EvalBatches, workers: int, pin_memory: bool | None
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else each epoch draws from the global state, and a resumed run differs
    )
