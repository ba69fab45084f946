"""Two-stage proposals: every encoder token predicts a score and a box; the best become the decoder's references.

Deformable DETR A.4 with Co-DETR's mixed selection: only the position of a query comes from its proposal, its content is
learned. Co-DETR's proposals are class-agnostic: all tokens learn, with column 0 for every object, and are ranked by it
alone. Co-DINO's have classes: tokens are ranked by their best class, and only the chosen ones learn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from brs_detr.models.transformer.attention import inverse_sigmoid, sine_of_boxes
from brs_detr.models.transformer.decoder import Predictions, box_regressor, classifier
from brs_detr.models.transformer.encoder import Memory, cell_centers
from brs_detr.ops.anchors import take_rows
from brs_detr.ops.boxes import kept_in_segments

Keep = Callable[[Tensor, float], Tensor]
CANDIDATES = 10  # tokens a query among which overlapping ones are looked for


class Proposals(NamedTuple):
    """Predictions of all encoder tokens and the selected ones.

    Attributes:
        predictions: of the tokens that learn, all N or the Q selected.
        references: (B, Q, 4) cxcywh, boxes of the selected tokens, detached.
        chosen: (B, Q) indices of the selected tokens.
    """

    predictions: Predictions
    references: Tensor
    chosen: Tensor


def token_anchors(memory: Memory) -> tuple[Tensor, Tensor]:
    """Make one square anchor per token, of side 0.05 * 2^level of the image.

    Returns:
        anchors (B, N, 4) cxcywh; valid (B, N) bool: not padded and all four numbers inside (0.01, 0.99).
    """
    squares = []
    for level, shape in enumerate(memory.shapes):
        centers = cell_centers(shape, memory.valid_sizes[:, level])
        squares.append(torch.cat([centers, torch.full_like(centers, 0.05 * 2**level)], -1))
    anchors = torch.cat(squares, 1)
    # Near 0 and 1 the inverse sigmoid of an anchor would be too large to be corrected by a delta.
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding
    return anchors, valid


def kept_by_nms(boxes: Tensor, iou: float) -> Tensor:
    """Return which boxes (B, n, 4) xyxy of each image, best first, overlap no better one by more than `iou`: (B, n)."""
    falling = torch.arange(boxes.shape[1], 0, -1, device=boxes.device, dtype=boxes.dtype).expand(boxes.shape[:2])
    return kept_in_segments(boxes, falling, [boxes.shape[1]], iou)


def demote_overlapping(scores: Tensor, boxes: Tensor, iou: float, candidates: int, keep: Keep = kept_by_nms) -> Tensor:
    """Lower the scores of boxes that overlap a better one, as NMS finds them, below those of all other candidates.

    Without it most queries of a detector that has not been trained for long start at the same few objects: several
    tokens of an object score high, since only long training teaches the encoder to prefer one (DETA, Ouyang-Zhang et
    al. 2022, section 3.2).

    Args:
        scores: (B, N) logits; -inf where a token may not be selected.
        boxes: (B, N, 4) cxcywh in [0, 1].
        iou: overlap from which a box is suppressed.
        candidates: the best tokens of each image that take part; the others become -inf.
        keep: finds the boxes that stay.

    Returns:
        (B, N) scores whose order is: the kept candidates, then the suppressed ones, both as before; then the rest.
    """
    best, index = scores.topk(min(candidates, scores.shape[1]), dim=1)
    corners = box_convert(take_rows(boxes, index), "cxcywh", "xyxy").float()
    # Ranks and not scores: nothing is lost to rounding, whatever the range of the logits.
    length = index.shape[1]
    rank = torch.arange(length, device=scores.device)
    # no product with `length`, a symbol in an exported graph of any size, which ONNX could not write
    rank = torch.where(keep(corners, iou), rank, rank + length)
    lowered = torch.full_like(scores, -torch.inf)
    return lowered.scatter(1, index, torch.where(best.isneginf(), best, -rank.to(scores)))


class TwoStageHead(nn.Module):
    """Scores and boxes of all encoder tokens, and the selection of the best.

    Unlike in the released code, padded and border tokens cannot be selected: there they share one constant score, so
    that the amount of padding (the other images of the batch) could change an image's detections.

    Args:
        dim: width of the tokens.
        num_classes: K, the columns of the classifier; with class-agnostic proposals too, as released.
        queries: number of tokens to select; all if the memory has fewer.
        nms_iou: tokens whose box overlaps that of a better one by more are selected last; None: by their score alone.
        class_agnostic: the proposals are class-agnostic.

    Attributes:
        refuse_invalid: False to select padded and border tokens as the released code does.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        queries: int = 300,
        nms_iou: float | None = None,
        *,
        class_agnostic: bool = True,
    ) -> None:
        super().__init__()
        self.queries, self.nms_iou, self.class_agnostic = queries, nms_iou, class_agnostic
        self.refuse_invalid = True
        self.keep: Keep = kept_by_nms  # an exported detector has another one
        self.projection = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.projection.weight)
        self.norm = nn.LayerNorm(dim)
        self.classifier = classifier(dim, num_classes)
        self.regressor = box_regressor(dim)

    def predict(self, memory: Memory) -> tuple[Predictions, Tensor]:
        """Return logits (B, N, K) and boxes (B, N, 4) of all tokens, and which of them (B, N) may be selected."""
        anchors, valid = token_anchors(memory)
        # Infinite for invalid tokens: their boxes become constant and get no gradient.
        unsquashed = torch.log(anchors / (1 - anchors)).masked_fill(~valid[..., None], torch.inf)
        tokens = self.norm(self.projection(memory.tokens.masked_fill(~valid[..., None], 0.0)))
        logits = self.classifier(tokens).to(unsquashed.dtype)
        return Predictions(logits, (self.regressor(tokens).to(unsquashed.dtype) + unsquashed).sigmoid()), valid

    def scores(self, logits: Tensor) -> Tensor:
        """Return the logits (B, N) that tokens of logits (B, N, K) are ranked by, detached."""
        return logits.detach()[..., 0] if self.class_agnostic else logits.detach().amax(-1)

    def forward(self, memory: Memory) -> Proposals:
        """Score every token and select the best `queries` of each image."""
        (logits, boxes), valid = self.predict(memory)
        scores = self.scores(logits)
        if self.refuse_invalid:
            scores = scores.masked_fill(~valid, -torch.inf)
        if self.nms_iou is not None:
            scores = demote_overlapping(scores, boxes.detach(), self.nms_iou, CANDIDATES * self.queries, self.keep)
        chosen = scores.topk(min(self.queries, scores.shape[1]), dim=1).indices
        if not self.class_agnostic:
            logits, boxes = take_rows(logits, chosen), take_rows(boxes, chosen)
            return Proposals(Predictions(logits, boxes), boxes.detach(), chosen)
        return Proposals(Predictions(logits, boxes), take_rows(boxes.detach(), chosen), chosen)

    def with_regions(self, regions: Tensor, valid: Tensor, references: Tensor) -> Tensor:
        """Choose references among regions first and then among those of the tokens, in this order.

        With `nms_iou` those that overlap an earlier one are chosen last.

        Args:
            regions: (B, m, 4) cxcywh in [0, 1], best first.
            valid: (B, m) bool, False where there is none.
            references: (B, Q, 4) of the tokens.

        Returns:
            (B, Q, 4), detached.
        """
        boxes = torch.cat([regions, references], dim=1).detach()
        number, count = boxes.shape[1], references.shape[1]
        scores = torch.arange(number, 0, -1, device=boxes.device, dtype=boxes.dtype).expand(boxes.shape[:2])
        missing = torch.cat([~valid, valid.new_zeros(valid.shape[0], count)], dim=1)
        scores = scores.masked_fill(missing, -torch.inf)
        if self.nms_iou is not None:
            scores = demote_overlapping(scores, boxes, self.nms_iou, number, self.keep)
        return take_rows(boxes, scores.topk(count, dim=1).indices)


class BoxEmbedding(nn.Module):
    """Projected sine encoding of boxes.

    Args:
        dim: width of the queries; a multiple of 4.
        parts: vectors to make of a box: 2, its query's position and what may be used as its content; or 1.
    """

    def __init__(self, dim: int, parts: int = 2) -> None:
        super().__init__()
        self.features, self.parts = dim // 2, parts
        self.projection = nn.Linear(2 * dim, parts * dim)
        nn.init.xavier_uniform_(self.projection.weight)
        self.norm = nn.LayerNorm(parts * dim)

    def forward(self, boxes: Tensor) -> tuple[Tensor, ...]:
        """Embed (B, Q, 4) cxcywh boxes as `parts` vectors (B, Q, dim)."""
        # The round trip clamps coordinates to [1e-5, 1 - 1e-5], as the released code does.
        inside = inverse_sigmoid(boxes).sigmoid()
        embedded: Tensor = self.norm(self.projection(sine_of_boxes(inside, self.features)))
        return embedded.chunk(self.parts, dim=-1)
