"""FoveaBox's head: one point per cell, from which the distances to the four sides of a box are predicted.

Source: Kong et al., "FoveaBox: Beyound Anchor-based Object Detection", TIP 2020.
With AP and aLRP loss it is that of Oksuz et al., "aLRP loss" (NeurIPS 2020), Table 7.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from brs_detr.assign.fovea import FoveaAssigner
from brs_detr.models.heads.dense import build_objective
from brs_detr.models.heads.towers import TowerHead
from brs_detr.models.one_stage_config import FoveaHeadConfig
from brs_detr.ops.anchors import AnchorGrid
from brs_detr.ops.boxes import PointCoder


class FoveaHead(TowerHead):
    """Classes and boxes at the center of every cell of a feature pyramid.

    Its "anchors" are squares around the centers, which give the point and what the distances are divided by.

    Args:
        dim: channels of the feature maps.
        num_classes: object classes.
        strides: pixels per cell of each map.
        config: see `FoveaHeadConfig`.
    """

    def __init__(self, dim: int, num_classes: int, strides: Sequence[int], config: FoveaHeadConfig) -> None:
        super().__init__(
            dim,
            num_classes,
            AnchorGrid(strides, (config.base_scale,), (1.0,), offset=0.5),
            stacked_convs=config.stacked_convs,
            objective=build_objective(config.objective),
            assigner=FoveaAssigner(tuple(strides), size_ranges(strides, config.object_sizes), config.sigma),
            coder=PointCoder(),
            box_loss=config.box_loss,
            beta=config.beta,
            before_nms=config.before_nms,
            score_threshold=config.score_threshold,
            nms_iou=config.nms_iou,
            max_detections=config.max_detections,
        )

    def box_losses(self, anchors: Tensor, deltas: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `DenseHead.box_losses`, of objects cut to the distances that the coder has targets for."""
        return super().box_losses(anchors, deltas, self.coder.decode(anchors, self.coder.encode(anchors, targets)))


def size_ranges(strides: Sequence[int], in_strides: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    """Return the range of object sizes (square root of the area, pixels) of each map.

    The finest map begins at an eighth of its stride, the coarsest ends at twice its range: from 1 to 2048 pixels on the
    published ones.
    """
    low, high = in_strides
    ranges = [(low * stride, high * stride) for stride in strides]
    ranges[0] = (strides[0] / 8, ranges[0][1])
    ranges[-1] = (ranges[-1][0], 2 * high * strides[-1])
    return tuple(ranges)
