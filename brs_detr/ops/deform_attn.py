"""Multi-scale deformable attention (Deformable DETR, Zhu et al. 2021, Eq. 3) without its projections, in plain torch.

Each query reads a few bilinear samples of every feature level and sums them with its own weights. One `grid_sample` per
level reads them; nothing is compiled, and every floating dtype and device that torch supports works.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from brs_detr.ops.images import Size, level_sizes


def deformable_attention(
    value: Tensor, shapes: Sequence[Size], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Attend from each query to samples around its reference.

    Args:
        value: (B, N, heads, dim) tokens of all levels, row-major, one level after the other; N = sum of h * w.
        shapes: (h, w) of each of the L levels, host integers.
        references: (B, Q, L, 2) points or (B, Q, L, 4) cxcywh boxes, in [0, 1] of each padded level.
        offsets: (B, Q, heads * L * points * 2) from the references as (x, y), in cells of a level around a point;
            around a box, one of `points` is half a side.
        logits: (B, Q, heads * L * points) of the weights, before the softmax over a head's levels and points.

    Returns:
        (B, Q, heads * dim) in value's dtype.

    Raises:
        ValueError: the level shapes do not add up to N.
    """
    return deformable_sampling(value, shapes, *sampling_points(shapes, value.shape[2], references, offsets, logits))


def sampling_points(
    shapes: Sequence[Size], heads: int, references: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute where `deformable_attention` samples, and the weights of the samples, from its arguments.

    Returns:
        locations (B, Q, heads, L, points, 2) as (x, y) in [0, 1] of the padded maps, and weights (B, Q, heads, L,
        points); at least float32.
    """
    # Float32 also under autocast: bf16 has too few digits for a coordinate on a large map.
    compute = torch.promote_types(offsets.dtype, torch.float32)
    sizes = {"h": heads, "l": len(shapes)}
    offsets = rearrange(offsets.to(compute), "b q (h l p xy) -> b q h l p xy", xy=2, **sizes)
    # The softmax is over all levels and points of a head together.
    weights = rearrange(logits.to(compute), "b q (h samples) -> b q h samples", h=heads).softmax(-1)
    weights = rearrange(weights, "b q h (l p) -> b q h l p", l=len(shapes))
    centers = references[:, :, None, :, None, :2]
    if references.shape[-1] == 2:
        return centers + offsets / level_sizes(shapes, offsets)[:, None], weights
    # An offset of `points` is half a box side, so the initial pattern reaches the box's border (A.4).
    return centers + offsets / offsets.shape[4] * references[:, :, None, :, None, 2:] * 0.5, weights


def deformable_sampling(value: Tensor, shapes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """Sum bilinear samples over all levels and points, weighted.

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
    # bf16 locations would be off by cells on a large map, and sums of many samples would lose their digits.
    compute = torch.promote_types(value.dtype, torch.float32)
    with torch.autocast(value.device.type, enabled=False):
        # To grid_sample each (image, head) is an image of its own; it wants coordinates in [-1, 1].
        grids = rearrange(2 * locations.to(compute) - 1, "b q h l p xy -> (b h) l q p xy")
        shares = rearrange(weights.to(compute), "b q h l p -> (b h) l q p")
        total = value.new_zeros(batch * heads, dim, queries, dtype=compute)
        for level, (tokens_of_level, (h, w)) in enumerate(zip(value.split(lengths, dim=1), shapes, strict=True)):
            image = rearrange(tokens_of_level.to(compute), "b (y x) h d -> (b h) d y x", y=h, x=w)
            # Not aligned to corners: 0 and 1 are the outer edges of the border cells, not their centers.
            samples = F.grid_sample(image, grids[:, level], padding_mode="zeros", align_corners=False)
            total = total + (samples * shares[:, level].unsqueeze(1)).sum(-1)
    return rearrange(total, "(b h) d q -> b q (h d)", h=heads).to(value.dtype)
