"""Mask R-CNN's branch (He et al., "Mask R-CNN", section 3): a small mask of each region, trained on its positives only.

With a ranking loss the masks learn by Dice, which the RoI head's objective weighs by the boxes' scores and balances to
the ranking like its box loss (Oksuz et al., "Rank & Sort Loss", section 5); with cross entropy they learn by binary
cross entropy, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from brs_detr.assign.assignment import HeadAssignment, count_per_image
from brs_detr.assign.max_iou import random_permutation
from brs_detr.losses.objective import SubsetLoss
from brs_detr.models.heads.pooling import pool_rois
from brs_detr.models.rcnn_config import MaskConfig
from brs_detr.ops.images import Size
from brs_detr.ops.masks import dice_coefficient, mask_targets, paste_and_encode


class MaskHead(nn.Module):
    """Masks of twice `config.pool_size` cells a side, one for each class.

    Args:
        dim: channels of the feature maps, and of the convolutions.
        num_classes: object classes.
        strides: pixels per cell of the maps that are pooled from.
        config: see `MaskConfig`; its loss is decided.

    Raises:
        ValueError: it is not.
    """

    def __init__(self, dim: int, num_classes: int, strides: Sequence[int], config: MaskConfig) -> None:
        super().__init__()
        if config.loss == "auto":
            raise ValueError("mask head: its loss follows an objective. Give `MaskConfig.resolved(objective)`.")
        self.strides, self.pool, self.side = tuple(strides), config.pool_size, 2 * config.pool_size
        self.loss, self.max_masks = config.loss, config.max_masks
        self.permute: Callable[[int, torch.device], Tensor] = random_permutation  # tests replace it
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(config.stacked_convs))
        self.upsample = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.score = nn.Conv2d(dim, num_classes, 1)
        for layer in (*self.convs, self.upsample, self.score):
            # He et al.'s initialization, as in the published heads
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor], rois: Sequence[Tensor], classes: Tensor) -> Tensor:
        """Predict the mask of each RoI for one class.

        Args:
            features: (B, dim, h, w) per stride; further maps are not used.
            rois: per image (n_b, 4) xyxy pixels.
            classes: (N,) int64, N = sum of n_b.

        Returns:
            (N, side, side) logits.
        """
        x, order, back = pool_rois(features, rois, self.strides, self.pool)
        for conv in self.convs:
            x = conv(x).relu()
        x = self.score(self.upsample(x).relu())
        # The rows lie in level order. One class of each is put back: that copies 1 / C of the masks.
        own = x.gather(1, classes[order, None, None, None].expand(-1, 1, *x.shape[2:]))[:, 0]
        return own[back]

    def losses(
        self, features: Sequence[Tensor], assignment: HeadAssignment, targets: Sequence[dict]
    ) -> dict[str, SubsetLoss]:
        """Compute the losses of the positives' masks, the `branch` of `RoIHead.losses`.

        Args:
            features: (B, dim, h, w) per stride.
            assignment: of the RoI head.
            targets: per image {"boxes": (M, 4), "masks": (M, h, w) bitmaps of its objects}.

        Returns:
            {"mask": one value for each of at most `max_masks` positives, chosen at random}, attached to the graph also
            without a positive.
        """
        rows, device = assignment.rows, assignment.rows.device
        chosen = torch.arange(len(rows), device=device)
        if len(rows) > self.max_masks:
            # Sorted, since the rows of an image lie together. From here on `chosen` is the only order there is: it
            # selects RoIs, classes, objects and, in the objective, scores.
            chosen = self.permute(len(rows), device)[: self.max_masks].sort()[0]
        rois, counts = self._chosen_rois(assignment, rows[chosen])
        assert assignment.matched_idxs is not None  # `RoIHead.assign` gives them
        wanted = self._targets(rois, assignment.matched_idxs[chosen].split(counts), targets)
        logits = self(features, rois, assignment.labels[rows[chosen]])
        with torch.autocast(device.type, enabled=False):
            return {"mask": SubsetLoss(self.compare(logits.float(), wanted), chosen)}

    def _chosen_rois(self, assignment: HeadAssignment, rows: Tensor) -> tuple[list[Tensor], list[int]]:
        """Return the RoIs (n, 4) of ascending rows of a batch, image by image, and their numbers."""
        boxes, counts = torch.cat(assignment.references), assignment.counts
        if counts is None or len(rows) < len(assignment.rows):
            counts = count_per_image(rows, [len(own) for own in assignment.references])
        return list(boxes[rows].split(counts)), counts

    def _targets(self, rois: Sequence[Tensor], objects: Sequence[Tensor], targets: Sequence[dict]) -> Tensor:
        """Cut the bitmaps of objects, counted through all images, to their RoIs: (S, side, side)."""
        cut, start = [], 0
        for boxes, own, target in zip(rois, objects, targets, strict=True):
            cut.append(mask_targets(target["masks"], boxes, own - start, self.side))
            start += len(target["boxes"])
        return torch.cat(cut)

    def compare(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss (S,) of each mask: 1 - Dice, or the mean binary cross entropy of its cells."""
        if self.loss == "dice":
            return 1 - dice_coefficient(logits.sigmoid(), targets)
        losses: Tensor = binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return losses.mean(dim=(1, 2))

    @torch.no_grad()
    def predict(self, features: Sequence[Tensor], detections: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Add "masks" (n, side, side), probabilities inside their boxes, to the detections of each image.

        Args:
            features: (B, dim, h, w) per stride.
            detections: per image {"boxes": (n, 4) xyxy pixels of the input, "labels": (n,)} and more.
        """
        labels = torch.cat([found["labels"] for found in detections])
        masks = self(features, [found["boxes"] for found in detections], labels).float().sigmoid()
        counts = [len(found["labels"]) for found in detections]
        return [{**found, "masks": own} for found, own in zip(detections, masks.split(counts), strict=True)]


def paste_detections(detections: Sequence[dict], sizes: Sequence[Size], threshold: float = 0.5) -> list[dict]:
    """Replace the small masks of `MaskHead.predict` by COCO's compressed run lengths.

    Args:
        detections: per image {"boxes": (n, 4) xyxy pixels, "masks": (n, side, side)} and more.
        sizes: (h, w) pixels of the images in whose pixels the boxes are, usually the stored ones.
        threshold: a pixel belongs to the object where its probability is at least this.
    """
    return [
        {**found, "masks": paste_and_encode(found["masks"], found["boxes"], size, threshold)}
        for found, size in zip(detections, sizes, strict=True)
    ]
