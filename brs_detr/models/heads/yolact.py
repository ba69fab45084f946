"""YOLACT's head: boxes and classes from anchors, and masks as sums of prototypes that all anchors share.

Source: Bolya et al., "YOLACT: Real-time Instance Segmentation", ICCV 2019; trained with Rank & Sort as by Oksuz et
al., "Rank & Sort Loss", ICCV 2021, supplement S3.4: class-wise sigmoids in one ranking, no hard negative mining, no
semantic branch, GIoU and Dice instead of smooth L1 and pixel-wise cross entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

from brs_detr.assign.assignment import HeadAssignment, count_per_image
from brs_detr.assign.max_iou import MaxIoUAssigner
from brs_detr.models.heads.dense import DenseHead, DenseOutput, PrototypeMasks, build_objective
from brs_detr.models.one_stage_config import YOLACTHeadConfig
from brs_detr.ops.anchors import AnchorGrid, batch_rows, frame_extents
from brs_detr.ops.boxes import BoxCoder, fast_nms
from brs_detr.ops.images import Size
from brs_detr.ops.masks import dice_coefficient, inside_boxes, require_masks, shrink_masks

BORDER = 1.0  # cells of the prototypes by which a mask may stick out of its box, which is rarely exact


class Protonet(nn.Module):
    """Prototypes (B, K, 2h, 2w) from the finest map (B, dim, h, w) of the pyramid (section 3.1, figure 3)."""

    def __init__(self, dim: int, prototypes: int) -> None:
        super().__init__()
        self.before = nn.Sequential(
            *(part for _ in range(3) for part in (nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU()))
        )
        self.after = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, prototypes, 1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return prototypes of twice the sides of the map; none is negative."""
        prototypes: Tensor = self.after(F.interpolate(self.before(x), scale_factor=2, mode="bilinear"))
        return prototypes


class YOLACTHead(DenseHead):
    """Classes, boxes and mask coefficients from one convolution that all levels share; prototypes from the finest one.

    An object's best anchor is positive however little it overlaps; of several equal ones only the first is. The mask of
    a positive is the sigmoid of its sum of prototypes, cut to its object's box and one cell around it.

    Args:
        dim: channels of the feature maps.
        num_classes: C.
        strides: nominal pixels per cell of each map, which give the anchors' sizes. Their centers divide the padded
            batch evenly, as published: at 550 pixels the coarsest map has a cell per 110 pixels, not 128.
        config: see `YOLACTHeadConfig`.
    """

    def __init__(self, dim: int, num_classes: int, strides: Sequence[int], config: YOLACTHeadConfig) -> None:
        anchors = AnchorGrid(strides, (config.anchor_scale,), config.anchor_ratios, offset=0.5)
        super().__init__(
            num_classes,
            anchors,
            objective=build_objective(config.objective),
            assigner=MaxIoUAssigner(config.positive_iou, config.negative_iou, low_quality=0.0, first_best=True),
            coder=BoxCoder((0.1, 0.1, 0.2, 0.2)),
            before_nms=config.before_nms,
            score_threshold=config.score_threshold,
            nms_iou=config.nms_iou,
            max_detections=config.max_detections,
        )
        self.label = config.label
        self.shared = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU())
        self.score = nn.Conv2d(dim, anchors.per_cell * num_classes, 3, padding=1)
        self.delta = nn.Conv2d(dim, anchors.per_cell * 4, 3, padding=1)
        self.coefficient = nn.Conv2d(dim, anchors.per_cell * config.prototypes, 3, padding=1)
        self.protonet = Protonet(dim, config.prototypes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):  # no prior in the classes' bias, as published
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor], frame: Size) -> DenseOutput:
        """Predict from feature maps (B, dim, h, w) of a padded batch of (h, w) = `frame` pixels."""
        hidden = [self.shared(x) for x in features]

        def rows(layer: nn.Conv2d, columns: int) -> list[Tensor]:
            return [rearrange(layer(x), "b (a c) y x -> b y x a c", c=columns) for x in hidden]

        coefficients = [
            x.tanh() for x in rows(self.coefficient, self.coefficient.out_channels // self.anchors.per_cell)
        ]
        return DenseOutput(
            rows(self.score, self.num_classes),
            [delta.float() for delta in rows(self.delta, 4)],
            masks=PrototypeMasks(coefficients, self.protonet(features[0]), frame),
        )

    def place(self, output: DenseOutput) -> list[Tensor]:
        """Return the anchors of every level, whose cells divide the padded batch evenly."""
        anchors: list[Tensor] = self.anchors(output.shapes, _masks(output).frame)
        return anchors

    def extents(self, output: DenseOutput, sizes: Sequence[Size]) -> list[list[Size]]:
        """Count the (rows, columns) of each level that lie inside each image."""
        return [frame_extents(size, output.shapes, _masks(output).frame) for size in sizes]

    def assign(self, output: DenseOutput, extents: Sequence[Sequence[Size]], targets: Sequence[dict]) -> HeadAssignment:
        """As `DenseHead.assign`, with the objects' bitmaps, "masks" (M, h, w) of the targets."""
        require_masks(targets)
        assignment = super().assign(output, extents, targets)
        return assignment._replace(masks=[target["masks"] for target in targets])

    def positive_losses(
        self, output: DenseOutput, extents: Sequence[Sequence[Size]], assignment: HeadAssignment
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the masks' Dice losses; the setting `label` chooses the quality (Table S6)."""
        iou, losses = super().positive_losses(output, extents, assignment)
        dice = self.dice(output, extents, assignment)
        known = dice.detach()
        quality = {"iou": iou, "dice": known, "mean": (iou + known) / 2, "binary": torch.ones_like(iou)}[self.label]
        return quality, {**losses, "mask": 1 - dice}

    def dice(self, output: DenseOutput, extents: Sequence[Sequence[Size]], assignment: HeadAssignment) -> Tensor:
        """Compute the Dice coefficient (P,) of each positive's mask and its object's, in the order of the positives."""
        predicted, rows = _masks(output), assignment.rows
        assert assignment.masks is not None and assignment.matched_idxs is not None  # those of `assign`
        coefficients = batch_rows(predicted.coefficients, extents)[rows]
        counts = count_per_image(rows, [len(own) for own in assignment.references])
        frame, size = predicted.frame, (predicted.prototypes.shape[2], predicted.prototypes.shape[3])
        scale = torch.tensor([size[1] / frame[1], size[0] / frame[0]] * 2, dtype=assignment.targets.dtype)
        scale = scale.to(assignment.targets.device, non_blocking=True)
        start, values = 0, []
        columns = (coefficients, assignment.matched_idxs, assignment.targets * scale)
        for prototypes, bitmaps, own in zip(
            predicted.prototypes, assignment.masks, zip(*(column.split(counts) for column in columns)), strict=True
        ):
            weights, objects, boxes = own
            masks = combine(weights, prototypes, boxes)
            values.append(dice_coefficient(masks, shrink_masks(bitmaps, frame, size)[objects - start]))
            start += len(bitmaps)
        return torch.cat(values)

    @torch.no_grad()
    def predict(self, output: DenseOutput, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        """Detect objects, best first, per image.

        Returns:
            {"boxes": (n, 4) xyxy pixels of the input, "scores": (n,), "labels": (n,), "masks": (n, H, W) probabilities
            over the padded batch, 0 outside of the boxes}.
        """
        predicted = _masks(output)
        size = (predicted.prototypes.shape[2], predicted.prototypes.shape[3])
        logits, deltas, coefficients = (
            torch.cat([level.flatten(1, 3) for level in levels], dim=1)
            for levels in (output.logits, output.deltas, predicted.coefficients)
        )
        boxes = self.coder.decode(torch.cat([level.reshape(-1, 4) for level in self.place(output)]), deltas)
        scores = logits.float().sigmoid()
        scale = boxes.new_tensor([size[1] / predicted.frame[1], size[0] / predicted.frame[0]] * 2)
        detections = []
        for image, (h, w) in enumerate(sizes):
            own = clip_boxes_to_image(boxes[image], (h, w))
            row, label = self.choose(own, scores[image])
            masks = combine(coefficients[image, row], predicted.prototypes[image], own[row] * scale)
            found: dict[str, Any] = {"boxes": own[row], "scores": scores[image, row, label], "labels": label}
            detections.append({**found, "masks": masks})
        return detections

    def choose(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows and classes of one image's detections among boxes (n, 4) with scores (n, C)."""
        return fast_nms(
            boxes,
            scores,
            nms_iou=self.nms_iou,
            per_class=self.before_nms,
            score_threshold=-1.0 if self.score_threshold is None else self.score_threshold,
            max_detections=self.max_detections,
        )


def combine(coefficients: Tensor, prototypes: Tensor, boxes: Tensor) -> Tensor:
    """Make masks (n, h, w) of prototypes (K, h, w) by coefficients (n, K), 0 outside of boxes (n, 4) in cells."""
    masks = torch.einsum("nk,khw->nhw", coefficients, prototypes).float().sigmoid()
    return masks * inside_boxes(boxes, (prototypes.shape[1], prototypes.shape[2]), BORDER)


def _masks(output: DenseOutput) -> PrototypeMasks:
    """Return the part of YOLACT's output that other heads do not have."""
    assert output.masks is not None
    return output.masks
