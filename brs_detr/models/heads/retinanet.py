"""RetinaNet's head (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017), trained with any objective.

The published ranking losses on RetinaNet (Chen et al., "AP loss", CVPR 2019; Oksuz et al., "aLRP loss", NeurIPS 2020)
have two scales and three ratios per cell; aLRP's strongest one has ATSS assignment, one ratio and two or three scales.
"""

from __future__ import annotations

from collections.abc import Sequence

from brs_detr.assign.assignment import Assigner
from brs_detr.assign.atss import ATSSAssigner
from brs_detr.assign.max_iou import MaxIoUAssigner
from brs_detr.models.heads.dense import build_objective
from brs_detr.models.heads.towers import TowerHead
from brs_detr.models.one_stage_config import RetinaNetHeadConfig
from brs_detr.ops.anchors import AnchorGrid, octave_scales
from brs_detr.ops.boxes import BoxCoder


class RetinaNetHead(TowerHead):
    """Classes and boxes at several anchors of every cell of a feature pyramid.

    Args:
        dim: channels of the feature maps.
        num_classes: object classes.
        strides: pixels per cell of each map.
        config: see `RetinaNetHeadConfig`. aLRP needs the box loss "giou"; the AP loss was published with "smooth_l1".
    """

    def __init__(self, dim: int, num_classes: int, strides: Sequence[int], config: RetinaNetHeadConfig) -> None:
        assigner: Assigner = ATSSAssigner(config.topk)
        if config.assigner == "max_iou":  # the best anchors of each object are always positive, as in the paper's code
            assigner = MaxIoUAssigner(config.positive_iou, config.negative_iou, low_quality=0.0)
        super().__init__(
            dim,
            num_classes,
            AnchorGrid(strides, octave_scales(config.anchor_scale, config.scales_per_octave), config.anchor_ratios),
            stacked_convs=config.stacked_convs,
            objective=build_objective(config.objective),
            assigner=assigner,
            coder=BoxCoder((0.1, 0.1, 0.2, 0.2)),
            box_loss=config.box_loss,
            beta=config.beta,
            before_nms=config.before_nms,
            score_threshold=config.score_threshold,
            nms_iou=config.nms_iou,
            max_detections=config.max_detections,
        )
