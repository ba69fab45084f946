"""Deformable decoder with iterative box refinement and look-forward-twice (Deformable DETR A.4; DINO, section 3.4).

The same decoder serves the main queries and, in training, the auxiliary queries of the dense heads, all in one pass:
the sets differ in nothing but whom a query attends to, the queries of its own set.
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
from brs_detr.models.transformer.attention import DeformableAttention, FeedForward, inverse_sigmoid
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


class SelfAttention(nn.MultiheadAttention):
    """Self-attention of sets of queries that lie one after the other; each attends to its own set only.

    The projections are those of all queries together, so a further set costs no more than its attention.

    Args:
        dim: width of the queries.
        heads: attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, batch_first=True)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def forward(  # type: ignore[override]  # torch's has one set, and asks for the keys
        self, query: Tensor, value: Tensor, counts: Sequence[int] | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, dim), position added; the keys, too.
            value: (B, Q, dim).
            counts: queries of each set, Q in all; None: they are one set.

        Returns:
            (B, Q, dim).
        """
        dim, heads = self.embed_dim, self.num_heads
        weights, biases = self.in_proj_weight.split([2 * dim, dim]), self.in_proj_bias.split([2 * dim, dim])
        both, values = linear(query, weights[0], biases[0]), linear(value, weights[1], biases[1])
        queries, keys = both.chunk(2, dim=-1)
        queries, keys, values = (rearrange(x, "b q (h d) -> b h q d", h=heads) for x in (queries, keys, values))
        if counts is None:
            attended = scaled_dot_product_attention(queries, keys, values)
        else:
            sets = zip(*(x.split(list(counts), dim=2) for x in (queries, keys, values)), strict=True)
            attended = torch.cat([scaled_dot_product_attention(*one) for one in sets], dim=2)
        out: Tensor = self.out_proj(rearrange(attended, "b h q d -> b q (h d)"))
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
        self, x: Tensor, position: Tensor, references: Tensor, memory: Memory, counts: Sequence[int] | None = None
    ) -> Tensor:
        """Update the queries x (B, Q, dim), given their position (B, Q, dim) and references (B, Q, L, 4).

        `counts` are the queries of each set, which attends to itself only; None: all are one set.
        """
        x = self.self_norm(x + self.self_attention(x + position, x, counts))
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
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, levels, points, hidden) for _ in range(layers))
        # All layers start with the same classifier and regressor, as in the official code.
        first_classifier, first_regressor = classifier(dim, num_classes), box_regressor(dim)
        self.classifiers = nn.ModuleList(copy.deepcopy(first_classifier) for _ in range(layers))
        self.regressors = nn.ModuleList(copy.deepcopy(first_regressor) for _ in range(layers))

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        references: Tensor,
        memory: Memory,
        counts: Sequence[int] | None = None,
    ) -> Predictions:
        """Refine boxes layer by layer.

        Args:
            content, position: (B, Q, dim) of the queries; the position is the same for every layer.
            references: (B, Q, 4) cxcywh, the boxes to refine; detached by the caller.
            memory: of the encoder.
            counts: queries of each set, one set after the other, Q in all: queries attend to those of their own set
                only, so that each set is refined as if it were alone. None: they are one set.

        Returns:
            Predictions of every layer, (layers, B, Q, ...). Layer l's box keeps the graph of layer l - 1's regressor
            (look forward twice) though its reference is detached.
        """
        # References are in [0, 1] of the image, sampling locations in [0, 1] of each padded level.
        ratios = torch.cat([memory.valid_ratios, memory.valid_ratios], -1)[:, None]
        all_logits, all_boxes = [], []
        x, graph_references = content, references
        for layer, classify, regress in zip(self.layers, self.classifiers, self.regressors, strict=True):
            x = layer(x, position, references[:, :, None] * ratios, memory, counts)
            delta = regress(x).to(references.dtype)
            all_logits.append(classify(x).to(references.dtype))
            all_boxes.append((delta + inverse_sigmoid(graph_references)).sigmoid())
            graph_references = (delta + inverse_sigmoid(references)).sigmoid()
            references = graph_references.detach()
        return Predictions(torch.stack(all_logits), torch.stack(all_boxes))
