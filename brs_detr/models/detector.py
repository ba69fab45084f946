"""Base class of all detectors: loss terms in training mode, detections in eval mode.

A detector adds `encode` (normalized images to feature maps), `losses` and `detect`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import clip_boxes_to_image

from brs_detr.models.config import HardNMS, NMSConfig, NoNMS, SoftNMS
from brs_detr.models.ensemble import Ensemble
from brs_detr.models.views import detect_in_views
from brs_detr.ops.boxes import suppress
from brs_detr.ops.images import ImageBatch, ImageViews, Size
from brs_detr.ops.soft_nms import decay, survives
from brs_detr.ops.targets import check_targets

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class Detector(nn.Module):
    """Base of all detectors.

    Args:
        num_classes: K.

    Attributes:
        heads: names of the heads whose detections `predict_with` can ask for; the first is the default.
        overlapping: those of them whose detections may overlap: without suppression of their own.
        objectness: names of tensors whose first row scores any object, whatever the classes: fine-tuning on other
            classes keeps that row.
        by_anchor: names of tensors whose rows are those of one anchor after the other, each with all classes. The rows
            of other tensors that depend on the classes are those of one class after the other.
        strides: pixels per cell of the feature maps, finest first.
    """

    heads: tuple[str, ...] = ("detector",)
    overlapping: tuple[str, ...] = ()
    objectness: tuple[str, ...] = ()
    by_anchor: tuple[str, ...] = ()
    strides: tuple[int, ...] = ()
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._predict_with = self.heads[0]
        self._nms: NMSConfig = NoNMS()
        self.ensemble: Ensemble | None = None  # what a validation has learned of the heads
        self.test_flip = False  # detect in mirrored images, too
        self.test_scales: tuple[int, ...] = ()  # what images are resized to before they come here; for the record
        self.test_canvas: int | None = None  # side of the square on which they come, likewise
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)

    @property
    def predict_with(self) -> str:
        """Name of the head whose detections are returned; "ensemble" for those of all heads, joined."""
        return self._predict_with

    @predict_with.setter
    def predict_with(self, name: str) -> None:
        """Choose the head; "auto" is the detector's own choice.

        Raises:
            ValueError: the detector has no such head.
        """
        joined = ("ensemble",) if len(self.heads) > 1 else ()
        if name not in ("auto", *self.heads, *joined):
            raise ValueError(f"eval.predict_with={name}: this detector has {', '.join(self.heads)}. Use auto.")
        self._predict_with = self.heads[0] if name == "auto" else name

    @property
    def nms(self) -> NMSConfig:
        """Suppression of the detections of `overlapping` heads."""
        return self._nms

    @nms.setter
    def nms(self, nms: NMSConfig) -> None:
        """Choose the suppression.

        Raises:
            ValueError: every head of the detector suppresses already.
        """
        if not isinstance(nms, NoNMS) and not self.overlapping:
            raise ValueError(
                f"eval.nms.kind={nms.kind}: this detector suppresses already, by the nms_iou of its head. Use none."
            )
        self._nms = nms

    def forward(
        self, images: ImageBatch | ImageViews | Sequence[Tensor], targets: Sequence[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute the losses in training mode, the detections in eval mode.

        Args:
            images: a padded batch, or a list of (3, h, w) RGB tensors in 0..255; in eval mode also several sizes of a
                batch.
            targets: in training one dict an image: `boxes` (n, 4) xyxy pixels, `labels` (n,) in 0..K-1.

        Returns:
            Training: named loss terms whose sum is the loss. Eval: one dict an image, `boxes` (n, 4) xyxy pixels of
            the stored image, `scores` (n,), `labels` (n,).

        Raises:
            ValueError: in training without targets, or where `check_targets` refuses them.
        """
        batch = images if isinstance(images, ImageBatch | ImageViews) else ImageBatch.from_list(images)
        if not self.training:
            return self.predict(batch)
        if targets is None:
            raise ValueError("training needs targets: call model(images, targets), or model.eval() to predict")
        if isinstance(batch, ImageViews):
            raise ValueError("training has one size of each image: several are for model.eval()")
        check_targets(targets, self.num_classes)
        return self.losses(self.encode_batch(batch), batch.sizes, targets)

    def encode_batch(self, batch: ImageBatch) -> Any:
        """Normalize a batch and encode it."""
        padding = batch.padding_mask()
        return self.encode(self.normalize(batch.pixels, padding), padding)

    def normalize(self, pixels: Tensor, padding: Tensor) -> Tensor:
        """Map (B, 3, H, W) in 0..255 to zero mean and unit deviation; padding is 0 after, not before."""
        x = (pixels.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        return x.masked_fill(padding[:, None], 0.0)

    @abstractmethod
    def encode(self, x: Tensor, padding: Tensor) -> Any:
        """Encode normalized images (B, 3, H, W), with their padding (B, H, W), to what the heads read."""

    @abstractmethod
    def losses(self, features: Any, sizes: Sequence[Size], targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Compute the named loss terms of a step, weighted, from `encode`'s result.

        Args:
            features: of `encode`.
            sizes: (h, w) of each image inside the padding.
            targets: as for `forward`.
        """

    @abstractmethod
    def detect(self, features: Any, images: ImageBatch, head: str | None = None) -> list[dict[str, Tensor]]:
        """Return the detections of each image in the frame of the stored image, from `encode`'s result.

        Args:
            features: of `encode`.
            images: that the features are of.
            head: whose detections; None: that of `predict_with`, which is not "ensemble".
        """

    def predict(self, images: ImageBatch | ImageViews) -> list[dict[str, Tensor]]:
        """Return the detections of the head of `predict_with`, or those of all heads joined.

        They are those of all sizes of the images, and with `test_flip` of the mirrored ones, too.

        Raises:
            ValueError: all heads are wanted, but no validation has learned how to compare their scores.
        """
        if self.predict_with != "ensemble":
            detections = self._in_views(lambda view: {"": self.detect(self.encode_batch(view), view)}, images)
            return detections[""]
        if self.ensemble is None:
            raise ValueError("eval.predict_with=ensemble: no validation has scored the heads of these weights")
        by_head = self.detect_with_all_heads(images)
        return [
            self.ensemble.join({head: found[image] for head, found in by_head.items()}, self.join_iou)
            for image in range(len(images))
        ]

    @property
    def join_iou(self) -> float:
        """Overlap above which detections of several heads or views are one: that of `nms`, or its default."""
        return self.nms.iou if isinstance(self.nms, HardNMS) else HardNMS().iou

    def detect_with_all_heads(self, images: ImageBatch | ImageViews) -> dict[str, list[dict[str, Tensor]]]:
        """Return the detections of every head by its name, as in eval mode, from features that are computed once."""

        def detect(view: ImageBatch) -> dict[str, list[dict[str, Tensor]]]:
            features = self.encode_batch(view)
            return {head: self.detect(features, view, head) for head in self.heads}

        return self._in_views(detect, images)

    def _in_views(
        self, detect: Callable[[ImageBatch], dict[str, list[dict[str, Tensor]]]], images: ImageBatch | ImageViews
    ) -> dict[str, list[dict[str, Tensor]]]:
        return detect_in_views(detect, images, flip=self.test_flip, nms_iou=self.join_iou)


def to_stored_images(detections: Sequence[dict[str, Tensor]], images: ImageBatch) -> list[dict[str, Tensor]]:
    """Scale boxes (n, 4) xyxy from the pixels of the resized images to those of the stored ones."""
    scaled = []
    for result, (h, w), (full_h, full_w) in zip(detections, images.sizes, images.original_sizes, strict=True):
        factor = result["boxes"].new_tensor([full_w / w, full_h / h, full_w / w, full_h / h])
        scaled.append({**result, "boxes": result["boxes"] * factor})
    return scaled


def without_overlaps(
    detections: Sequence[dict[str, Tensor]], sizes: Sequence[Size], nms: NMSConfig, max_detections: int | None = None
) -> list[dict[str, Tensor]]:
    """Drop detections of a class that overlap better ones, or lower their scores.

    Args:
        detections: of each image `boxes` (n, 4) xyxy pixels, `scores` (n,) and `labels` (n,).
        sizes: (h, w) pixels of the images.
        nms: what is done; nothing for `NoNMS`.
        max_detections: most that are kept of an image; None: all.

    Returns:
        The same of those that are left; best first, but for `NoNMS`.
    """
    if isinstance(nms, NoNMS):
        return [{key: value[:max_detections] for key, value in own.items()} for own in detections]
    if isinstance(nms, SoftNMS):
        return _softened(detections, sizes, nms, max_detections)
    return [
        suppress(
            own["boxes"],
            own["scores"],
            own["labels"],
            size,
            nms_iou=nms.iou,
            max_detections=len(own["scores"]) if max_detections is None else max_detections,
        )
        for own, size in zip(detections, sizes, strict=True)
    ]


def _softened(
    detections: Sequence[dict[str, Tensor]], sizes: Sequence[Size], nms: SoftNMS, max_detections: int | None
) -> list[dict[str, Tensor]]:
    """Apply Soft-NMS to all images at once; arguments as of `without_overlaps`."""
    clipped = [clip_boxes_to_image(own["boxes"], size) for own, size in zip(detections, sizes, strict=True)]
    boxes, labels = pad_sequence(clipped, True), pad_sequence([own["labels"] for own in detections], True)
    scores = pad_sequence([own["scores"] for own in detections], True, padding_value=-1.0)
    rows, decayed = decay(boxes, scores, labels, iou=nms.iou, max_detections=max_detections)
    kept = survives(decayed, nms.min_score)
    return [
        {"boxes": own_boxes[row[keep]], "scores": score[keep], "labels": own_labels[row[keep]]}
        for own_boxes, own_labels, row, score, keep in zip(boxes, labels, rows, decayed, kept, strict=True)
    ]
