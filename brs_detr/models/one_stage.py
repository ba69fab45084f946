"""One-stage CNN detectors: a backbone, a feature pyramid and a head that predicts at every cell of it.

RetinaNet (Lin et al., 2017), FoveaBox (Kong et al., 2020), ATSS (Zhang et al., 2020) and PAA (Kim and Lee, 2020)
differ in the head and in where the coarsest maps come from; each is built in a few lines here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from brs_detr.models.backbones.timm_backbone import build_backbone
from brs_detr.models.detector import Detector, to_stored_images
from brs_detr.models.heads.atss import ATSSHead
from brs_detr.models.heads.dense import DenseHead
from brs_detr.models.heads.fovea import FoveaHead
from brs_detr.models.heads.paa import PAAHead
from brs_detr.models.heads.retinanet import RetinaNetHead
from brs_detr.models.heads.solov2 import SOLOv2Head
from brs_detr.models.neck import FPN, ExtraLevels, pyramid_strides
from brs_detr.models.one_stage_config import ATSSConfig, FoveaBoxConfig, OneStageConfig, PAAConfig, RetinaNetConfig
from brs_detr.ops.images import ImageBatch, Size


class OneStageDetector(Detector):
    """Backbone -> FPN -> head.

    Args:
        config: see `OneStageConfig`.
        num_classes: K.
        extra: what the pyramid's further maps are made from, see `FPN`.
        make_head: called with the strides of the pyramid's maps.
    """

    heads = ("head",)
    by_anchor = ("head.score.weight", "head.score.bias")

    def __init__(
        self,
        config: OneStageConfig,
        num_classes: int,
        extra: ExtraLevels,
        make_head: Callable[[Sequence[int]], DenseHead | SOLOv2Head],
    ) -> None:
        super().__init__(num_classes)
        self.backbone = build_backbone(config.backbone)
        self.strides = pyramid_strides(self.backbone.strides, config.levels)
        # No ReLU between the extra maps: so are the pyramids with which the ranking losses were published.
        self.neck = FPN(self.backbone.channels, config.dim, config.levels, extra, relu=False)
        self.head = make_head(self.strides)

    def encode(self, x: Tensor, padding: Tensor) -> list[Tensor]:
        """Map normalized images (B, 3, H, W) to the maps (B, dim, h, w) of the pyramid, finest first."""
        maps: list[Tensor] = self.neck(self.backbone(x))
        return maps

    def losses(
        self, features: list[Tensor], sizes: Sequence[Size], targets: Sequence[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Compute the head's loss terms."""
        terms = self.head.losses(self.head(features), sizes, targets).terms
        return {f"head.{name}": value for name, value in terms.items()}

    def detect(self, features: list[Tensor], images: ImageBatch, head: str | None = None) -> list[dict[str, Tensor]]:
        """Return the head's detections in the frame of the stored images."""
        return to_stored_images(self.head.predict(self.head(features), images.sizes), images)


def build_retinanet(config: RetinaNetConfig, num_classes: int) -> OneStageDetector:
    """Build RetinaNet; P6 and P7 are made from the last map of the backbone."""
    return OneStageDetector(
        config, num_classes, "c5", lambda strides: RetinaNetHead(config.dim, num_classes, strides, config.head)
    )


def build_foveabox(config: FoveaBoxConfig, num_classes: int) -> OneStageDetector:
    """Build FoveaBox; P6 and P7 are made from the last map of the backbone."""
    return OneStageDetector(
        config, num_classes, "c5", lambda strides: FoveaHead(config.dim, num_classes, strides, config.head)
    )


def build_atss(config: ATSSConfig, num_classes: int) -> OneStageDetector:
    """Build ATSS; P6 and P7 are made from P5."""
    groups = config.norm_groups
    return OneStageDetector(
        config, num_classes, "p5", lambda strides: ATSSHead(config.dim, num_classes, strides, config.head, groups)
    )


def build_paa(config: PAAConfig, num_classes: int) -> OneStageDetector:
    """Build PAA; P6 and P7 are made from P5."""
    groups = config.norm_groups
    return OneStageDetector(
        config, num_classes, "p5", lambda strides: PAAHead(config.dim, num_classes, strides, config.head, groups)
    )
