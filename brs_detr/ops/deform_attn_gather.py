"""Multi-scale deformable sampling from plain indexing, for graphs that must run where `grid_sample` does not.

Exported, `grid_sample` becomes ONNX's GridSample, which some runtimes lack and some versions of others compute wrongly.
Here each location's four neighbors are rows of one table of tokens, summed with their bilinear weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brs_detr.ops.deform_attn import sampling_points
from brs_detr.ops.images import Size, level_sizes


def gathered_attention(
    value: Tensor, shapes: Sequence[Size], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Compute the same as `deform_attn.deformable_attention`, whose arguments these are; (B, Q, heads * dim)."""
    return gathered_sampling(value, shapes, *sampling_points(shapes, value.shape[2], references, offsets, logits))


def gathered_sampling(value: Tensor, shapes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """Compute the same as `deform_attn.deformable_sampling`, gradients included, with more memory.

    Arguments, result and errors are described there: value (B, N, heads, dim), locations (B, Q, heads, L, points, 2),
    weights (B, Q, heads, L, points) -> (B, Q, heads * dim).
    """
    batch, tokens, heads, dim = value.shape
    lengths = [h * w for h, w in shapes]
    if sum(lengths) != tokens:
        raise ValueError(f"levels {list(shapes)} hold {sum(lengths)} tokens, the value tensor has {tokens}")
    compute, device = torch.promote_types(value.dtype, torch.float32), value.device
    with torch.autocast(device.type, enabled=False):
        locations, weights = locations.to(compute), weights.to(compute)
        table = value.to(compute).reshape(batch * tokens * heads, dim)
        widths, heights = level_sizes(shapes, locations)[:, :, None].unbind(1)  # (L, 1) each, beside (..., L, points)
        starts = torch.tensor([sum(lengths[:level]) for level in range(len(lengths))]).to(device)[:, None]
        first = torch.arange(batch, device=device).view(batch, 1, 1, 1, 1) * tokens + starts
        head = torch.arange(heads, device=device).view(heads, 1, 1)
        # Cell i has its center at i + 0.5, hence - 0.5; neighbors outside the level get weight 0.
        columns = neighbors(locations[..., 0] * widths - 0.5, widths)
        total = value.new_zeros(batch, locations.shape[1], heads, dim, dtype=compute)
        for row, row_share in neighbors(locations[..., 1] * heights - 0.5, heights):
            for column, column_share in columns:
                index = (first + row * widths.long() + column) * heads + head
                samples = table.index_select(0, index.flatten()).view(*index.shape[:3], -1, dim)
                shares = (row_share * column_share * weights).flatten(3)
                total = total + (shares.unsqueeze(-2) @ samples).squeeze(-2)
    return total.flatten(2).to(value.dtype)


def neighbors(positions: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the cells before and after each position on an axis, and their linear weights.

    Args:
        positions: any shape, in cells; cell i lies at i.
        lengths: cells on the axis, to broadcast with the positions.

    Returns:
        (cells, weights) of both: cells int64, clamped to the axis, and weight 0 where they lay outside.
    """
    before = positions.floor()
    share = positions - before
    pairs = []
    for cells, weights in ((before, 1 - share), (before + 1, share)):
        inside = (cells >= 0) & (cells < lengths)
        pairs.append((cells.clamp(min=0).minimum(lengths - 1).long(), weights * inside))
    return pairs
