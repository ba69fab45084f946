"""One-stage detectors of masks: YOLACT (Bolya et al., 2019) and SOLOv2 (Wang et al., 2020).

Both predict masks of the whole padded batch, at a quarter of its sides, and not of regions: their heads need its size,
and their masks are enlarged to the stored image at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from brs_detr.models.detector import to_stored_images
from brs_detr.models.heads.solov2 import SOLOv2Head
from brs_detr.models.heads.yolact import YOLACTHead
from brs_detr.models.one_stage import OneStageDetector
from brs_detr.models.one_stage_config import SOLOv2Config, YOLACTConfig
from brs_detr.ops.images import ImageBatch, Size
from brs_detr.ops.masks import paste_and_encode
from brs_detr.ops.rle import RLE, boxes_of


class OneStageMaskDetector(OneStageDetector):
    """Backbone -> FPN -> a head that predicts masks of the padded batch; boxes too, or they are put around the masks.

    Detections have also "masks", a list of compressed run lengths of the stored image. Training needs masks: targets
    with "masks" (n, h, w), bitmaps of the resized image.
    """

    def encode(self, x: Tensor, padding: Tensor) -> Any:
        """Map normalized images (B, 3, H, W) to the maps of the pyramid, finest first, and (H, W)."""
        return super().encode(x, padding), (x.shape[2], x.shape[3])

    def losses(self, features: Any, sizes: Sequence[Size], targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Compute the head's loss terms."""
        terms = self.head.losses(self.head(*features), sizes, targets).terms
        return {f"head.{name}": value for name, value in terms.items()}

    def detect(self, features: Any, images: ImageBatch, head: str | None = None) -> list[dict[str, Any]]:
        """Return the head's detections, their masks and boxes in the frame of the stored images."""
        found = self.head.predict(self.head(*features), images.sizes)
        masks = [self.masks_of_stored_image(own, images, image) for image, own in enumerate(found)]
        if found and "boxes" in found[0]:
            boxes = to_stored_images(found, images)
            return [{**own, "masks": rles} for own, rles in zip(boxes, masks, strict=True)]
        return [_with_boxes(own, rles) for own, rles in zip(found, masks, strict=True)]

    def masks_of_stored_image(self, found: dict[str, Tensor], images: ImageBatch, image: int) -> list[RLE]:
        """Enlarge the masks (n, h, w) of the padded batch to one image as stored, cut off its padding, encode them."""
        (height, width), (h, w), stored = images.padded_size, images.sizes[image], images.original_sizes[image]
        masks = found["masks"]
        # where the padded batch would lie in the stored image
        cover = torch.tensor([0.0, 0.0, width * stored[1] / w, height * stored[0] / h], device=masks.device)
        return paste_and_encode(masks, cover.expand(len(masks), 4), stored, beyond="border")


def _with_boxes(found: dict[str, Tensor], masks: list[RLE]) -> dict[str, Any]:
    """Put boxes around the masks, and drop the empty ones, which lie in the padding."""
    boxes = torch.from_numpy(boxes_of(masks))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero()[:, 0]
    device = found["scores"].device
    index = kept.to(device)
    return {
        "boxes": boxes[kept].to(device),
        "scores": found["scores"][index],
        "labels": found["labels"][index],
        "masks": [masks[i] for i in kept.tolist()],
    }


def build_yolact(config: YOLACTConfig, num_classes: int) -> OneStageMaskDetector:
    """Build YOLACT; P6 and P7 are made from the last map of the backbone."""
    return OneStageMaskDetector(
        config, num_classes, "c5", lambda strides: YOLACTHead(config.dim, num_classes, strides, config.head)
    )


def build_solov2(config: SOLOv2Config, num_classes: int) -> OneStageMaskDetector:
    """Build SOLOv2; P6 is every second cell of P5, and masks are made from the maps of the backbone's levels."""
    levels = len(config.backbone.levels)
    return OneStageMaskDetector(
        config, num_classes, "pool", lambda strides: SOLOv2Head(config.dim, num_classes, strides, levels, config.head)
    )
