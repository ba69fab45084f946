"""Assignments of several images joined into one, so that a head computes one loss for the whole batch.

What a one-to-many head hands to the decoder as collaborative queries (Zong et al., Co-DETR, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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

    def positives(self) -> Tensor:
        """Return the rows (P,) that have an object, ascending (the host waits for the device once)."""
        return (self.assigned >= 0).nonzero().flatten()

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


class AuxSamples(NamedTuple):
    """Positive and background samples of one head, a list entry per image.

    Attributes:
        boxes: (n, 4) xyxy pixels, the head's anchors or proposals, detached.
        labels: (n,) int64, background = number of classes.
        targets: (n, 4) xyxy pixels of the object, zeros for background.
        features: (n, dim) what the head saw there, with gradient.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    targets: list[Tensor]
    features: list[Tensor]
