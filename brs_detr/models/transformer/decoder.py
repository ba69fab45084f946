"""Deformable decoder with iterative box refinement and look-forward-twice (Deformable DETR A.4; DINO, section 3.4).

The same decoder serves the main queries and, in training, the auxiliary queries of the dense heads, all in one pass:
the sets differ in nothing but whom a query attends to: the queries of its own set, and those of denoising to their
group and the main queries.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torchvision.ops import box_convert

from brs_detr.losses.classification import PRIOR_BIAS
from brs_detr.models.transformer.attention import DeformableAttention, FeedForward, inverse_sigmoid, sine_of_boxes
from brs_detr.models.transformer.encoder import Memory
from brs_detr.ops.anchors import take_rows


def box_regressor(dim: int) -> nn.Sequential:
    """Build a three-layer perceptron to four box deltas; its last layer is zero, so boxes start at their references."""
    # In this order, in which the layers draw their initial weights.
    first, second, last = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def classifier(dim: int, num_classes: int) -> nn.Linear:
    """Build a linear sigmoid classifier that starts at a probability of 0.01."""
    layer = nn.Linear(dim, num_classes)
    nn.init.constant_(layer.bias, PRIOR_BIAS)
    return layer


class Predictions(NamedTuple):
    """Logits and boxes of queries or tokens.

    Attributes:
        logits: (..., B, Q, K) float32.
        boxes: (..., B, Q, 4) cxcywh in [0, 1] of each image, float32.
    """

    logits: Tensor
    boxes: Tensor

    def split(self, counts: Sequence[int]) -> list[Predictions]:
        """Split the queries into sets of `counts` that lie one after the other."""
        sets = zip(self.logits.split(list(counts), dim=-2), self.boxes.split(list(counts), dim=-2), strict=True)
        return [Predictions(*one) for one in sets]


def best_pairs(predictions: Predictions, max_detections: int) -> tuple[Tensor, Tensor, Tensor]:
    """Select the `max_detections` best (query, class) pairs of each image, without NMS.

    Args:
        predictions: logits (B, Q, K), boxes (B, Q, 4) cxcywh in [0, 1].
        max_detections: pairs to keep an image; fewer where there are fewer.

    Returns:
        boxes (B, n, 4) xyxy in [0, 1], scores (B, n), labels (B, n), best first.
    """
    scores = rearrange(predictions.logits.sigmoid(), "b q k -> b (q k)")
    scores, index = scores.topk(min(max_detections, scores.shape[1]), dim=1)
    classes = predictions.logits.shape[-1]
    boxes = take_rows(box_convert(predictions.boxes, "cxcywh", "xyxy").clamp(0, 1), index // classes)
    return boxes, scores, index % classes


class QuerySet(NamedTuple):
    """Queries of a pass that attend to each other and not to those of other sets.

    Attributes:
        queries: number of them.
        visible: None; or (B or 1, n, n + m) bool for a set of n that also attends to the m queries of the first set:
            True where a query attends to one of its own set or, behind these, of the first.
    """

    queries: int
    visible: Tensor | None = None


class SelfAttention(nn.MultiheadAttention):
    """Self-attention of sets of queries that lie one after the other.

    The projections are those of all queries together, so a further set costs no more than its attention.

    Args:
        dim: width of the queries.
        heads: attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, batch_first=True)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def forward(  # type: ignore[override]  # torch's has one set, and asks for the keys
        self, query: Tensor, value: Tensor, sets: Sequence[QuerySet] | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, dim), position added; the keys, too.
            value: (B, Q, dim).
            sets: the sets, Q queries in all; None: they are one set.

        Returns:
            (B, Q, dim).
        """
        dim, heads = self.embed_dim, self.num_heads
        weights, biases = self.in_proj_weight.split([2 * dim, dim]), self.in_proj_bias.split([2 * dim, dim])
        both, values = linear(query, weights[0], biases[0]), linear(value, weights[1], biases[1])
        queries, keys = both.chunk(2, dim=-1)
        queries, keys, values = (rearrange(x, "b q (h d) -> b h q d", h=heads) for x in (queries, keys, values))
        if sets is None:
            attended = scaled_dot_product_attention(queries, keys, values)
        else:
            counts = [one.queries for one in sets]
            parts = list(zip(*(x.split(counts, dim=2) for x in (queries, keys, values)), strict=True))
            attended = torch.cat([_attend(part, one.visible, parts[0]) for part, one in zip(parts, sets)], dim=2)
        out: Tensor = self.out_proj(rearrange(attended, "b h q d -> b q (h d)"))
        return out


def _attend(own: tuple[Tensor, ...], visible: Tensor | None, first: tuple[Tensor, ...]) -> Tensor:
    """Attend from the queries of a set to its own keys and values or, with a mask, also to those of the first set.

    Args:
        own: queries, keys and values (B, heads, n, d) of the set.
        visible: as of `QuerySet`.
        first: the same of the first set.
    """
    queries, keys, values = own
    if visible is None:
        return scaled_dot_product_attention(queries, keys, values)
    keys, values = torch.cat([keys, first[1]], dim=2), torch.cat([values, first[2]], dim=2)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=visible[:, None])


class BoxPosition(nn.Module):
    """Positions of queries from the boxes that they are at: a perceptron on their sine encoding (DAB-DETR; DINO).

    Args:
        dim: width of the queries; a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.features = dim // 2
        self.first, self.second = nn.Linear(2 * dim, dim), nn.Linear(dim, dim)

    def forward(self, boxes: Tensor) -> Tensor:
        """Map boxes (B, Q, 4) cxcywh in [0, 1] of the padded finest level to positions (B, Q, dim)."""
        x, y, size = boxes.split([1, 1, 2], dim=-1)
        encoded = sine_of_boxes(torch.cat([y, x, size], dim=-1), self.features)  # y first, as released
        out: Tensor = self.second(self.first(encoded).relu())
        return out


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention, feed-forward; each with a residual and then LayerNorm."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, hidden: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(dim, heads)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(dim, heads, levels, points)
        self.cross_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, hidden)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, position: Tensor, references: Tensor, memory: Memory, sets: Sequence[QuerySet] | None = None
    ) -> Tensor:
        """Update the queries x (B, Q, dim), given their position (B, Q, dim) and references (B, Q, L, 4).

        `sets` says which queries attend to each other; None: all do.
        """
        x = self.self_norm(x + self.self_attention(x + position, x, sets))
        attended = self.cross_attention(x + position, memory.tokens, references, memory.shapes, memory.padding)
        x = self.cross_norm(x + attended)
        out: Tensor = self.ffn_norm(x + self.ffn(x))
        return out


class QueryDecoder(nn.Module):
    """Decoder layers, each with its own classifier and box regressor.

    Args:
        dim, heads, levels, points, hidden: sizes of the layers.
        num_classes: K.
        layers: number of layers.
        position: makes the position of each layer's queries from the boxes that they have come to (DINO); None: it is
            given, and the same for all layers.
        norm: of what classifier and regressor read of each layer (DINO); None: they read the layer's output.
        eps: of the inverse sigmoids.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        layers: int = 6,
        heads: int = 8,
        levels: int = 4,
        points: int = 4,
        hidden: int = 2048,
        position: BoxPosition | None = None,
        norm: nn.LayerNorm | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.position, self.norm, self.eps = position, norm, eps
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, levels, points, hidden) for _ in range(layers))
        # All layers start with the same classifier and regressor, as in the official code.
        first_classifier, first_regressor = classifier(dim, num_classes), box_regressor(dim)
        self.classifiers = nn.ModuleList(copy.deepcopy(first_classifier) for _ in range(layers))
        self.regressors = nn.ModuleList(copy.deepcopy(first_regressor) for _ in range(layers))

    def forward(
        self,
        content: Tensor,
        position: Tensor | None,
        references: Tensor,
        memory: Memory,
        sets: Sequence[QuerySet] | None = None,
    ) -> Predictions:
        """Refine boxes layer by layer.

        Args:
            content: (B, Q, dim) of the queries.
            position: (B, Q, dim), the same for every layer; not read where the decoder makes positions itself.
            references: (B, Q, 4) cxcywh, the boxes to refine; detached by the caller.
            memory: of the encoder.
            sets: sets of queries, one after the other, Q in all: each is refined as if it were alone, or alone beside
                the first. None: they are one set.

        Returns:
            Predictions of every layer, (layers, B, Q, ...). Layer l's box keeps the graph of layer l - 1's regressor
            (look forward twice) though its reference is detached. With a norm, what is scored and what the next layer
            starts from differ: only the former is regressed from the normalized queries.
        """
        # References are in [0, 1] of the image, sampling locations in [0, 1] of each padded level.
        ratios = torch.cat([memory.valid_ratios, memory.valid_ratios], -1)[:, None]
        all_logits, all_boxes = [], []
        x, graph_references = content, references
        for layer, classify, regress in zip(self.layers, self.classifiers, self.regressors, strict=True):
            inside = references[:, :, None] * ratios
            x = layer(x, self.position_of(inside, position), inside, memory, sets)
            delta = regress(x).to(references.dtype)
            normed = x if self.norm is None else self.norm(x)
            scored = delta if self.norm is None else regress(normed).to(references.dtype)
            all_logits.append(classify(normed).to(references.dtype))
            all_boxes.append((scored + inverse_sigmoid(graph_references, self.eps)).sigmoid())
            graph_references = (delta + inverse_sigmoid(references, self.eps)).sigmoid()
            references = graph_references.detach()
        return Predictions(torch.stack(all_logits), torch.stack(all_boxes))

    def position_of(self, references: Tensor, given: Tensor | None) -> Tensor:
        """Return the position (B, Q, dim) of queries at references (B, Q, L, 4) of each level, unless it is given."""
        if self.position is None:
            assert given is not None  # a decoder without positions of its own is given them
            return given
        out: Tensor = self.position(references[:, :, 0])
        return out
