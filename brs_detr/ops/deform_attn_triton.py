"""Multi-scale deformable sampling as one Triton kernel forward and one backward.

The plain torch version keeps every sample of every query for the backward pass, (B, heads, Q, dim, points) per level;
here they stay in registers and are read again for the gradient, so that only the inputs are kept. Triton compiles at
the first call; nothing is compiled at installation.
"""

# Triton kernels cannot be typed: their arguments are pointers and blocks of a language of its own.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from brs_detr.ops.deform_attn import deformable_sampling
from brs_detr.ops.images import Size

QUERIES_PER_PROGRAM = 16  # with 32 the backward kernel runs out of registers


def fused_sampling(value: Tensor, shapes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample by `triton_sampling` on a GPU, and by the torch version on a CPU or in float64: a model runs on both."""
    if not value.is_cuda or value.dtype == torch.float64:
        return deformable_sampling(value, shapes, locations, weights)
    return triton_sampling(value, shapes, locations, weights)


def triton_sampling(value: Tensor, shapes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """Compute the same as `deform_attn.deformable_sampling`, on a GPU.

    The gradient of `value` is summed with atomic additions in float32, so its last bits depend on their order.
    Arguments and result are described there: value (B, N, heads, dim) of float32 or half precision, locations
    (B, Q, heads, L, points, 2), weights (B, Q, heads, L, points) -> (B, Q, heads * dim), summed in float32.

    Raises:
        ValueError: the level shapes do not add up to N, or value is float64.
    """
    if sum(h * w for h, w in shapes) != value.shape[1]:
        raise ValueError(f"levels {list(shapes)} do not hold the {value.shape[1]} tokens of the value tensor")
    if value.dtype == torch.float64:
        raise ValueError("the Triton kernel sums in float32; use the torch version for float64")
    with torch.cuda.device_of(value):  # Triton launches on the current device, which may be another GPU
        result: Tensor = _Sampling.apply(value, locations.float(), weights.float(), tuple(map(tuple, shapes)))
    return result


class _Sampling(torch.autograd.Function):
    """The autograd function of both kernels."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, shapes: tuple[Size, ...]) -> Tensor:
        value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
        batch, tokens, heads, dim = value.shape
        queries, levels, points = locations.shape[1], len(shapes), locations.shape[4]
        out = value.new_empty(batch, queries, heads * dim)
        ctx.table, ctx.sizes = _level_table(shapes, value.device), (tokens, queries, heads, dim, levels, points)
        ctx.save_for_backward(value, locations, weights)
        _forward[_grid(batch, heads, queries)](value, ctx.table, locations, weights, out, *ctx.sizes, **_blocks(dim))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        value, locations, weights = ctx.saved_tensors
        # Float32 zeros: half precision would lose most of the many small additions.
        of_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
        of_locations, of_weights = torch.empty_like(locations), torch.empty_like(weights)
        grid = _grid(value.shape[0], value.shape[2], locations.shape[1])
        inputs = (value, ctx.table, locations, weights, gradient.contiguous())
        _backward[grid](*inputs, of_value, of_locations, of_weights, *ctx.sizes, **_blocks(value.shape[3]))
        return of_value.to(value.dtype), of_locations, of_weights, None


@lru_cache(maxsize=1024)
def _level_table(shapes: tuple[Size, ...], device: torch.device) -> Tensor:
    """Return (L, 3) int32: height, width and first token of each level; cached, which saves a copy per step."""
    rows, start = [], 0
    for height, width in shapes:
        rows.append((height, width, start))
        start += height * width
    with torch.inference_mode(False):  # a cached inference tensor could not be saved for a later backward pass
        return torch.tensor(rows, dtype=torch.int32, device=device)


def _grid(batch: int, heads: int, queries: int) -> tuple[int, int]:
    return triton.cdiv(queries, QUERIES_PER_PROGRAM), batch * heads


def _blocks(dim: int) -> dict[str, int]:
    return {"BLOCK_Q": QUERIES_PER_PROGRAM, "BLOCK_D": triton.next_power_of_2(dim), "num_warps": 4}


@triton.jit
def _corner(base, y, x, h, w, channels, stride, rows, columns):
    """Load one neighbor of each query's location, zero outside the level; return values, offsets and mask.

    base: the level's first cell; y, x: (BLOCK_Q,) integral floats; channels: (BLOCK_D,); stride: from cell to cell;
    rows, columns: masks of the queries and channels that exist. All results (BLOCK_Q, BLOCK_D).
    """
    # Compared as floats: a location far outside, or NaN, must not become an index.
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w) & rows
    cell = tl.where(inside, y, 0.0).to(tl.int32) * w + tl.where(inside, x, 0.0).to(tl.int32)
    offsets = cell[:, None] * stride + channels[None, :]
    mask = inside[:, None] & columns[None, :]
    return tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32), offsets, mask


@triton.jit
def _place(locations, weights, sample, h, w, rows):
    """Return the cell above and left of each location, the fractions beyond it, and the sample's weight, (BLOCK_Q,)."""
    x = tl.load(locations + sample * 2, mask=rows, other=0.0) * w - 0.5
    y = tl.load(locations + sample * 2 + 1, mask=rows, other=0.0) * h - 0.5
    weight = tl.load(weights + sample, mask=rows, other=0.0)
    return tl.floor(y), tl.floor(x), y - tl.floor(y), x - tl.floor(x), weight


@triton.jit
def _forward(
    value, table, locations, weights, out,
    tokens, queries, heads, dim, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, image = tl.program_id(1) % heads, (tl.program_id(1) // heads).to(tl.int64)
    query, c = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    rows, columns, stride = query < queries, c < dim, heads * dim
    slot = (image * queries + query) * heads + head
    total = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    for level in range(LEVELS):
        h, w, start = tl.load(table + level * 3), tl.load(table + level * 3 + 1), tl.load(table + level * 3 + 2)
        base = value + ((image * tokens + start) * heads + head) * dim
        for point in range(POINTS):
            sample = slot * (LEVELS * POINTS) + level * POINTS + point
            y, x, down, right, weight = _place(locations, weights, sample, h, w, rows)
            v00, _, _ = _corner(base, y, x, h, w, c, stride, rows, columns)
            v01, _, _ = _corner(base, y, x + 1, h, w, c, stride, rows, columns)
            v10, _, _ = _corner(base, y + 1, x, h, w, c, stride, rows, columns)
            v11, _, _ = _corner(base, y + 1, x + 1, h, w, c, stride, rows, columns)
            upper = v00 * (1 - right)[:, None] + v01 * right[:, None]
            lower = v10 * (1 - right)[:, None] + v11 * right[:, None]
            total += (upper * (1 - down)[:, None] + lower * down[:, None]) * weight[:, None]
    tl.store(
        out + slot[:, None] * dim + c[None, :], total.to(out.dtype.element_ty), mask=rows[:, None] & columns[None, :]
    )


@triton.jit
def _backward(
    value, table, locations, weights, gradient, of_value, of_locations, of_weights,
    tokens, queries, heads, dim, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, image = tl.program_id(1) % heads, (tl.program_id(1) // heads).to(tl.int64)
    query, c = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    rows, columns, stride = query < queries, c < dim, heads * dim
    slot = (image * queries + query) * heads + head
    there = rows[:, None] & columns[None, :]
    arriving = tl.load(gradient + slot[:, None] * dim + c[None, :], mask=there, other=0.0).to(tl.float32)
    for level in range(LEVELS):
        h, w, start = tl.load(table + level * 3), tl.load(table + level * 3 + 1), tl.load(table + level * 3 + 2)
        first = ((image * tokens + start) * heads + head) * dim
        base, of_base = value + first, of_value + first
        for point in range(POINTS):
            sample = slot * (LEVELS * POINTS) + level * POINTS + point
            y, x, down, right, weight = _place(locations, weights, sample, h, w, rows)
            up, left = 1 - down, 1 - right
            v00, at00, m00 = _corner(base, y, x, h, w, c, stride, rows, columns)
            v01, at01, m01 = _corner(base, y, x + 1, h, w, c, stride, rows, columns)
            v10, at10, m10 = _corner(base, y + 1, x, h, w, c, stride, rows, columns)
            v11, at11, m11 = _corner(base, y + 1, x + 1, h, w, c, stride, rows, columns)
            weighted = arriving * weight[:, None]
            tl.atomic_add(of_base + at00, weighted * (up * left)[:, None], mask=m00)
            tl.atomic_add(of_base + at01, weighted * (up * right)[:, None], mask=m01)
            tl.atomic_add(of_base + at10, weighted * (down * left)[:, None], mask=m10)
            tl.atomic_add(of_base + at11, weighted * (down * right)[:, None], mask=m11)
            upper, lower = v00 * left[:, None] + v01 * right[:, None], v10 * left[:, None] + v11 * right[:, None]
            to_weight = tl.sum(arriving * (upper * up[:, None] + lower * down[:, None]), axis=1)
            to_x = tl.sum(weighted * ((v01 - v00) * up[:, None] + (v11 - v10) * down[:, None]), axis=1) * w
            to_y = tl.sum(weighted * (lower - upper), axis=1) * h
            tl.store(of_weights + sample, to_weight, mask=rows)
            tl.store(of_locations + sample * 2, to_x, mask=rows)
            tl.store(of_locations + sample * 2 + 1, to_y, mask=rows)
