"""One-stage dense head with ATSS assignment, with or without the centerness branch.

The assignment is that of Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection", CVPR 2020.

Co-DETR trains it with focal loss and centerness; BRS-DETR drops the branch and ranks all logits by IoU instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brs_detr.assign.assignment import HeadAssignment
from brs_detr.assign.atss import ATSSAssigner
from brs_detr.losses.distributed import SharedCount
from brs_detr.models.config import ATSSHeadConfig
from brs_detr.models.heads.dense import DenseOutput, build_objective
from brs_detr.models.heads.towers import TowerHead
from brs_detr.models.objective_config import ScoreConfig
from brs_detr.ops.anchors import AnchorGrid, octave_scales
from brs_detr.ops.boxes import BoxCoder
from brs_detr.ops.images import Size


class ATSSHead(TowerHead):
    """Classes and boxes at every cell of a feature pyramid, one anchor per cell unless more are asked for.

    BRS-DETR and Co-DETR train it as an auxiliary head with one anchor; the published rank-based ATSS has three scales
    and four convolutions.

    Args:
        dim: channels of the feature maps.
        num_classes: object classes.
        strides: pixels per cell of each map.
        config: see `ATSSHeadConfig`.
        norm_groups: of the towers' GroupNorm; must divide `dim`.
    """

    def __init__(
        self, dim: int, num_classes: int, strides: Sequence[int], config: ATSSHeadConfig, norm_groups: int = 32
    ) -> None:
        objective = config.objective
        super().__init__(
            dim,
            num_classes,
            AnchorGrid(strides, octave_scales(config.anchor_scale, config.scales_per_octave), config.anchor_ratios),
            stacked_convs=config.stacked_convs,
            norm_groups=norm_groups,
            level_scales=True,
            branch="centerness" if config.centerness else None,
            objective=build_objective(objective),
            assigner=ATSSAssigner(config.topk),
            coder=BoxCoder((0.1, 0.1, 0.2, 0.2)),
            before_nms=config.before_nms,
            score_threshold=config.score_threshold,
            nms_iou=config.nms_iou,
            max_detections=config.max_detections,
        )
        self.branch_weight = objective.weights.centerness if isinstance(objective, ScoreConfig) else 0.0

    def normalizer(self, assignment: HeadAssignment) -> SharedCount:
        """Count the positives, at least one an image, as in the published code."""
        if assignment.counts is not None:
            return SharedCount(sum(max(count, 1) for count in assignment.counts))
        images = assignment.per_image(assignment.labels)
        return SharedCount(sum((labels < self.num_classes).sum().clamp(min=1) for labels in images))

    def branch_target(
        self, output: DenseOutput, extents: Sequence[Sequence[Size]], assignment: HeadAssignment
    ) -> Tensor:
        """Return the centerness (P,) of the positive anchors."""
        return centerness_target(torch.cat(assignment.references)[assignment.rows], assignment.targets)


def centerness_target(anchors: Tensor, objects: Tensor) -> Tensor:
    """Compute how central an anchor's center lies in its object (Tian et al., "FCOS", Eq. 3).

    Args:
        anchors: (P, 4) xyxy, centers inside their objects.
        objects: (P, 4) xyxy.

    Returns:
        (P,) in (0, 1], 1 at the object's center.
    """
    center = (anchors[:, :2] + anchors[:, 2:]) * 0.5
    low, high = center - objects[:, :2], objects[:, 2:] - center
    return (torch.minimum(low, high) / torch.maximum(low, high)).prod(dim=1).sqrt()
