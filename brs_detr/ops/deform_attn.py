"""Multi-scale deformable attention sampling (Deformable DETR, Zhu et al. 2021, Eq. 3) in plain torch.

Each query reads a few bilinear samples of every feature level and sums them with its own weights. One `grid_sample` a
level does the reading; nothing is compiled, and every floating dtype and device that torch supports will do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from brs_detr.ops.images import Size


def deformable_sampling(value: Tensor, shapes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples over all levels and points.

    Args:
        value: (B, N, heads, dim) tokens of all levels, row-major, one level after the other; N = sum of h * w.
        shapes: (h, w) of each of the L levels, host integers.
        locations: (B, Q, heads, L, points, 2) as (x, y) in [0, 1] of the padded map; samples outside read zeros.
        weights: (B, Q, heads, L, points), normally summing to 1 over levels and points.

    Returns:
        (B, Q, heads * dim) in value's dtype. Half-precision values are sampled and summed in float32.

    Raises:
        ValueError: the level shapes do not add up to N.
    """
    batch, tokens, heads, dim = value.shape
    queries = locations.shape[1]
    lengths = [h * w for h, w in shapes]
    if sum(lengths) != tokens:
        raise ValueError(f"levels {list(shapes)} hold {sum(lengths)} tokens, the value tensor has {tokens}")
    compute = torch.promote_types(value.dtype, torch.float32)
    with torch.autocast(value.device.type, enabled=False):
        # (B * heads, L, Q, points, 2): grid_sample wants one picture a head, and coordinates in [-1, 1].
        grids = (2 * locations.to(compute) - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)
        shares = weights.to(compute).permute(0, 2, 3, 1, 4).flatten(0, 1)
        total = value.new_zeros(batch * heads, dim, queries, dtype=compute)
        for level, (tokens_of_level, (h, w)) in enumerate(zip(value.split(lengths, dim=1), shapes, strict=True)):
            picture = tokens_of_level.to(compute).permute(0, 2, 3, 1).reshape(batch * heads, dim, h, w)
            samples = F.grid_sample(picture, grids[:, level], padding_mode="zeros", align_corners=False)
            total = total + (samples * shares[:, level].unsqueeze(1)).sum(-1)
    return total.reshape(batch, heads * dim, queries).transpose(1, 2).to(value.dtype)
