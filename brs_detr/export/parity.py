"""Compare an exported file in onnxruntime with the detector in torch.

Two programs round differently, and a detector selects several times: proposals by score, then (query, class) pairs by
score, and in dense heads boxes by suppression. Either of two that are equal up to rounding may come first, what comes
first suppresses the other, and a query's content depends on the rank of its proposal. So the reference uses the file's
own selection of proposals, after checking that it is one up to rounding, and a detection may equal any of torch's with
its label and score. Whether boxes are the outcome of suppression is checked by its definition (`unlike_suppression`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou, clip_boxes_to_image

from brs_detr.evaluation.calibration import Calibration
from brs_detr.export.onnx import OUTPUTS, PROPOSALS, RAW_SCORES
from brs_detr.export.runtime import open_session
from brs_detr.models.brs_detr import BRSDETR
from brs_detr.models.config import HardNMS
from brs_detr.models.detector import Detector
from brs_detr.models.heads.dense import DenseHead, DenseOutput
from brs_detr.models.transformer.decoder import Predictions, best_pairs
from brs_detr.models.transformer.encoder import Memory
from brs_detr.ops.anchors import take_rows
from brs_detr.ops.boxes import Candidates
from brs_detr.ops.images import CANVAS_COLOR, ImageBatch, Size

MAX_BOX_DIFFERENCE = 0.1
"""Maximum difference of a box's corner, in pixels of the input, that counts as rounding."""
MAX_SCORE_DIFFERENCE = 1e-3
"""The same for a score in [0, 1]."""
MAX_IOU_DIFFERENCE = 1e-3
"""The same for the overlap of two boxes."""
SPARE = 10
"""Ranks on either side of a limit whose candidates may be selected or not."""


class Differences(NamedTuple):
    """Largest differences between two computations: of boxes in pixels, of scores; inf without a counterpart."""

    boxes: float
    scores: float

    @property
    def small(self) -> bool:
        """Return True if both can be explained by rounding."""
        return self.boxes <= MAX_BOX_DIFFERENCE and self.scores <= MAX_SCORE_DIFFERENCE

    def and_those(self, others: Differences) -> Differences:
        """Return the larger ones of both."""
        return Differences(max(self.boxes, others.boxes), max(self.scores, others.scores))


class Match(NamedTuple):
    """How many of the best detections of one file another one has too, and how far the farthest of these are."""

    total: int
    matched: int
    boxes: float
    scores: float


class ExportedDetector:
    """An ONNX file of `onnx.write_onnx` in onnxruntime on the CPU; its proposals and raw scores are outputs too.

    Args:
        path: of the file. onnxruntime must be installed.

    Raises:
        ExportError: onnxruntime cannot open the file, or onnx is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.session = open_session(path, [PROPOSALS, RAW_SCORES])

    def __call__(self, images: ImageBatch) -> dict[str, Tensor]:
        """Run a batch of the file's size: boxes (B, n, 4), scores and labels (B, n); proposals, raw scores if any."""
        inputs = {"pixels": images.pixels.numpy(), "sizes": torch.tensor(images.sizes).numpy()}
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, map(torch.from_numpy, self.session.run(None, inputs)), strict=True))


@torch.no_grad()
def compare(
    model: Detector,
    exported: Callable[[ImageBatch], dict[str, Tensor]],
    images: ImageBatch,
    calibration: Calibration | None = None,
) -> Differences:
    """Compute the largest differences between an exported file and the detector it was made from.

    Args:
        model: the detector, in eval mode on the CPU.
        exported: the exported file.
        images: a batch of the file's size and dtype.
        calibration: the maps that the file was exported with.
    """
    found = exported(images)
    if model.test_canvas is not None:
        gray = images.pixels.masked_fill(images.padding_mask()[:, None], CANVAS_COLOR)
        images = replace(images, pixels=gray, sizes=[images.padded_size] * len(images))
    if calibration is None:
        return compare_raw(model, found, images)
    scores, raw, labels = found["scores"].double(), found.pop(RAW_SCORES), found["labels"]
    expected = torch.from_numpy(calibration.apply(raw.flatten().numpy(), labels.flatten().numpy())).view_as(scores)
    mapped = (scores - torch.where(raw < 0, raw.double(), expected)).abs().max()
    return compare_raw(model, {**found, "scores": raw}, images).and_those(Differences(0.0, float(mapped)))


def compare_raw(model: Detector, found: dict[str, Tensor], images: ImageBatch) -> Differences:
    """Compare a file's detections with raw scores; the other arguments as for `compare`."""
    features = model.encode_batch(images)
    if isinstance(model, BRSDETR) and model.predict_with == "decoder":
        return compare_decoder(model, features, images, found)
    detector: Any = model
    maps = model.pyramid(features) if isinstance(model, BRSDETR) else features
    if model.predict_with == "roi":
        return compare_regions(detector, maps, images, found)
    head: Any = model.atss if isinstance(model, BRSDETR) else detector.head
    return compare_dense(head, head(maps), images, found)


def compare_decoder(model: BRSDETR, memory: Any, images: ImageBatch, found: dict[str, Tensor]) -> Differences:
    """Compare the decoder's detections; `memory` is torch's."""
    tokens, valid = model.proposals.predict(memory)
    if model.query_boxes == "rpn":
        references, choice = found[PROPOSALS], 0.0
        beginnings = unlike_references(model, memory, tokens.boxes, images, references)
    else:
        chosen, beginnings = found[PROPOSALS], 0.0
        scores = model.proposals.scores(tokens.logits).masked_fill(~valid, -torch.inf).sigmoid()
        # rank by rank: small only if the file's selection has the top scores, in order
        choice = float((scores.gather(1, chosen) - scores.gather(1, model.proposals(memory).chosen)).abs().max())
        references = take_rows(tokens.boxes, chosen)
    layers = model.decode(memory, references)
    last = Predictions(layers.logits[-1], layers.boxes[-1])
    if not isinstance(model.nms, HardNMS):
        differences = largest_differences(last, images, *(found[name] for name in OUTPUTS))
        return differences.and_those(Differences(beginnings, choice))

    def best(count: int) -> Candidates:
        boxes, scores, labels = best_pairs(last, count)
        extents = torch.tensor(images.sizes).flip(1).repeat(1, 2)[:, None]
        return Candidates(boxes * extents, scores, labels, labels, torch.ones_like(scores, dtype=torch.bool))

    before, limit = model.num_candidates, model.detections_per_image
    grouped = {"groups": found["labels"], **found}
    differences = compare_suppressed(grouped, best, images, before=before, nms_iou=model.nms.iou, limit=limit)
    return differences.and_those(Differences(beginnings, choice))


def unlike_references(model: BRSDETR, memory: Memory, tokens: Tensor, images: ImageBatch, references: Tensor) -> float:
    """Return how far, in pixels, the farthest of a file's references (B, Q, 4) is from any that torch may choose.

    Those are the regions of the RPN and the boxes `tokens` (B, N, 4) cxcywh in [0, 1] of the encoder's tokens.
    Rounding may put an overlap on the other side of the threshold, which changes the choice: so the choice itself is
    not compared.
    """
    assert model.rpn is not None  # whose proposals they are
    extents = torch.tensor(images.sizes).flip(1).repeat(1, 2)[:, None].float()
    regions = model.rpn.candidates(model.rpn(model.pyramid(memory)), model.rpn.limits()[0] + SPARE).boxes
    regions = torch.stack([clip_boxes_to_image(own, size) for own, size in zip(regions, images.sizes, strict=True)])
    of_tokens = box_convert(tokens * extents, "cxcywh", "xyxy")
    boxes = box_convert(references * extents, "cxcywh", "xyxy")
    apart = torch.cdist(boxes, torch.cat([regions, of_tokens], dim=1), p=torch.inf).amin(dim=2)
    return float(apart.max())


def compare_dense(head: DenseHead, output: DenseOutput, images: ImageBatch, found: dict[str, Tensor]) -> Differences:
    """Compare the detections of a dense head, or the proposals of an RPN; `output` is torch's."""
    before, limit = head.limits()
    return compare_suppressed(
        {"groups": found["labels"], **found},
        lambda count: head.candidates(output, count),
        images,
        before=before,
        nms_iou=head.nms_iou,
        limit=limit,
        drop_empty=head.drop_empty,
    )


def compare_regions(model: Any, maps: list[Tensor], images: ImageBatch, found: dict[str, Tensor]) -> Differences:
    """Compare the proposals, then the detections that torch makes of the file's proposals; `maps` are torch's."""
    boxes, scores, level = found[PROPOSALS].split([4, 1, 1], dim=-1)
    proposals = {"boxes": boxes, "scores": scores[..., 0], "labels": level, "groups": level[..., 0]}
    differences = [compare_dense(model.rpn, model.rpn(maps), images, proposals)]
    filled = [own[score >= 0] for own, score in zip(boxes, proposals["scores"], strict=True)]
    roi = model.roi
    output = roi(maps, filled)
    regions = roi.candidates(filled, output.logits, output.deltas)
    for image, (size, own) in enumerate(zip(images.sizes, regions, strict=True)):
        own = clipped(own, size)
        detections = {"boxes": found["boxes"], "scores": found["scores"], "groups": found["labels"]}
        detections = {name: value[image] for name, value in detections.items()}
        differences.append(unlike_suppression(detections, own, own, nms_iou=roi.nms_iou, limit=roi.max_detections))
    return Differences(*(max(values) for values in zip(*differences)))


def compare_suppressed(
    found: dict[str, Tensor],
    candidates: Callable[[int], Candidates],
    images: ImageBatch,
    *,
    before: int,
    nms_iou: float,
    limit: int,
    drop_empty: bool = False,
) -> Differences:
    """Compare what a file has found in a batch with what torch suppresses.

    Args:
        found: boxes (B, n, 4), scores and groups (B, n).
        candidates: returns torch's best of each level, as many as its argument.
        images: the batch.
        before: candidates of each level that take part.
        nms_iou, limit: as for `unlike_suppression`.
        drop_empty: drop boxes that have no area inside the image.
    """
    possible, certain = candidates(before + SPARE), candidates(max(1, before - SPARE))
    differences = Differences(0.0, 0.0)
    for image, size in enumerate(images.sizes):
        parts = [
            clipped(Candidates(*(column[image] for column in part)), size, drop_empty) for part in (possible, certain)
        ]
        own = {name: found[name][image] for name in ("boxes", "scores", "groups")}
        differences = differences.and_those(unlike_suppression(own, *parts, nms_iou=nms_iou, limit=limit))
    return differences


def clipped(candidates: Candidates, size: Size, drop_empty: bool = False) -> Candidates:
    """Clip the candidates of an image, and drop those that take no part."""
    boxes = clip_boxes_to_image(candidates.boxes, size)
    kept = candidates.kept & (boxes[:, 2:] > boxes[:, :2]).all(dim=1) if drop_empty else candidates.kept
    return Candidates(*(column[kept] for column in candidates._replace(boxes=boxes)))


def unlike_suppression(
    found: dict[str, Tensor], possible: Candidates, certain: Candidates, *, nms_iou: float, limit: int
) -> Differences:
    """Compute how far boxes are from what suppression keeps of candidates.

    Suppression keeps a candidate exactly if no kept one of its group with a higher score overlaps it more than
    `nms_iou`; of those it keeps the best `limit`. So the boxes must be candidates, must not overlap one another, and
    each candidate that is better than the last box must be among them or overlap a better one.

    Args:
        found: of one image, boxes (n, 4) xyxy pixels, scores (n,), of which `NOTHING` is no box, and groups (n,).
        possible: candidates (m, ...) that the boxes may be. certain: those that must be explained.
        nms_iou: largest overlap in a group. limit: most boxes.

    Returns:
        For boxes and scores, the largest distance of a box to its candidate; inf where suppression is violated.
    """
    real = found["scores"] >= 0
    boxes, scores, groups = (found[name][real] for name in ("boxes", "scores", "groups"))
    if len(boxes) == 0 or len(possible.boxes) == 0:
        return Differences(0.0 if len(boxes) == len(certain.boxes) == 0 else math.inf, 0.0)
    score_apart = (scores[:, None] - possible.scores).abs()
    alike = (score_apart <= MAX_SCORE_DIFFERENCE) & (groups[:, None] == possible.groups)
    apart = (boxes[:, None] - possible.boxes).abs().amax(-1).masked_fill(~alike, torch.inf)
    # the candidate whose distance is the smallest part of what is allowed
    index = torch.maximum(apart / MAX_BOX_DIFFERENCE, score_apart / MAX_SCORE_DIFFERENCE).argmin(dim=1, keepdim=True)
    nearest, moved = (float(x.gather(1, index).max()) for x in (apart, score_apart))

    together = (groups[:, None] == groups) & (box_iou(boxes, boxes) > nms_iou + MAX_IOU_DIFFERENCE)
    floor = scores.min() + MAX_SCORE_DIFFERENCE if len(boxes) == limit else -math.inf
    better = scores[:, None] >= certain.scores - MAX_SCORE_DIFFERENCE
    overlapped = box_iou(boxes, certain.boxes) > nms_iou - MAX_IOU_DIFFERENCE
    itself = (boxes[:, None] - certain.boxes).abs().amax(-1) <= MAX_BOX_DIFFERENCE
    explained = ((groups[:, None] == certain.groups) & better & (overlapped | itself)).any(dim=0)
    if together.triu(diagonal=1).any() or not (explained | (certain.scores <= floor)).all():
        nearest = math.inf
    return Differences(nearest, moved)


def largest_differences(
    predictions: Predictions, images: ImageBatch, boxes: Tensor, scores: Tensor, labels: Tensor
) -> Differences:
    """Compute how far detections are from the best ones of the predictions.

    Args:
        predictions: logits (B, Q, K), boxes (B, Q, 4) cxcywh in [0, 1].
        images: batch whose sizes the boxes are scaled by.
        boxes, scores, labels: (B, n, 4) xyxy pixels, (B, n) descending, (B, n).

    Returns:
        for scores, the largest difference rank by rank; for boxes, the largest distance of a detection to the nearest
        predicted box with its label and score.
    """
    all_scores = predictions.logits.sigmoid()
    best = all_scores.flatten(1).topk(scores.shape[1], dim=1).values
    extents = torch.tensor(images.sizes).flip(1).repeat(1, 2)[:, None]
    all_boxes = box_convert(predictions.boxes, "cxcywh", "xyxy").clamp(0, 1) * extents
    of_label = all_scores.gather(2, labels[:, None].expand(-1, all_scores.shape[1], -1))  # (B, Q, n)
    apart = (all_boxes[:, :, None] - boxes[:, None]).abs().amax(-1)
    apart = apart.masked_fill((of_label - scores[:, None]).abs() > MAX_SCORE_DIFFERENCE, torch.inf)
    return Differences(float(apart.amin(1).max()), float((scores - best).abs().max()))


def match_best(exact: dict[str, Tensor], found: dict[str, Tensor], count: int, min_iou: float = 0.5) -> Match:
    """Compare the best detections of a batch with those of a file of lower precision, which may rank otherwise.

    Args:
        exact, found: boxes (B, n, 4) xyxy pixels, scores and labels (B, n), of which those of score `NOTHING` are none.
        count: number of detections of an image that are looked for.
        min_iou: overlap with a detection of the same label from which on it is the same.

    Returns:
        The largest differences, in pixels and in scores, of those that are there.
    """
    total, matched, boxes_apart, scores_apart = 0, 0, 0.0, 0.0
    for image in range(len(exact["scores"])):
        own, other = ({name: part[name][image] for name in OUTPUTS} for part in (exact, found))
        best = own["scores"].topk(min(count, len(own["scores"]))).indices
        best = best[own["scores"][best] >= 0]
        overlap = box_iou(own["boxes"][best], other["boxes"])
        alike = (own["labels"][best][:, None] == other["labels"]) & (other["scores"] >= 0)
        iou, index = overlap.masked_fill(~alike, -1.0).max(dim=1)
        there = iou >= min_iou
        total, matched = total + len(best), matched + int(there.sum())
        if there.any():
            apart = [(own[name][best][there] - other[name][index[there]]).abs().max() for name in ("boxes", "scores")]
            boxes_apart, scores_apart = max(boxes_apart, float(apart[0])), max(scores_apart, float(apart[1]))
    return Match(total, matched, boxes_apart, scores_apart)
