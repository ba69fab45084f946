"""Two-stage CNN detectors: a backbone, a feature pyramid, region proposals and a head that looks at each region.

Faster R-CNN (Ren et al., 2015) on a feature pyramid (Lin et al., 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from brs_detr.models.backbones.timm_backbone import build_backbone
from brs_detr.models.cnn_config import FasterRCNNConfig
from brs_detr.models.detector import Detector, to_stored_images
from brs_detr.models.heads.roi import RoIHead
from brs_detr.models.heads.rpn import RPNHead
from brs_detr.models.neck import FPN, pyramid_strides
from brs_detr.ops.images import ImageBatch, Size


class FasterRCNN(Detector):
    """Backbone -> FPN -> RPN -> RoI head.

    Args:
        config: see `FasterRCNNConfig`.
        num_classes: K.
    """

    heads = ("roi",)

    def __init__(self, config: FasterRCNNConfig, num_classes: int) -> None:
        super().__init__(num_classes)
        self.backbone = build_backbone(config.backbone)
        pooled = self.backbone.strides
        self.strides = pyramid_strides(pooled, config.levels)
        self.neck = FPN(self.backbone.channels, config.dim, config.levels, "pool")
        self.rpn = RPNHead(config.dim, self.strides, config.rpn)
        self.roi = RoIHead(config.dim, num_classes, pooled, config.roi)

    def encode(self, x: Tensor, padding: Tensor) -> list[Tensor]:
        """Map normalized images (B, 3, H, W) to the maps (B, dim, h, w) of the pyramid, finest first."""
        maps: list[Tensor] = self.neck(self.backbone(x))
        return maps

    def losses(
        self, features: list[Tensor], sizes: Sequence[Size], targets: Sequence[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Compute the loss terms of both stages."""
        regions = self.rpn(features)
        heads = {
            "rpn": self.rpn.losses(regions, sizes, targets),
            "roi": self.roi.losses(features, self.rpn.proposals(regions, sizes), sizes, targets),
        }
        return {f"{name}.{term}": value for name, head in heads.items() for term, value in head.terms.items()}

    def detect(self, features: list[Tensor], images: ImageBatch) -> list[dict[str, Tensor]]:
        """Return the RoI head's detections in the frame of the stored images."""
        proposals = self.rpn.proposals(self.rpn(features), images.sizes)
        return to_stored_images(self.roi.predict(features, proposals, images.sizes), images)
