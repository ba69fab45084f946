"""Region proposal network (Ren et al., "Faster R-CNN", section 3.1) trained with any objective.

With a ranking objective every anchor takes part and boxes are learned by GIoU (Oksuz et al., "Rank & Sort Loss",
section 5); with binary cross entropy a random sample takes part and boxes are learned by L1 on the offsets, as Co-DETR
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from brs_detr.assign.assignment import HeadAssignment
from brs_detr.assign.max_iou import MaxIoUAssigner, RandomSampler
from brs_detr.models.heads.dense import DenseHead, DenseOutput, HeadLosses, Objective
from brs_detr.ops.anchors import AnchorGrid
from brs_detr.ops.boxes import BoxCoder
from brs_detr.ops.images import Size

OCTAVE_SCALES = (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3))


class RPNHead(DenseHead):
    """Class-agnostic proposals from a feature pyramid.

    The box loss and the quality label are computed on boxes decoded with this head's own coder, in pixels. The
    published rank-based head decodes around a unit box with other standard deviations, which squeezes all
    its IoU labels toward 1; that fault is not reproduced.

    Args:
        dim: channels of the feature maps.
        strides: pixels per cell of each map.
        scales: anchor sides in multiples of the stride.
        ratios: height over width of the anchors.
        objective: takes a `PredictionSet` with one class.
        box_loss: "giou" on decoded boxes (BRS-DETR) or "l1" on offsets (Co-DETR).
        sampler: chooses the anchors that take part in the loss; None takes all that are not ignored.
        coder_stds: standard deviations of the offsets.
        before_nms: best anchors of each level that enter suppression while training.
        keep: proposals per image while training.
        test_before_nms: as `before_nms`, in evaluation.
        test_keep: as `keep`, in evaluation.
        nms_iou: suppression threshold, level by level.
    """

    assigner: MaxIoUAssigner

    def __init__(
        self,
        dim: int,
        strides: Sequence[int],
        *,
        objective: Objective,
        scales: Sequence[float] = OCTAVE_SCALES,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        box_loss: Literal["giou", "l1"] = "giou",
        sampler: RandomSampler | None = None,
        coder_stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
        before_nms: int = 4000,
        keep: int = 4000,
        test_before_nms: int = 1000,
        test_keep: int = 1000,
        nms_iou: float = 0.7,
    ) -> None:
        super().__init__(
            1,
            AnchorGrid(strides, scales, ratios),
            objective=objective,
            # Faster R-CNN's thresholds
            assigner=MaxIoUAssigner(positive=0.7, negative=0.3, low_quality=0.3, sampler=sampler),
            coder=BoxCoder(coder_stds),
            box_loss=box_loss,
            before_nms=before_nms,
            score_threshold=None,
            drop_empty=True,  # the published rank-based head keeps empty boxes
            nms_iou=nms_iou,
            nms_within="level",
            max_detections=keep,
        )
        self.test_before_nms, self.test_keep = test_before_nms, test_keep
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.score = nn.Conv2d(dim, self.anchors.per_cell, 1)
        self.delta = nn.Conv2d(dim, self.anchors.per_cell * 4, 1)
        for layer in (self.conv, self.score, self.delta):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor]) -> DenseOutput:
        """Predict objectness and offsets of all anchors from feature maps (B, dim, h, w), one per stride."""
        hidden = [self.conv(x).relu() for x in features]
        logits = [rearrange(self.score(x), "b a y x -> b y x a 1") for x in hidden]
        deltas = [rearrange(self.delta(x), "b (a box) y x -> b y x a box", box=4) for x in hidden]
        return DenseOutput(logits, deltas)

    def losses(self, output: DenseOutput, sizes: Sequence[Size], targets: Sequence[dict]) -> HeadLosses:
        """Compute the losses as `DenseHead.losses` does; the classes of the targets are not used."""
        objects = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
        return super().losses(output, sizes, objects)

    def normalizer(self, assignment: HeadAssignment) -> Tensor | None:
        """Count the sampled anchors, of which each kind counts at least once an image, as in the published code."""
        if self.assigner.sampler is None:
            return None
        assert assignment.valid is not None  # a sampler ignores anchors
        images = zip(assignment.per_image(assignment.labels), assignment.per_image(assignment.valid), strict=True)
        counts = [((labels == kind) & valid).sum() for labels, valid in images for kind in (0, 1)]
        return torch.stack(counts).clamp(min=1).sum()

    def limits(self) -> tuple[int, int]:
        """Return larger limits while training."""
        if self.training:
            return self.before_nms, self.max_detections
        return self.test_before_nms, self.test_keep

    def proposals(self, output: DenseOutput, sizes: Sequence[Size]) -> list[Tensor]:
        """Propose boxes for each image: (n, 4) xyxy pixels, best first, detached."""
        return [found["boxes"] for found in self.predict(output, sizes)]
