"""Region proposal network (Ren et al., "Faster R-CNN", section 3.1) trained with any objective.

With a ranking objective every anchor takes part and boxes are learned by GIoU (Oksuz et al., "Rank & Sort Loss",
section 5); with binary cross entropy a random sample takes part and boxes are learned by L1 on the offsets, as Faster
R-CNN and Co-DETR do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from brs_detr.assign.assignment import BatchAssignment, HeadAssignment, join
from brs_detr.assign.max_iou import MaxIoUAssigner, RandomSampler
from brs_detr.models.config import RPNConfig
from brs_detr.models.heads.dense import DenseHead, DenseOutput, build_objective
from brs_detr.ops.anchors import AnchorGrid, inside_image, octave_scales, take_rows
from brs_detr.ops.boxes import BoxCoder, Regions, clip_boxes, kept_in_segments
from brs_detr.ops.images import Size


class RPNHead(DenseHead):
    """Class-agnostic proposals from a feature pyramid.

    The box loss and the quality label are computed on boxes decoded with this head's own coder, in pixels. The
    published rank-based head decodes around a unit box with other standard deviations, which squeezes all
    its IoU labels toward 1; that fault is not reproduced.

    Args:
        dim: channels of the feature maps.
        strides: pixels per cell of each map.
        config: see `RPNConfig`.
    """

    assigner: MaxIoUAssigner

    def __init__(self, dim: int, strides: Sequence[int], config: RPNConfig) -> None:
        sampler = None if config.sample is None else RandomSampler(config.sample, positive_fraction=0.5)
        super().__init__(
            1,
            AnchorGrid(strides, octave_scales(config.anchor_scale, config.scales_per_octave), config.anchor_ratios),
            objective=build_objective(config.objective),
            # Faster R-CNN's thresholds
            assigner=MaxIoUAssigner(positive=0.7, negative=0.3, low_quality=0.3, sampler=sampler),
            coder=BoxCoder(config.coder_stds),
            box_loss=config.box_loss,
            beta=config.beta,
            before_nms=config.proposals_before_nms,
            score_threshold=None,
            drop_empty=True,  # the published rank-based head keeps empty boxes
            nms_iou=config.nms_iou,
            nms_within="level",
            max_detections=config.proposals,
        )
        self.allowed_border = config.allowed_border
        self.test_limits = (config.test_proposals_before_nms, config.test_proposals)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.score = nn.Conv2d(dim, self.anchors.per_cell, 1)
        self.delta = nn.Conv2d(dim, self.anchors.per_cell * 4, 1)
        for layer in (self.conv, self.score, self.delta):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        assert self.score.bias is not None
        nn.init.constant_(self.score.bias, math.log(config.prior / (1 - config.prior)))

    def forward(self, features: Sequence[Tensor]) -> DenseOutput:
        """Predict objectness and offsets of all anchors from feature maps (B, dim, h, w), one per stride."""
        hidden = [self.conv(x).relu() for x in features]
        logits = [rearrange(self.score(x), "b a y x -> b y x a 1") for x in hidden]
        deltas = [rearrange(self.delta(x), "b (a box) y x -> b y x a box", box=4) for x in hidden]
        return DenseOutput(logits, deltas)

    def objects(self, sizes: Sequence[Size], targets: Sequence[dict]) -> list[dict]:
        """Return the targets without their classes, and with the images' sizes."""
        return [
            {"boxes": target["boxes"], "labels": torch.zeros_like(target["labels"]), "size": size}
            for target, size in zip(targets, sizes, strict=True)
        ]

    def match(
        self,
        anchors: Sequence[Tensor],
        level_counts: Sequence[Sequence[int]],
        targets: Sequence[dict],
        output: DenseOutput,
        extents: Sequence[Sequence[Size]],
    ) -> BatchAssignment:
        """Match as `DenseHead.match` does, among the anchors that do not stick out of their image too far.

        Args:
            anchors, level_counts, output, extents: as for `DenseHead.match`.
            targets: per image {"boxes", "labels", "size": (h, w) pixels}.
        """
        border = self.allowed_border
        assigned = [
            self.assigner(
                own,
                counts,
                target["boxes"].float(),
                allowed=None if border is None else inside_image(own, target["size"], border),
            )
            for own, counts, target in zip(anchors, level_counts, targets, strict=True)
        ]
        return join(assigned, targets)

    def normalizer(self, assignment: HeadAssignment) -> Tensor | None:
        """Count the sampled anchors, of which each kind counts at least once an image, as in the published code.

        None leaves the number to the objective, if it is not that of rows or nothing is sampled.
        """
        if self.assigner.sampler is None or getattr(self.objective, "normalizer", None) != "rows":
            return None
        assert assignment.valid is not None  # a sampler ignores anchors
        images = zip(assignment.per_image(assignment.labels), assignment.per_image(assignment.valid), strict=True)
        counts = [((labels == kind) & valid).sum() for labels, valid in images for kind in (0, 1)]
        return torch.stack(counts).clamp(min=1).sum()

    def limits(self) -> tuple[int, int]:
        """Return larger limits while training."""
        if self.training:
            return self.before_nms, self.max_detections
        return self.test_limits

    @torch.no_grad()
    def regions(self, output: DenseOutput, sizes: Sequence[Size]) -> Regions:
        """Propose boxes, as many for each image, of which some may be missing; detached.

        They are those of `predict`, by a suppression for several images at once.

        Args:
            output: of `forward`.
            sizes: (h, w) pixels per image.
        """
        before_nms, max_proposals = self.limits()
        found = self.candidates(output, before_nms)
        boxes, valid = clip_boxes(found.boxes, sizes), found.kept
        if self.drop_empty:
            valid = valid & (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
        lengths = [min(before_nms, h * w * self.anchors.per_cell) for h, w in output.shapes]
        there = torch.where(valid[..., None], boxes, 0.0)  # a missing one is empty, and so overlaps nothing
        valid = valid & kept_in_segments(there, found.scores, lengths, self.nms_iou)
        best = found.scores.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        best = best[:, :max_proposals]
        return Regions(take_rows(boxes, best), valid.gather(1, best))

    def proposals(self, output: DenseOutput, sizes: Sequence[Size]) -> list[Tensor]:
        """Propose boxes for each image: (n, 4) xyxy pixels, best first, detached."""
        return self.regions(output, sizes).per_image()
