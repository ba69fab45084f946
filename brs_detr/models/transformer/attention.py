"""Parts of encoder and decoder layers: deformable attention, the feed-forward block, sine encodings, inverse sigmoid.

Encodings and sampling locations are computed in float32 (or wider), also under autocast: padded columns divide by 1e-6,
and a coordinate in bf16 would be off by several cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from brs_detr.ops.deform_attn import deformable_attention
from brs_detr.ops.images import Size

Sampling = Callable[[Tensor, Sequence[Size], Tensor, Tensor, Tensor], Tensor]


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, Eq. 3) with its projections.

    Initially every head samples along its own direction, point p at p + 1 cells, with equal weights (the original
    initialization), so training starts from a fixed star-shaped pattern.

    Args:
        dim: width of queries and values.
        heads: attention heads; must divide `dim`.
        levels: feature levels.
        points: samples per head and level.
    """

    def __init__(self, dim: int, heads: int = 8, levels: int = 4, points: int = 4) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"model.dim={dim}: not a multiple of model.heads={heads}.")
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling: Sampling = deformable_attention
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize with star-shaped offsets, equal weights and Xavier projections."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        star = directions[:, None, None, :] * steps[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(repeat(star, "h 1 p xy -> (h l p xy)", l=self.levels))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: Tensor, tokens: Tensor, references: Tensor, shapes: Sequence[Size], padding: Tensor
    ) -> Tensor:
        """Attend from each query to the samples around its reference.

        Args:
            query: (B, Q, dim), position already added.
            tokens: (B, N, dim) memory of all levels.
            references: (B, Q, L, 2) points or (B, Q, L, 4) cxcywh boxes, in [0, 1] of each padded level.
            shapes: (h, w) of each level.
            padding: (B, N) bool, True where a token is padding; such tokens read as zero.

        Returns:
            (B, Q, dim).
        """
        value = self.value_proj(tokens).masked_fill(padding[..., None], 0.0)
        value = rearrange(value, "b n (h d) -> b n h d", h=self.heads)
        offsets, logits = self.sampling_offsets(query), self.attention_weights(query)
        out: Tensor = self.output_proj(self.sampling(value, shapes, references, offsets, logits))
        return out


def use_sampling(model: nn.Module, sampling: Sampling) -> None:
    """Make all deformable attention in `model` use `sampling`, another implementation of `deformable_attention`."""
    for module in model.modules():
        if isinstance(module, DeformableAttention):
            module.sampling = sampling


class FeedForward(nn.Module):
    """Linear, ReLU, Linear; the layer adds the residual.

    Args:
        dim: width in and out.
        hidden: width between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden)
        self.contract = nn.Linear(hidden, dim)
        for layer in (self.expand, self.contract):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        out: Tensor = self.contract(self.expand(x).relu())
        return out


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute log(x / (1 - x)) with x clamped to [0, 1] and both terms to at least `eps`; any shape."""
    x = x.clamp(0.0, 1.0)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def _frequencies(features: int, like: Tensor, temperature: float) -> Tensor:
    """Return the divisors (features,) of the angles; each sine and its cosine share one."""
    pairs = torch.arange(features, device=like.device) // 2
    divisors: Tensor = temperature ** (2 * pairs.to(like.dtype) / features)
    return divisors


def _interleave(angles: Tensor) -> Tensor:
    """Map angles (..., F) to sines in even channels and cosines in odd ones."""
    return rearrange([angles[..., 0::2].sin(), angles[..., 1::2].cos()], "sincos ... f -> ... (f sincos)")


def sine_of_cells(padding: Tensor, features: int, *, temperature: float = 10000.0, offset: float = -0.5) -> Tensor:
    """Encode each cell's position among the unpadded cells of its image with sines.

    Args:
        padding: (B, h, w) bool, True where padded.
        features: channels for y, and again for x.
        temperature: base of the wavelengths.
        offset: added to the 1-based cell count before dividing by the extent.

    Returns:
        (B, 2 * features, h, w) float32, y's channels first.
    """
    valid = (~padding).float()
    y = valid.cumsum(1)
    x = valid.cumsum(2)
    # Normalized by the last count, the unpadded extent, so that the encoding does not depend on the padding.
    y = (y + offset) / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = (x + offset) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    waves = _frequencies(features, y, temperature)
    encoded = torch.cat([_interleave(y[..., None] / waves), _interleave(x[..., None] / waves)], dim=-1)
    return rearrange(encoded, "b y x d -> b d y x")


def sine_of_boxes(boxes: Tensor, features: int, *, temperature: float = 10000.0) -> Tensor:
    """Encode the four box coordinates with sines, in the order cx, cy, w, h.

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
        features: channels per coordinate.

    Returns:
        (..., 4 * features) in boxes' dtype, at least float32.
    """
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    waves = _frequencies(features, boxes, temperature)
    return _interleave(boxes[..., None] * (2 * math.pi) / waves).flatten(-2)
