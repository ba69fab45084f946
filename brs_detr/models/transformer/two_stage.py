"""Two-stage proposals: every encoder token predicts a score and a box; the best become the decoder's references.

Deformable DETR A.4 with Co-DETR's mixed selection: only the position of a query comes from its proposal, the content is
learned. The class-0 logit alone selects, since the proposals' targets are class-agnostic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from brs_detr.models.transformer.attention import inverse_sigmoid, sine_of_boxes
from brs_detr.models.transformer.decoder import Predictions, box_regressor, classifier
from brs_detr.models.transformer.encoder import Memory, cell_centers
from brs_detr.ops.anchors import take_rows


class Proposals(NamedTuple):
    """predictions over all N tokens; references (B, Q, 4) cxcywh, detached; valid (B, N) bool, may be selected;
    chosen (B, Q) token indices."""

    predictions: Predictions
    references: Tensor
    valid: Tensor
    chosen: Tensor


def token_anchors(memory: Memory) -> tuple[Tensor, Tensor]:
    """One square anchor a token, side 0.05 * 2^level of the image.

    Returns:
        anchors (B, N, 4) cxcywh; valid (B, N) bool: not padded and all four numbers inside (0.01, 0.99).
    """
    anchors = []
    for level, shape in enumerate(memory.shapes):
        centers = cell_centers(shape, memory.valid_sizes[:, level])
        anchors.append(torch.cat([centers, torch.full_like(centers, 0.05 * 2**level)], -1))
    anchors = torch.cat(anchors, 1)
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding
    return anchors, valid


class TwoStageHead(nn.Module):
    """Scores and boxes of all encoder tokens, and the choice among them.

    Unlike the released code, padded and border tokens cannot be chosen: there they share one constant score, so that
    the amount of padding (the batch an image sits in) could change its detections.

    Args:
        dim: width of the tokens.
        num_classes: K; the targets are class-agnostic, yet the released classifier has K columns.
        queries: how many to choose; fewer where the memory has fewer tokens.
    """

    def __init__(self, dim: int, num_classes: int, queries: int = 300) -> None:
        super().__init__()
        self.queries = queries
        self.projection = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.projection.weight)
        self.norm = nn.LayerNorm(dim)
        self.classifier = classifier(dim, num_classes)
        self.regressor = box_regressor(dim)

    def forward(self, memory: Memory) -> Proposals:
        """Score every token and choose the best `queries` of each image by their class-0 logit."""
        anchors, valid = token_anchors(memory)
        unsquashed = torch.log(anchors / (1 - anchors)).masked_fill(~valid[..., None], torch.inf)
        tokens = self.norm(self.projection(memory.tokens.masked_fill(~valid[..., None], 0.0)))
        logits = self.classifier(tokens).to(unsquashed.dtype)
        boxes = (self.regressor(tokens).to(unsquashed.dtype) + unsquashed).sigmoid()
        scores = logits[..., 0].detach().masked_fill(~valid, -torch.inf)
        chosen = scores.topk(min(self.queries, scores.shape[1]), dim=1).indices
        references = take_rows(boxes.detach(), chosen)
        return Proposals(Predictions(logits, boxes), references, valid, chosen)


class BoxEmbedding(nn.Module):
    """Sine encoding of a box, projected: the first `dim` channels place a query, the last `dim` may fill its content.

    Args:
        dim: width of the queries; a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.features = dim // 2
        self.projection = nn.Linear(2 * dim, 2 * dim)
        nn.init.xavier_uniform_(self.projection.weight)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """(B, Q, 4) cxcywh -> position (B, Q, dim), content (B, Q, dim)."""
        # The round trip clamps as the released code does: coordinates outside [1e-5, 1 - 1e-5] embed at the edge.
        inside = inverse_sigmoid(boxes).sigmoid()
        position, content = self.norm(self.projection(sine_of_boxes(inside, self.features))).chunk(2, dim=-1)
        return position, content
