"""RetinaNet's head (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017), trained with any objective.

The published ranking losses on RetinaNet (Chen et al., "AP loss", CVPR 2019; Oksuz et al., "aLRP loss", NeurIPS 2020)
have two scales and three ratios per cell; aLRP's strongest one has ATSS assignment, one ratio and two or three scales.
"""

from __future__ import annotations

from collections.abc import Sequence

from brs_detr.assign.assignment import Assigner
from brs_detr.assign.max_iou import MaxIoUAssigner
from brs_detr.models.heads.dense import BoxLoss, Objective
from brs_detr.models.heads.towers import TowerHead
from brs_detr.ops.anchors import AnchorGrid, octave_scales
from brs_detr.ops.boxes import BoxCoder


class RetinaNetHead(TowerHead):
    """Classes and boxes at several anchors of every cell of a feature pyramid.

    Args:
        dim: channels of the feature maps.
        num_classes: object classes.
        strides: pixels per cell of each map.
        objective: takes a `PredictionSet`.
        assigner: gives anchors to objects; None: `MaxIoUAssigner` at 0.5 and 0.4, the best anchors of each object
            always positive, as in the paper's code.
        scales: anchor sides in multiples of the stride.
        ratios: height over width of the anchors.
        num_convs: 3x3 convolutions of each tower.
        norm_groups: of the towers' GroupNorm; None: convolutions with bias and no norm, as in the paper.
        box_loss: "giou", "l1" or "smooth_l1", see `DenseHead`; aLRP needs "giou".
        beta: of "smooth_l1"; the AP loss's RetinaNet uses 0.11 and aLRP's repository 1.
        before_nms: best (anchor, class) pairs of each level that enter suppression.
        score_threshold: class scores at or below this are dropped; 0.05 in the papers, whose schedules are long. A
            ranking loss gives scores no absolute meaning, and after a short one most objects may score less.
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
        assigner: Assigner | None = None,
        scales: Sequence[float] = octave_scales(4.0, 2),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        num_convs: int = 4,
        norm_groups: int | None = None,
        box_loss: BoxLoss = "giou",
        beta: float = 1.0,
        before_nms: int = 1000,
        score_threshold: float = 0.0,
        nms_iou: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__(
            dim,
            num_classes,
            AnchorGrid(strides, scales, ratios),
            num_convs=num_convs,
            norm_groups=norm_groups,
            objective=objective,
            assigner=assigner or MaxIoUAssigner(positive=0.5, negative=0.4, low_quality=0.0),
            coder=BoxCoder((0.1, 0.1, 0.2, 0.2)),
            box_loss=box_loss,
            beta=beta,
            before_nms=before_nms,
            score_threshold=score_threshold,
            nms_iou=nms_iou,
            max_detections=max_detections,
        )
