"""Cascade R-CNN's second stage: heads on pooled regions in a row, each trained on what the one before made of its RoIs.

Cai and Vasconcelos, "Cascade R-CNN", CVPR 2018, section 4: the boxes get better from stage to stage, so each stage
can ask for a higher IoU of its positives. With a ranking loss (Oksuz et al., "Rank & Sort Loss") every stage ranks its
own RoIs, and all stages weigh the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brs_detr.models.heads.dense import HeadLosses
from brs_detr.models.heads.roi import RoIHead
from brs_detr.models.rcnn_config import CascadeConfig
from brs_detr.ops.images import Size


class CascadeHead(nn.Module):
    """Several `RoIHead`s, each with its own weights and its own IoU of positives.

    Args:
        dim: channels of the feature maps.
        num_classes: object classes.
        strides: pixels per cell of the maps that are pooled from.
        config: see `CascadeConfig`.
    """

    def __init__(self, dim: int, num_classes: int, strides: Sequence[int], config: CascadeConfig) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stages = nn.ModuleList(RoIHead(dim, num_classes, strides, stage) for stage in config.stages())
        self.stage_weights = config.stage_weights

    def losses(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size], targets: Sequence[dict]
    ) -> HeadLosses:
        """Compute the loss terms of all stages.

        After each stage the RoIs are decoded and clipped, and the ground truth that it was given is dropped; the next
        stage assigns them again, with ground truth added again.

        Args:
            features: (B, dim, h, w) per stride.
            proposals: per image (n, 4) xyxy pixels, best first.
            sizes: (h, w) pixels per image; an image without any proposal is given one, itself.
            targets: per image {"boxes": (M, 4) xyxy pixels, "labels": (M,)}.

        Returns:
            scalar terms "0.rank", "1.rank" and so on, finite and attached to the graph without any positive too; and
            what the RoIs of the last stage learned.
        """
        terms: dict[str, Tensor] = {}
        for index, (stage, weight) in enumerate(zip(self._heads(), self.stage_weights, strict=True)):
            rois, assigned = stage.sample(proposals, sizes, targets)
            output = stage(features, rois)
            assignment = stage.assign(rois, assigned, targets)
            own = stage.terms(output, assignment, {})
            terms |= {f"{index}.{name}": value * weight for name, value in own.items()}
            if index + 1 < len(self.stages):
                added = stage.added(rois, targets)
                proposals = stage.refine(rois, output, sizes, labels=assignment.labels, added=added)
        return HeadLosses(terms, assignment)

    @torch.no_grad()
    def predict(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]
    ) -> list[dict[str, Tensor]]:
        """Detect objects, best first, per image: {"boxes": (n, 4) xyxy pixels of the input, "scores", "labels"}.

        The boxes are those of the last stage, the scores come from the mean of all stages' logits.
        """
        logits = []
        heads = self._heads()
        for stage in heads:
            output = stage(features, proposals)
            logits.append(output.logits.float())
            if stage is not heads[-1]:
                proposals = stage.refine(proposals, output, sizes)
        mean = torch.stack(logits).mean(dim=0)
        return heads[-1].detect(proposals, mean, output.deltas, sizes)

    def _heads(self) -> list[RoIHead]:
        return [stage for stage in self.stages if isinstance(stage, RoIHead)]
