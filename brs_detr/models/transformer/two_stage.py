"""Two-stage proposals: every encoder token predicts a score and a box; the best become the decoder's references.

Deformable DETR A.4 with Co-DETR's mixed selection: only the position of a query comes from its proposal, its content is
learned. Tokens are ranked by the class-0 logit alone, since the proposals' targets are class-agnostic.
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
    """Predictions of all encoder tokens and the selected ones.

    Attributes:
        predictions: of all N tokens.
        references: (B, Q, 4) cxcywh, boxes of the selected tokens, detached.
        valid: (B, N) bool, tokens that may be selected.
        chosen: (B, Q) indices of the selected tokens.
    """

    predictions: Predictions
    references: Tensor
    valid: Tensor
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


class TwoStageHead(nn.Module):
    """Scores and boxes of all encoder tokens, and the selection of the best.

    Unlike in the released code, padded and border tokens cannot be selected: there they share one constant score, so
    that the amount of padding (the other images of the batch) could change an image's detections.

    Args:
        dim: width of the tokens.
        num_classes: K; the targets are class-agnostic, yet the released classifier has K columns.
        queries: number of tokens to select; all if the memory has fewer.
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
        """Score every token and select the best `queries` of each image by their class-0 logit."""
        anchors, valid = token_anchors(memory)
        # Infinite for invalid tokens: their boxes become constant and get no gradient.
        unsquashed = torch.log(anchors / (1 - anchors)).masked_fill(~valid[..., None], torch.inf)
        tokens = self.norm(self.projection(memory.tokens.masked_fill(~valid[..., None], 0.0)))
        logits = self.classifier(tokens).to(unsquashed.dtype)
        boxes = (self.regressor(tokens).to(unsquashed.dtype) + unsquashed).sigmoid()
        scores = logits[..., 0].detach().masked_fill(~valid, -torch.inf)
        chosen = scores.topk(min(self.queries, scores.shape[1]), dim=1).indices
        references = take_rows(boxes.detach(), chosen)
        return Proposals(Predictions(logits, boxes), references, valid, chosen)


class BoxEmbedding(nn.Module):
    """Projected sine encoding of boxes: `dim` channels for a query's position, `dim` that may be used as its content.

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
        """Embed (B, Q, 4) cxcywh boxes as position (B, Q, dim) and content (B, Q, dim)."""
        # The round trip clamps coordinates to [1e-5, 1 - 1e-5], as the released code does.
        inside = inverse_sigmoid(boxes).sigmoid()
        position, content = self.norm(self.projection(sine_of_boxes(inside, self.features))).chunk(2, dim=-1)
        return position, content
