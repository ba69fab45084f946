"""What all one-stage heads on a feature pyramid share: losses of all anchors, and detections.

A head adds its layers: its `forward` turns feature maps into a `DenseOutput`. Losses are anchors -> assign -> decode ->
objective; detections are best scores per level -> decode -> clip -> suppress.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from brs_detr.assign.assignment import Assigner, BatchAssignment, HeadAssignment, join
from brs_detr.assign.max_iou import IGNORED
from brs_detr.losses.boxes import paired_giou_loss, paired_iou
from brs_detr.losses.distributed import SharedCount
from brs_detr.losses.objective import PredictionSet, RankingObjective, ScoreObjective
from brs_detr.models.objective_config import ObjectiveConfig, RankingConfig
from brs_detr.ops.anchors import AnchorGrid, batch_anchors, batch_rows, take_rows, valid_extents
from brs_detr.ops.boxes import Candidates, Coder, suppress
from brs_detr.ops.images import Size

Objective = Callable[[PredictionSet], dict[str, Tensor]]
BoxLoss = Literal["smooth_l1", "giou", "iou", "l1"]
Best = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def best_scores(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` best scores of each row (B, n), fewer where there are fewer, and their columns."""
    best, columns = scores.topk(min(count, scores.shape[1]), dim=1)
    return best, columns


def build_objective(
    config: ObjectiveConfig, box_weights: Mapping[str, float] | None = None
) -> RankingObjective | ScoreObjective:
    """Build the objective of one head; `box_weights` are those of a ranking's box terms in place of the balance."""
    if isinstance(config, RankingConfig):
        return RankingObjective(
            config.loss,
            config.weight,
            delta=config.delta,
            score_weighted=config.score_weighted,
            box_weight=config.box_weight,
            box_weights=box_weights,
            tau=config.tau,
            # aLRP: the period is that of COCO at batch 32 until `balance.set_epoch_length`
            period=3665 if config.balance == "epoch" else None,
            balanced=config.balance != "none",
            scope=config.scope,
        )
    return ScoreObjective(
        config.loss,
        dataclasses.asdict(config.weights),
        alpha=config.alpha,
        gamma=config.gamma,
        normalizer=config.normalizer,
    )


def box_losses(
    kind: BoxLoss, coder: Coder, references: Tensor, deltas: Tensor, targets: Tensor, beta: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compare predicted boxes with their objects.

    Args:
        kind: "giou" or "iou" on decoded boxes; "l1", the sum, or "smooth_l1", the mean over the four offsets.
        coder: turns offsets into boxes.
        references: (P, 4) xyxy pixels.
        deltas: (P, 4) predicted offsets from the references.
        targets: (P, 4) xyxy pixels.
        beta: offset error at which "smooth_l1" turns from quadratic to linear.

    Returns:
        IoU (P,), detached; and {kind: (P,) losses, not reduced}.
    """
    boxes = coder.decode(references, deltas)
    quality = paired_iou(boxes.detach(), targets)
    if kind == "giou":
        return quality, {"giou": paired_giou_loss(boxes, targets)}
    if kind == "iou":
        return quality, {"iou": 1 - paired_iou(boxes, targets)}
    offsets, deltas = coder.encode(references, targets), deltas.float()
    if kind == "l1":
        return quality, {"l1": (deltas - offsets).abs().sum(dim=-1)}
    return quality, {"smooth_l1": smooth_l1_loss(deltas, offsets, reduction="none", beta=beta).mean(dim=-1)}


class HeadLosses(NamedTuple):
    """What a head returns in training: named loss terms whose sum is its loss, and the assignment of its boxes."""

    terms: dict[str, Tensor]
    assignment: HeadAssignment


class PrototypeMasks(NamedTuple):
    """Masks as sums of prototypes, one set of coefficients per anchor.

    Attributes:
        coefficients: per level (B, h, w, A, K).
        prototypes: (B, K, H, W) over the padded batch.
        frame: (h, w) pixels of the padded batch.
    """

    coefficients: list[Tensor]
    prototypes: Tensor
    frame: Size


class DenseOutput(NamedTuple):
    """What a head predicts for every anchor: A per cell, C classes.

    Attributes:
        logits: per level (B, h, w, A, C).
        deltas: per level (B, h, w, A, 4) offsets from the anchors.
        centerness: per level (B, h, w, A, 1) logits of a factor of the detections' scores; None: no such factor.
        iou: per level (B, h, w, A, 1) logits of the boxes' IoU with their objects; None: not predicted.
        masks: what the anchors' masks are made of; None: not predicted.
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    centerness: list[Tensor] | None = None
    iou: list[Tensor] | None = None
    masks: PrototypeMasks | None = None

    @property
    def shapes(self) -> list[Size]:
        """Return (h, w) cells of each level."""
        return [(logits.shape[1], logits.shape[2]) for logits in self.logits]


class DenseHead(nn.Module):
    """Losses and detections of a head that classifies anchors and regresses one box from each.

    A subclass has the layers and `forward`. It may also replace any other public method.

    Args:
        num_classes: C, object classes; 1 for objectness.
        anchors: of every level; A per cell.
        objective: takes a `PredictionSet`.
        assigner: gives the anchors of one image to its objects.
        coder: turns offsets into boxes.
        box_loss: "giou" or "iou" on decoded boxes; "l1", the sum, or "smooth_l1", the mean over the four offsets.
        beta: offset error at which "smooth_l1" turns from quadratic to linear.
        before_nms: best (anchor, class) pairs of each level that enter suppression.
        score_threshold: class scores at or below this are dropped; None keeps all.
        drop_empty: drop boxes that have no area inside the image.
        nms_iou: suppression threshold.
        nms_within: suppress among boxes of one "class" or of one "level".
        max_detections: detections per image.

    Raises:
        ValueError: for another `box_loss`.
    """

    def __init__(
        self,
        num_classes: int,
        anchors: AnchorGrid,
        *,
        objective: Objective,
        assigner: Assigner,
        coder: Coder,
        box_loss: BoxLoss = "giou",
        beta: float = 1.0,
        before_nms: int = 1000,
        score_threshold: float | None = 0.0,
        drop_empty: bool = False,
        nms_iou: float = 0.6,
        nms_within: Literal["class", "level"] = "class",
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        if box_loss not in get_args(BoxLoss):
            raise ValueError(f"box_loss of a dense head is one of {', '.join(get_args(BoxLoss))}, not {box_loss!r}")
        self.num_classes, self.anchors, self.strides = num_classes, anchors, anchors.strides
        self.objective, self.assigner, self.coder = objective, assigner, coder
        self.box_loss, self.beta = box_loss, beta
        self.before_nms, self.score_threshold, self.drop_empty = before_nms, score_threshold, drop_empty
        self.nms_iou, self.nms_within, self.max_detections = nms_iou, nms_within, max_detections
        self.best: Best = best_scores  # an exported detector has another one

    def losses(self, output: DenseOutput, sizes: Sequence[Size], targets: Sequence[dict]) -> HeadLosses:
        """Compute the loss terms of the batch, as one prediction set.

        Args:
            output: of `forward`.
            sizes: (h, w) pixels of each image without padding; anchors of the padding take no part.
            targets: per image {"boxes": (M, 4) xyxy pixels, "labels": (M,)}.

        Returns:
            scalar terms, finite and attached to the graph also when there is no object at all; and what the anchors
            inside each image learned, level after level.
        """
        extents = self.extents(output, sizes)
        assignment = self.assign(output, extents, self.objects(sizes, targets))
        return HeadLosses(self.terms(output, extents, assignment, self.normalizer(assignment)), assignment)

    def objects(self, sizes: Sequence[Size], targets: Sequence[dict]) -> Sequence[dict]:
        """Return the targets as this head learns them; arguments as for `losses`."""
        return targets

    def place(self, output: DenseOutput) -> list[Tensor]:
        """Return the anchors (h, w, A, 4) xyxy pixels of every level of an output."""
        anchors: list[Tensor] = self.anchors(output.shapes)
        return anchors

    def extents(self, output: DenseOutput, sizes: Sequence[Size]) -> list[list[Size]]:
        """Count the (rows, columns) of each level that lie inside each image of (h, w) pixels."""
        return [valid_extents(size, output.shapes, self.strides) for size in sizes]

    def assign(self, output: DenseOutput, extents: Sequence[Sequence[Size]], targets: Sequence[dict]) -> HeadAssignment:
        """Decide what every anchor inside its image learns.

        Args:
            output: of `forward`.
            extents: per image (rows, columns) of each level that lie inside it.
            targets: of `objects`.
        """
        return self.learned(*self.matched(output, extents, targets))

    def matched(
        self, output: DenseOutput, extents: Sequence[Sequence[Size]], targets: Sequence[dict]
    ) -> tuple[list[Tensor], BatchAssignment]:
        """Give the anchors inside each image to its objects; arguments as for `assign`.

        Returns:
            those anchors, per image (n, 4) xyxy pixels; and their objects. No assigner but PAA's waits for the device.
        """
        per_cell = self.anchors.per_cell
        anchors = batch_anchors(self.place(output), extents)
        counts = [[h * w * per_cell for h, w in extent] for extent in extents]
        return anchors, self.match(anchors, counts, targets, output, extents)

    def learned(
        self, anchors: list[Tensor], matched: BatchAssignment, counts: list[int] | None = None
    ) -> HeadAssignment:
        """Return what anchors learn from their objects.

        Args:
            anchors, matched: of the method `matched`.
            counts: positives of each image; None: the host waits for the device to know their number.
        """
        rows = matched.positives(None if counts is None else sum(counts))
        objects = matched.assigned[rows]
        return HeadAssignment(
            references=anchors,
            labels=matched.classes(self.num_classes),
            rows=rows,
            targets=matched.boxes[objects],
            valid=matched.assigned != IGNORED if self.assigner.may_ignore else None,
            matched_idxs=objects,
            counts=counts,
        )

    def match(
        self,
        anchors: Sequence[Tensor],
        level_counts: Sequence[Sequence[int]],
        targets: Sequence[dict],
        output: DenseOutput,
        extents: Sequence[Sequence[Size]],
    ) -> BatchAssignment:
        """Give each image's anchors (n, 4), `level_counts` of each level, to its objects.

        The other arguments are as for `assign`; a head may look at its own `output`.
        """
        assigned = [
            self.assigner(own, counts, target["boxes"].float())
            for own, counts, target in zip(anchors, level_counts, targets, strict=True)
        ]
        return join(assigned, targets)

    def normalizer(self, assignment: HeadAssignment) -> Tensor | SharedCount | None:
        """Return what score-based terms are divided by; None: the objective's own number of positives or rows."""
        return None

    def terms(
        self,
        output: DenseOutput,
        extents: Sequence[Sequence[Size]],
        assignment: HeadAssignment,
        normalizer: Tensor | SharedCount | None,
        box_weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the terms of predictions with a known assignment; the last two arguments as in `PredictionSet`."""
        quality, losses = self.positive_losses(output, extents, assignment)
        return self.objective(
            PredictionSet(
                batch_rows(output.logits, extents),
                assignment.labels,
                quality=quality,
                box_losses=losses,
                rows=assignment.rows,
                valid=assignment.valid,
                box_weight=box_weight,
                normalizer=normalizer,
            )
        )

    def positive_losses(
        self, output: DenseOutput, extents: Sequence[Sequence[Size]], assignment: HeadAssignment
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the quality (P,) of the positives and their losses other than that of their class, not reduced."""
        rows = assignment.rows
        deltas = batch_rows(output.deltas, extents)[rows]
        return self.box_losses(torch.cat(assignment.references)[rows], deltas, assignment.targets)

    def box_losses(self, anchors: Tensor, deltas: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the IoU (P,) and un-reduced box losses of the positive anchors (P, 4)."""
        return box_losses(self.box_loss, self.coder, anchors, deltas, targets, self.beta)

    def limits(self) -> tuple[int, int]:
        """Return (pairs of each level that enter suppression, detections per image)."""
        return self.before_nms, self.max_detections

    @torch.no_grad()
    def predict(self, output: DenseOutput, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        """Detect objects, best first, per image: {"boxes": (n, 4) xyxy pixels of the input, "scores", "labels"}.

        Anchors of the batch padding may predict too, as in the published models: clipped to the image some of their
        boxes are empty.
        """
        before_nms, max_detections = self.limits()
        candidates = self.candidates(output, before_nms)
        return [
            self.detect(Candidates(*(column[image] for column in candidates)), size, max_detections)
            for image, size in enumerate(sizes)
        ]

    def candidates(self, output: DenseOutput, count: int) -> Candidates:
        """Return what enters suppression, the best `count` (anchor, class) pairs of each level: (B, n, ...)."""
        levels = [self._candidates(output, level, anchors, count) for level, anchors in enumerate(self.place(output))]
        return Candidates(*(torch.cat(column, dim=1) for column in zip(*levels, strict=True)))

    def detect(self, candidates: Candidates, size: Size, max_detections: int) -> dict[str, Tensor]:
        """Choose the detections of one image of (h, w) pixels."""
        return suppress(
            **candidates._asdict(),
            size=size,
            nms_iou=self.nms_iou,
            max_detections=max_detections,
            drop_empty=self.drop_empty,
        )

    def class_scores(self, output: DenseOutput, level: int) -> Tensor:
        """Scores (B, h, w, A, C) by which the candidates of one level are chosen and compared with the threshold."""
        return output.logits[level].float().sigmoid()

    def _candidates(self, output: DenseOutput, level: int, anchors: Tensor, count: int) -> Candidates:
        """Return the best (anchor, class) pairs of one level, of all images."""
        score = self.class_scores(output, level).flatten(1)
        score, index = self.best(score, count)
        anchor, label = index // self.num_classes, index % self.num_classes
        boxes = self.coder.decode(anchors.reshape(-1, 4)[anchor], take_rows(output.deltas[level].flatten(1, 3), anchor))
        kept = torch.ones_like(score, dtype=torch.bool)
        if self.score_threshold is not None:
            kept = score > self.score_threshold
        if output.centerness is not None:
            score = score * output.centerness[level].float().sigmoid().flatten(1).gather(1, anchor)
        groups = label if self.nms_within == "class" else torch.full_like(label, level)
        return Candidates(boxes, score, label, groups, kept)
