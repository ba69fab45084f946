"""The dense heads of a detector in one training step, so that the host waits for their assignments once.

How many anchors and regions are positive is decided on the device, but it is the shape of what follows. `read_counts`
reads it for all heads and images together; before it no head waits, and after it none does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from brs_detr.assign.assignment import HeadAssignment, count_until, differences, read_together
from brs_detr.assign.max_iou import IGNORED
from brs_detr.models.heads.dense import DenseHead, DenseOutput
from brs_detr.models.heads.pooling import count_levels, map_of
from brs_detr.models.heads.roi import Branch, RoIHead
from brs_detr.ops.anchors import cell_features
from brs_detr.ops.boxes import Regions
from brs_detr.ops.images import Size


class DenseStep:
    """A head on anchors.

    Args:
        head: the RPN or a one-stage head.
        output: of its `forward`.
        sizes: (h, w) pixels of each image without padding.
        targets: per image {"boxes": (M, 4) xyxy pixels, "labels": (M,)}.

    Attributes:
        assignment: what the anchors learn, from `read_counts` on.
    """

    assignment: HeadAssignment

    def __init__(self, head: DenseHead, output: DenseOutput, sizes: Sequence[Size], targets: Sequence[dict]) -> None:
        self.head, self.output, self.sizes = head, output, sizes
        self.extents = head.extents(output, sizes)
        self.anchors, self.matched = head.matched(output, self.extents, head.objects(sizes, targets))

    def counts(self) -> list[Tensor]:
        """Return the positives (B,) up to the end of each image."""
        return [count_until(self.matched.assigned >= 0, [len(own) for own in self.anchors])]

    def assign(self, positives: list[int]) -> None:
        """Take what `counts` says on the host."""
        self.assignment = self.head.learned(self.anchors, self.matched, differences(positives))

    def losses(self) -> dict[str, Tensor]:
        """Compute the head's terms."""
        normalizer = self.head.normalizer(self.assignment)
        return self.head.terms(self.output, self.extents, self.assignment, normalizer)

    def features(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the features (n, dim) of each image's anchors, those of their cells in (B, dim, h, w) maps."""
        return cell_features(maps, self.sizes, self.head.strides, self.head.anchors.per_cell)


class RegionStep:
    """A head on pooled regions.

    Args:
        head: the RoI head.
        features: (B, dim, h, w) per stride.
        regions: proposals of all images.
        sizes, targets: as for `DenseStep`.
        branch: computes further losses of the positives: `MaskHead.losses`.

    Attributes:
        assignment: what the regions learn, from `read_counts` on.
    """

    assignment: HeadAssignment

    def __init__(
        self,
        head: RoIHead,
        features: Sequence[Tensor],
        regions: Regions,
        sizes: Sequence[Size],
        targets: Sequence[dict],
        branch: Branch | None = None,
    ) -> None:
        self.head, self.maps, self.targets, self.branch = head, features, targets, branch
        self.sampled = head.sample_rois(list(regions.boxes), sizes, targets, list(regions.valid))

    def counts(self) -> list[Tensor]:
        """Return the regions and the positives (B,) up to the end of each image, and the regions (L,) of each map."""
        lengths = [len(own) for own in self.sampled.boxes]
        assigned = torch.cat(self.sampled.assigned)
        used, strides = assigned != IGNORED, self.head.strides
        level = torch.where(used, map_of(torch.cat(self.sampled.boxes), strides), -1)
        totals = [count_until(mask, lengths) for mask in (used, assigned >= 0)]
        return [*totals, count_levels(level, len(strides))]

    def assign(self, used: list[int], positives: list[int], levels: list[int]) -> None:
        """Take what `counts` says on the host, and pool the regions."""
        rois, assigned = self.sampled.first(differences(used))
        self.pooled = self.head.pool_rois(self.maps, rois, levels)
        self.assignment = self.head.assign(rois, assigned, self.targets, differences(positives))

    def losses(self) -> dict[str, Tensor]:
        """Compute the head's terms."""
        further = {} if self.branch is None else self.branch(self.maps, self.assignment, self.targets)
        return self.head.terms(self.head.classify_pooled(self.pooled), self.assignment, further)

    def features(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the mean features (n, dim) of each image's regions; those of `maps` were pooled for the head."""
        return self.assignment.per_image(self.pooled.features())


def read_counts(steps: Iterable[DenseStep | RegionStep]) -> None:
    """Decide what anchors and regions learn (the host waits for the device once for all heads)."""
    steps = list(steps)
    if not steps:
        return
    asked = [step.counts() for step in steps]
    read = iter(read_together([count for counts in asked for count in counts]))
    for step, counts in zip(steps, asked, strict=True):
        step.assign(*(next(read) for _ in counts))
