"""Sine encodings: of cells under a padding mask, and of boxes; and the inverse sigmoid that boxes are refined in.

All of it runs in float32 (or wider), also under autocast: padded columns divide by 1e-6, and a coordinate in bf16 would
be off by whole cells.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) with x clamped to [0, 1] and both parts floored at `eps`. Any shape."""
    x = x.clamp(0.0, 1.0)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def _frequencies(features: int, like: Tensor, temperature: float) -> Tensor:
    pairs = torch.arange(features, device=like.device) // 2
    return temperature ** (2 * pairs.to(like.dtype) / features)


def _interleave(angles: Tensor) -> Tensor:
    """(..., F) angles -> sine in even channels, cosine in odd ones."""
    return rearrange([angles[..., 0::2].sin(), angles[..., 1::2].cos()], "sincos ... f -> ... (f sincos)")


def sine_of_cells(padding: Tensor, features: int, *, temperature: float = 10000.0, offset: float = -0.5) -> Tensor:
    """Sine encoding of each cell's place among the unpadded cells of its picture.

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
    y = (y + offset) / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = (x + offset) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    waves = _frequencies(features, y, temperature)
    encoded = torch.cat([_interleave(y[..., None] / waves), _interleave(x[..., None] / waves)], dim=-1)
    return rearrange(encoded, "b y x d -> b d y x")


def sine_of_boxes(boxes: Tensor, features: int, *, temperature: float = 10000.0) -> Tensor:
    """Sine encoding of the four box coordinates, in the order cx, cy, w, h.

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
        features: channels a coordinate.

    Returns:
        (..., 4 * features) in boxes' dtype, at least float32.
    """
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    waves = _frequencies(features, boxes, temperature)
    return _interleave(boxes[..., None] * (2 * math.pi) / waves).flatten(-2)
