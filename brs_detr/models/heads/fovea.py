"""FoveaBox's head: one point per cell, from which the distances to the four sides of a box are predicted.

Source: Kong et al., "FoveaBox: Beyound Anchor-based Object Detection", TIP 2020; trained with any
objective. With AP and aLRP loss it is that of Oksuz et al., "aLRP loss" (NeurIPS 2020), Table 7.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from brs_detr.assign.fovea import SIZE_RANGES, FoveaAssigner
from brs_detr.models.heads.dense import BoxLoss, Objective
from brs_detr.models.heads.towers import TowerHead
from brs_detr.ops.anchors import AnchorGrid
from brs_detr.ops.boxes import PointCoder


class FoveaHead(TowerHead):
    """Classes and boxes at the center of every cell of a feature pyramid.

    Its "anchors" are squares around the centers, which give the point and what the distances are divided by.

    Args:
        dim: channels of the feature maps.
        num_classes: object classes.
        strides: pixels per cell of each map.
        objective: takes a `PredictionSet`.
        size_ranges: least and largest square root of an object's area, in pixels, for each map.
        sigma: sides of the region of positive cells, as a fraction of those of the object.
        base_scale: what distances are divided by, in multiples of the stride: 16 to 256 pixels on the usual maps.
        num_convs: 3x3 convolutions of each tower.
        norm_groups: of the towers' GroupNorm; None: convolutions with bias and no norm, as published.
        box_loss: "giou", "l1" or "smooth_l1", see `DenseHead`; aLRP needs "giou".
        beta: of "smooth_l1".
        before_nms: best (cell, class) pairs of each level that enter suppression.
        score_threshold: class scores at or below this are dropped; 0.05 in the papers.
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
        size_ranges: Sequence[tuple[float, float]] = SIZE_RANGES,
        sigma: float = 0.4,
        base_scale: float = 2.0,
        num_convs: int = 4,
        norm_groups: int | None = None,
        box_loss: BoxLoss = "giou",
        beta: float = 0.11,
        before_nms: int = 1000,
        score_threshold: float = 0.0,
        nms_iou: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__(
            dim,
            num_classes,
            AnchorGrid(strides, (base_scale,), (1.0,), offset=0.5),
            num_convs=num_convs,
            norm_groups=norm_groups,
            objective=objective,
            assigner=FoveaAssigner(tuple(strides), tuple(size_ranges), sigma),
            coder=PointCoder(),
            box_loss=box_loss,
            beta=beta,
            before_nms=before_nms,
            score_threshold=score_threshold,
            nms_iou=nms_iou,
            max_detections=max_detections,
        )

    def box_losses(self, anchors: Tensor, deltas: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `DenseHead.box_losses`, of objects cut to the distances that the coder has targets for."""
        return super().box_losses(anchors, deltas, self.coder.decode(anchors, self.coder.encode(anchors, targets)))
