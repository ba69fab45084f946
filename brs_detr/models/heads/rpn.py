"""Region proposal network (Ren et al., "Faster R-CNN", section 3.1) trained with any objective.

With a ranking objective every anchor takes part and boxes are learned by GIoU (Oksuz et al., "Rank & Sort Loss",
section 5); with binary cross entropy a random sample takes part and boxes are learned by L1 on the offsets, as Co-DETR
does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from brs_detr.assign.assignment import join
from brs_detr.assign.max_iou import IGNORED, RandomSampler, max_iou_assign
from brs_detr.losses.boxes import paired_giou_loss, paired_iou
from brs_detr.losses.objective import PredictionSet
from brs_detr.ops.anchors import AnchorGrid, batch_rows, take_rows, valid_extents, valid_rows
from brs_detr.ops.boxes import BoxCoder
from brs_detr.ops.images import Size

OCTAVE_SCALES = (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3))


class RPNOutput(NamedTuple):
    """What the network says about every anchor.

    Attributes:
        logits: per level (B, h, w, A) objectness.
        deltas: per level (B, h, w, A, 4) offsets from the anchors.
    """

    logits: list[Tensor]
    deltas: list[Tensor]

    @property
    def shapes(self) -> list[Size]:
        """(h, w) cells of each level."""
        return [(logits.shape[1], logits.shape[2]) for logits in self.logits]


class RPNHead(nn.Module):
    """Class-agnostic proposals from a feature pyramid.

    The localization loss and the quality label are computed on boxes decoded with this head's own coder, in pixels. The
    published rank-based head decodes around a unit box with other standard deviations, which squeezes all
    its IoU labels toward 1; that fault is not reproduced.

    Args:
        dim: channels of the feature maps.
        strides: pixels per cell of each map.
        scales: anchor sides in multiples of the stride.
        ratios: height over width of the anchors.
        objective: called as in `losses/objective.py` with one class.
        localization: "giou" on decoded boxes (BRS-DETR) or "l1" on offsets (Co-DETR).
        sampler: chooses the anchors that take part in the loss; None takes all that are not ignored.
        coder_stds: standard deviations of the offsets.
        before_nms: best anchors of each level that enter suppression while training.
        keep: proposals per image while training.
        test_before_nms: as `before_nms`, in evaluation.
        test_keep: as `keep`, in evaluation.
        nms_iou: suppression threshold, level by level.
    """

    def __init__(
        self,
        dim: int,
        strides: Sequence[int],
        *,
        objective: Callable[..., dict[str, Tensor]],
        scales: Sequence[float] = OCTAVE_SCALES,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        localization: Literal["giou", "l1"] = "giou",
        sampler: RandomSampler | None = None,
        coder_stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
        before_nms: int = 4000,
        keep: int = 4000,
        test_before_nms: int = 1000,
        test_keep: int = 1000,
        nms_iou: float = 0.7,
    ) -> None:
        super().__init__()
        if localization not in ("giou", "l1"):
            raise ValueError(f'localization of the RPN is "giou" or "l1", not {localization!r}')
        self.strides = tuple(strides)
        self.anchors = AnchorGrid(strides, scales, ratios)
        self.coder = BoxCoder(tuple(coder_stds))
        self.objective = objective
        self.localization = localization
        self.sampler = sampler
        self.before_nms, self.keep = before_nms, keep
        self.test_before_nms, self.test_keep = test_before_nms, test_keep
        self.nms_iou = nms_iou
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.score = nn.Conv2d(dim, self.anchors.per_cell, 1)
        self.delta = nn.Conv2d(dim, self.anchors.per_cell * 4, 1)
        for layer in (self.conv, self.score, self.delta):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor]) -> RPNOutput:
        """Feature maps (B, dim, h, w), one per stride -> objectness and offsets of all anchors."""
        hidden = [self.conv(x).relu() for x in features]
        logits = [rearrange(self.score(x), "b a y x -> b y x a") for x in hidden]
        deltas = [rearrange(self.delta(x), "b (a box) y x -> b y x a box", box=4) for x in hidden]
        return RPNOutput(logits, deltas)

    def losses(self, output: RPNOutput, sizes: Sequence[Size], targets: Sequence[dict]) -> dict[str, Tensor]:
        """Loss terms of the whole batch, as one prediction set.

        Args:
            output: of `forward`.
            sizes: (h, w) pixels of each image without padding; anchors of the padding take no part.
            targets: per image {"boxes": (M, 4) xyxy pixels, "labels": (M,)}; the classes are not used.

        Returns:
            {"rpn." + name: scalar}; finite and attached to the graph also when there is no object at all.
        """
        extents = [valid_extents(size, output.shapes, self.strides) for size in sizes]
        grid = self.anchors(output.shapes)
        anchors = [valid_rows(grid, extent) for extent in extents]
        logits = batch_rows([x[..., None] for x in output.logits], extents)
        deltas = batch_rows(output.deltas, extents)
        assignments = [self._assign(a, target["boxes"].float()) for a, target in zip(anchors, targets, strict=True)]
        joined = join(assignments, targets)
        rows = joined.positives()
        quality, localization = self._localize(
            torch.cat(anchors)[rows], deltas[rows], joined.boxes[joined.assigned[rows]]
        )
        terms = self.objective(
            PredictionSet(
                logits,
                (joined.assigned < 0).long(),
                quality=quality,
                box_losses=localization,
                valid=joined.assigned != IGNORED,
                rows=rows,
                normalizer=sum(map(_sampled, assignments)) if self.sampler else None,
            )
        )
        return {f"rpn.{name}": value for name, value in terms.items()}

    def _assign(self, anchors: Tensor, objects: Tensor) -> Tensor:
        """(N,) assignment of one image's anchors (Faster R-CNN's thresholds)."""
        assigned = max_iou_assign(anchors, objects, positive=0.7, negative=0.3, low_quality=0.3)
        return assigned if self.sampler is None else self.sampler(assigned)

    def _localize(self, anchors: Tensor, deltas: Tensor, objects: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """IoU (P,) and un-reduced localization losses of the positive anchors (P, 4)."""
        boxes = self.coder.decode(anchors, deltas)
        quality = paired_iou(boxes.detach(), objects)
        if self.localization == "giou":
            return quality, {"giou": paired_giou_loss(boxes, objects)}
        return quality, {"l1": (deltas.float() - self.coder.encode(anchors, objects)).abs().sum(dim=-1)}

    def proposals(self, output: RPNOutput, sizes: Sequence[Size]) -> list[Tensor]:
        """Proposed boxes of each image: (n, 4) xyxy pixels, best first, detached."""
        return [boxes for boxes, _ in self.scored_proposals(output, sizes)]

    @torch.no_grad()
    def scored_proposals(self, output: RPNOutput, sizes: Sequence[Size]) -> list[tuple[Tensor, Tensor]]:
        """As `proposals`, with the objectness (n,) of each box in [0, 1].

        Anchors of the batch padding may propose too, as in the published models: clipped to the image most of them
        vanish. Empty boxes are dropped (the published rank-based head keeps them).
        """
        max_candidates = self.before_nms if self.training else self.test_before_nms
        boxes, scores, levels = [], [], []
        for level, (anchors, logits, deltas) in enumerate(
            zip(self.anchors(output.shapes), output.logits, output.deltas, strict=True)
        ):
            score = logits.float().sigmoid().flatten(1)
            best, index = score.topk(min(max_candidates, score.shape[1]), dim=1)
            delta = take_rows(deltas.flatten(1, 3), index)
            boxes.append(self.coder.decode(anchors.reshape(-1, 4)[index], delta))
            scores.append(best)
            levels.append(torch.full_like(index, level))
        columns = torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(levels, dim=1)
        return [self._suppress(*(column[image] for column in columns), size) for image, size in enumerate(sizes)]

    def _suppress(self, boxes: Tensor, scores: Tensor, levels: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Clip one image's candidates (n, 4), drop the empty ones, suppress level by level and keep the best."""
        boxes = clip_boxes_to_image(boxes, size)
        filled = (
            (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero()[:, 0]
        )  # the host must know their number: NMS follows
        boxes, scores, levels = boxes[filled], scores[filled], levels[filled]
        kept = batched_nms(boxes, scores, levels, self.nms_iou)[: self.keep if self.training else self.test_keep]
        return boxes[kept], scores[kept]


def _sampled(assigned: Tensor) -> Tensor:
    """Anchors of one image that take part in the loss; each kind counts at least once, as in the published code."""
    return (assigned >= 0).sum().clamp(min=1) + ((assigned < 0) & (assigned != IGNORED)).sum().clamp(min=1)
