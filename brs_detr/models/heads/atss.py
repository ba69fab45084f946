"""One-stage dense head with ATSS assignment (Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free
Detection", CVPR 2020), with or without the centerness branch.

Co-DETR trains it with focal loss and centerness; BRS-DETR drops the branch and ranks all logits by IoU instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from brs_detr.assign.assignment import HeadAssignment
from brs_detr.assign.atss import ATSSAssigner
from brs_detr.losses.classification import PRIOR_BIAS
from brs_detr.losses.distributed import SharedCount
from brs_detr.models.heads.dense import DenseHead, DenseOutput, Objective
from brs_detr.ops.anchors import AnchorGrid, batch_rows
from brs_detr.ops.boxes import BoxCoder
from brs_detr.ops.images import Size


class ATSSHead(DenseHead):
    """Classes and boxes at every cell of a feature pyramid, one anchor per cell.

    Args:
        dim: channels of the feature maps.
        num_classes: object classes.
        strides: pixels per cell of each map.
        objective: takes a `PredictionSet`.
        stacked_convs: 3x3 convolutions of each tower.
        norm_groups: of the towers' GroupNorm; must divide `dim`.
        centerness: predict centerness, weigh box losses with its target and detections with its value.
        centerness_weight: factor of the centerness loss.
        topk: candidates per level and object.
        scale: anchor side in multiples of the stride.
        before_nms: best (anchor, class) pairs of each level that enter suppression.
        score_threshold: class scores at or below this are dropped.
        nms_iou: class-wise suppression threshold of detections.
        max_detections: detections per image.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        strides: Sequence[int],
        *,
        objective: Objective,
        stacked_convs: int = 1,
        norm_groups: int = 32,
        centerness: bool = False,
        centerness_weight: float = 12.0,
        topk: int = 9,
        scale: float = 8.0,
        before_nms: int = 1000,
        score_threshold: float = 0.0,
        nms_iou: float = 0.6,
        max_detections: int = 100,
    ) -> None:
        super().__init__(
            num_classes,
            AnchorGrid(strides, (scale,), (1.0,)),
            objective=objective,
            assigner=ATSSAssigner(topk),
            coder=BoxCoder((0.1, 0.1, 0.2, 0.2)),
            before_nms=before_nms,
            score_threshold=score_threshold,
            nms_iou=nms_iou,
            max_detections=max_detections,
        )
        self.centerness_weight = centerness_weight
        self.class_tower = _tower(dim, stacked_convs, norm_groups)
        self.box_tower = _tower(dim, stacked_convs, norm_groups)
        self.score = nn.Conv2d(dim, num_classes, 3, padding=1)
        self.delta = nn.Conv2d(dim, 4, 3, padding=1)
        self.centerness = nn.Conv2d(dim, 1, 3, padding=1) if centerness else None
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in strides)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        assert self.score.bias is not None
        nn.init.constant_(self.score.bias, PRIOR_BIAS)

    def forward(self, features: Sequence[Tensor]) -> DenseOutput:
        """Feature maps (B, dim, h, w), one per stride -> predictions at every cell."""
        logits = [rearrange(self.score(self.class_tower(x)), "b c y x -> b y x 1 c") for x in features]
        hidden = [self.box_tower(x) for x in features]
        deltas = [
            rearrange(self.delta(x).float() * scale, "b box y x -> b y x 1 box")
            for x, scale in zip(hidden, self.scales)
        ]
        centerness = None
        if self.centerness is not None:
            centerness = [rearrange(self.centerness(x), "b 1 y x -> b y x 1 1") for x in hidden]
        return DenseOutput(logits, deltas, centerness)

    def normalizer(self, assignment: HeadAssignment) -> SharedCount:
        """Number of positives, at least one an image, as in the published code."""
        images = assignment.per_image(assignment.labels)
        return SharedCount(sum((labels < self.num_classes).sum().clamp(min=1) for labels in images))

    def terms(
        self,
        output: DenseOutput,
        extents: Sequence[Sequence[Size]],
        assignment: HeadAssignment,
        normalizer: Tensor | SharedCount | None,
        box_weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As `DenseHead.terms`, and with the branch "centerness", whose target weighs the box losses."""
        if output.centerness is None:
            return super().terms(output, extents, assignment, normalizer, box_weight)
        assert isinstance(normalizer, SharedCount)  # that of `normalizer`
        rows = assignment.rows
        goal = centerness_target(torch.cat(assignment.references)[rows], assignment.targets)
        terms = super().terms(output, extents, assignment, normalizer, box_weight=goal)
        logits = batch_rows(output.centerness, extents)[rows, 0].float()
        value = binary_cross_entropy_with_logits(logits, goal, reduction="sum") / normalizer.mean(logits.device)
        return {**terms, "centerness": self.centerness_weight * value}


def centerness_target(anchors: Tensor, objects: Tensor) -> Tensor:
    """How central an anchor's center lies in its object (Tian et al., "FCOS", Eq. 3).

    Args:
        anchors: (P, 4) xyxy, centers inside their objects.
        objects: (P, 4) xyxy.

    Returns:
        (P,) in (0, 1], 1 at the object's center.
    """
    center = (anchors[:, :2] + anchors[:, 2:]) * 0.5
    low, high = center - objects[:, :2], objects[:, 2:] - center
    return (torch.minimum(low, high) / torch.maximum(low, high)).prod(dim=1).sqrt()


def _tower(dim: int, depth: int, groups: int) -> nn.Sequential:
    """3x3 convolutions, each with GroupNorm and ReLU."""
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(groups, dim), nn.ReLU())
            for _ in range(depth)
        )
    )
