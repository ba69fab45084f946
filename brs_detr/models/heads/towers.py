"""Two towers of convolutions on every level of a pyramid, one for classes and one for boxes.

They are the layers of RetinaNet (Lin et al., "Focal Loss for Dense Object Detection"), ATSS, PAA and FoveaBox.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from brs_detr.assign.assignment import HeadAssignment
from brs_detr.losses.classification import PRIOR_BIAS
from brs_detr.losses.distributed import SharedCount
from brs_detr.models.heads.dense import DenseHead, DenseOutput
from brs_detr.ops.anchors import AnchorGrid, batch_rows
from brs_detr.ops.images import Size


class TowerHead(DenseHead):
    """A `DenseHead` whose levels share a class tower and a box tower.

    Args:
        dim: channels of the feature maps.
        num_classes: object classes.
        anchors: of every level; A per cell.
        stacked_convs: 3x3 convolutions of each tower.
        norm_groups: of a GroupNorm after each convolution, which then has no bias; None: no norm.
        level_scales: multiply the offsets of each level with a factor that is learned.
        branch: one more logit per anchor from the box tower, "centerness" or "iou"; it is named so in the output.
        options: of `DenseHead`.

    Attributes:
        branch_weight: factor of the branch's loss.
    """

    branch_weight: float = 1.0

    def __init__(
        self,
        dim: int,
        num_classes: int,
        anchors: AnchorGrid,
        *,
        stacked_convs: int = 4,
        norm_groups: int | None = None,
        level_scales: bool = False,
        branch: Literal["centerness", "iou"] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, anchors, **options)
        per_cell, self.branch = anchors.per_cell, branch
        self.class_tower = tower(dim, stacked_convs, norm_groups)
        self.box_tower = tower(dim, stacked_convs, norm_groups)
        self.score = nn.Conv2d(dim, per_cell * num_classes, 3, padding=1)
        self.delta = nn.Conv2d(dim, per_cell * 4, 3, padding=1)
        if branch is not None:
            self.add_module(branch, nn.Conv2d(dim, per_cell, 3, padding=1))
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in anchors.strides if level_scales)
        init_convs(self, self.score)

    def forward(self, features: Sequence[Tensor]) -> DenseOutput:
        """Predict at every anchor from feature maps (B, dim, h, w), one per stride."""
        logits = [
            rearrange(self.score(self.class_tower(x)), "b (a c) y x -> b y x a c", c=self.num_classes) for x in features
        ]
        hidden = [self.box_tower(x) for x in features]
        deltas = [self.delta(x).float() for x in hidden]
        if len(self.scales):
            deltas = [delta * scale for delta, scale in zip(deltas, self.scales, strict=True)]
        deltas = [rearrange(delta, "b (a box) y x -> b y x a box", box=4) for delta in deltas]
        if self.branch is None:
            return DenseOutput(logits, deltas)
        extra = [rearrange(self.get_submodule(self.branch)(x), "b a y x -> b y x a 1") for x in hidden]
        if self.branch == "iou":
            return DenseOutput(logits, deltas, iou=extra)
        return DenseOutput(logits, deltas, centerness=extra)

    def branch_target(
        self, output: DenseOutput, extents: Sequence[Sequence[Size]], assignment: HeadAssignment
    ) -> Tensor:
        """Return what the branch learns of each positive (P,), in [0, 1]; a head with a branch has its own."""
        raise NotImplementedError

    def terms(
        self,
        output: DenseOutput,
        extents: Sequence[Sequence[Size]],
        assignment: HeadAssignment,
        normalizer: Tensor | SharedCount | None,
        box_weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Add the branch, whose target weighs the box losses, to the terms of `DenseHead.terms`."""
        if self.branch is None:
            return super().terms(output, extents, assignment, normalizer, box_weight)
        assert isinstance(normalizer, SharedCount)  # heads with a branch count their positives
        target = self.branch_target(output, extents, assignment)
        terms = super().terms(output, extents, assignment, normalizer, box_weight=target)
        logits = batch_rows(getattr(output, self.branch), extents)[assignment.rows, 0].float()
        value = binary_cross_entropy_with_logits(logits, target, reduction="sum") / normalizer.mean(logits.device)
        return {**terms, self.branch: self.branch_weight * value}


def tower(dim: int, depth: int, groups: int | None) -> nn.Sequential:
    """Stack 3x3 convolutions, each with a norm of so many groups, unless that is None, and ReLU."""
    return nn.Sequential(*(_block(dim, groups) for _ in range(depth)))


def init_convs(module: nn.Module, score: nn.Conv2d) -> None:
    """Initialize all convolutions of a head as in focal loss, whose `score` begins at a probability of 0.01."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, PRIOR_BIAS if layer is score else 0.0)


def _block(dim: int, groups: int | None) -> nn.Sequential:
    if groups is None:
        return nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU())
    return nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(groups, dim), nn.ReLU())
