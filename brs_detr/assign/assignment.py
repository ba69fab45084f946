"""Assignments of several images joined into one, so that a head computes one loss for the batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor


class Assigner(Protocol):
    """Gives the anchors of one image to its objects.

    Attributes:
        may_ignore: whether assignments may hold IGNORED.
    """

    may_ignore: ClassVar[bool]

    def __call__(self, anchors: Tensor, level_counts: Sequence[int], objects: Tensor) -> Tensor:
        """Assign (N, 4) xyxy anchors, `level_counts` of each level, to (M, 4) objects.

        Returns:
            (N,) int64: object index, or a negative mark of `assign.max_iou`.
        """
        ...


class BatchAssignment(NamedTuple):
    """The assignments of several images joined into one, so that a head computes one loss for the batch.

    Attributes:
        assigned: (N,) int64, index into `boxes`, or a negative constant of `assign.max_iou`.
        boxes: (M, 4) xyxy pixels, ground truth of all images.
        labels: (M,) int64, their classes.
    """

    assigned: Tensor
    boxes: Tensor
    labels: Tensor

    def positives(self, count: int | None = None) -> Tensor:
        """Return the rows (P,) that have an object, ascending.

        Args:
            count: P where the host knows it; None: it waits for the device once.
        """
        positive = self.assigned >= 0
        rows = positive.nonzero() if count is None else torch.nonzero_static(positive, size=count)
        return rows.flatten()

    def classes(self, background: int) -> Tensor:
        """Return the class (N,) of every row, `background` where it has no object."""
        # One more label for the rows without an object: `where` then selects without reading anything on the host.
        padded = torch.cat([self.labels, self.labels.new_full((1,), background)])
        return padded[torch.where(self.assigned >= 0, self.assigned, self.labels.shape[0])]


def join(assignments: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> BatchAssignment:
    """Concatenate per-image assignments, shifting object indices to the concatenated objects.

    Args:
        assignments: per image (N_b,) int64.
        targets: per image {"boxes": (M_b, 4), "labels": (M_b,)}.
    """
    shifted, start = [], 0
    for assigned, target in zip(assignments, targets, strict=True):
        shifted.append(torch.where(assigned >= 0, assigned + start, assigned))
        start += target["boxes"].shape[0]
    boxes = torch.cat([target["boxes"].float() for target in targets])
    return BatchAssignment(torch.cat(shifted), boxes, torch.cat([target["labels"] for target in targets]))


class HeadAssignment(NamedTuple):
    """What the anchors or proposals of a batch, N in all, P of them positive, learn in a head.

    Attributes:
        references: per image (n, 4) xyxy pixels, anchors or proposals, detached.
        labels: (N,) int64, background = number of classes.
        rows: (P,) int64 ascending rows of the positives.
        targets: (P, 4) xyxy pixels of each positive's object.
        valid: (N,) bool; False rows are ignored. None: all rows count.
        matched_idxs: (P,) int64 each positive's object, counted through all images; None where nobody asks.
        masks: per image (m, h, w) bitmaps of its objects; None where no masks are learned.
        counts: positives of each image; None where the host does not know them.
    """

    references: list[Tensor]
    labels: Tensor
    rows: Tensor
    targets: Tensor
    valid: Tensor | None = None
    matched_idxs: Tensor | None = None
    masks: list[Tensor] | None = None
    counts: list[int] | None = None

    def per_image(self, values: Tensor) -> list[Tensor]:
        """Split the rows of (N, ...) values by image."""
        return list(values.split([len(boxes) for boxes in self.references]))


def count_until(mask: Tensor, lengths: Sequence[int]) -> Tensor:
    """Count the true entries (B,) of a mask (N,) up to the end of each image, without waiting for the device.

    Args:
        mask: bool, one image after the other.
        lengths: entries of each image, at least 1.
    """
    ends = torch.tensor(lengths).cumsum(0) - 1
    return mask.cumsum(0)[ends.to(mask.device, non_blocking=True)]


def read_together(counts: Sequence[Tensor]) -> list[list[int]]:
    """Copy small integer tensors to the host (which waits for the device once for all of them)."""
    values = torch.cat(list(counts)).tolist()
    ends = list(accumulate(len(one) for one in counts))
    return [values[end - len(one) : end] for one, end in zip(counts, ends, strict=True)]


def differences(reached: Sequence[int]) -> list[int]:
    """Return the growth of running totals: [2, 5] -> [2, 3]."""
    return [end - begin for begin, end in zip([0, *reached[:-1]], reached)]


def count_per_image(rows: Tensor, counts: Sequence[int]) -> list[int]:
    """Count how many of the ascending `rows` of a batch are each image's (the host waits for the device once).

    Args:
        rows: (P,) int64.
        counts: rows of each image.
    """
    ends = torch.tensor(counts).cumsum(0).to(rows.device, non_blocking=True)
    return differences(torch.searchsorted(rows, ends).tolist())
