"""Two-stage CNN detectors: a backbone, a feature pyramid, region proposals and heads that look at each region.

Faster R-CNN (Ren et al., 2015) on a pyramid (Lin et al., 2017), Cascade R-CNN (Cai and Vasconcelos, 2018), whose
second stage is three heads in a row, and Mask R-CNN (He et al., 2017), which also predicts a mask of each object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from brs_detr.models.backbones.timm_backbone import build_backbone
from brs_detr.models.detector import Detector, to_stored_images
from brs_detr.models.heads.cascade import CascadeHead
from brs_detr.models.heads.mask import MaskHead, paste_detections
from brs_detr.models.heads.roi import RoIHead
from brs_detr.models.heads.rpn import RPNHead
from brs_detr.models.heads.step import DenseStep, RegionStep, read_counts
from brs_detr.models.neck import FPN, pyramid_strides
from brs_detr.models.rcnn_config import CascadeConfig, MaskRCNNConfig, TwoStageConfig
from brs_detr.ops.images import ImageBatch, Size


class TwoStageDetector(Detector):
    """Backbone -> FPN -> RPN -> RoI head, or several of them, and optionally a mask head.

    Args:
        config: see `TwoStageConfig`; its class says what the second stage is.
        num_classes: K.
    """

    heads = ("roi",)

    def __init__(self, config: TwoStageConfig, num_classes: int) -> None:
        super().__init__(num_classes)
        self.backbone = build_backbone(config.backbone)
        pooled = self.backbone.strides
        self.strides = pyramid_strides(pooled, config.levels)
        self.neck = FPN(self.backbone.channels, config.dim, config.levels, "pool")
        self.rpn = RPNHead(config.dim, self.strides, config.rpn)
        self.roi: RoIHead | CascadeHead
        if isinstance(config.roi, CascadeConfig):
            self.roi = CascadeHead(config.dim, num_classes, pooled, config.roi)
        else:
            self.roi = RoIHead(config.dim, num_classes, pooled, config.roi)
        self.mask = None
        if isinstance(config, MaskRCNNConfig):
            self.mask = MaskHead(config.dim, num_classes, pooled, config.mask.resolved(config.roi.objective))

    def encode(self, x: Tensor, padding: Tensor) -> list[Tensor]:
        """Map normalized images (B, 3, H, W) to the maps (B, dim, h, w) of the pyramid, finest first."""
        maps: list[Tensor] = self.neck(self.backbone(x))
        return maps

    def losses(
        self, features: list[Tensor], sizes: Sequence[Size], targets: Sequence[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Compute the loss terms of both stages."""
        anchors = self.rpn(features)
        regions = self.rpn.regions(anchors, sizes)
        steps: dict[str, DenseStep | RegionStep] = {"rpn": DenseStep(self.rpn, anchors, sizes, targets)}
        if isinstance(self.roi, RoIHead):
            branch = None if self.mask is None else self.mask.losses
            steps["roi"] = RegionStep(self.roi, features, regions.never_empty(sizes), sizes, targets, branch)
        read_counts(steps.values())
        losses = {name: step.losses() for name, step in steps.items()}
        if isinstance(self.roi, CascadeHead):  # a stage begins with what the one before made of its regions
            losses["roi"] = self.roi.losses(features, regions.per_image(), sizes, targets).terms
        return {f"{name}.{term}": value for name, terms in losses.items() for term, value in terms.items()}

    def detect(self, features: list[Tensor], images: ImageBatch, head: str | None = None) -> list[dict[str, Tensor]]:
        """Return the detections in the frame of the stored images; "masks" are COCO's compressed run lengths."""
        proposals = self.rpn.proposals(self.rpn(features), images.sizes)
        detections = self.roi.predict(features, proposals, images.sizes)
        if self.mask is None:
            return to_stored_images(detections, images)
        with_masks = to_stored_images(self.mask.predict(features, detections), images)
        return paste_detections(with_masks, images.original_sizes)
