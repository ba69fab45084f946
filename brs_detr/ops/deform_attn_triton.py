"""Multi-scale deformable attention as one Triton kernel forward and one backward.

The softmax of the attention weights and the sampling locations are computed where they are used and stored nowhere; the
samples stay in registers and are read again for the gradient. Triton compiles at the first call; nothing is compiled at
installation. `deform_attn_op` makes the two launches below an operator of torch.
"""

# Triton kernels cannot be typed: their arguments are pointers and blocks of a language of its own.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from brs_detr.ops.images import Size


class Tile(NamedTuple):
    """The share of a kernel that one program computes.

    Attributes:
        numbers: channels, of all its queries, that a warp of 32 threads computes.
        warps: of a program; a program of one warp needs no barriers.
    """

    numbers: int
    warps: int


class Tiles(NamedTuple):
    """The tiles of both kernels, by the bytes of a number of `value`."""

    forward: dict[int, Tile]
    backward: dict[int, Tile]


# A thread reads 16 bytes at once: 8 numbers of half precision or 4 of float32. The backward kernel adds four float32 at
# once. With twice as many numbers both exchange them through shared memory, with more still they run out of registers.
# By compute capability; others, and those not measured, take the first (`benchmarks/deform_attn.py --tiles` measures).
DEFAULT = Tiles({2: Tile(256, 4), 4: Tile(128, 4)}, {2: Tile(128, 4), 4: Tile(128, 4)})
TUNED: dict[tuple[int, int], Tiles] = {}
FEW_PROGRAMS = 1024  # with fewer, those of one warp leave fewer processors of a large GPU (132 and more) idle


def launch_forward(
    value: Tensor, shapes: Sequence[Size], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Compute `deform_attn.deformable_attention`, whose arguments these are, in float32; (B, Q, heads * dim)."""
    value, references, offsets, logits = (t.contiguous() for t in (value, references, offsets, logits))
    out = value.new_empty(*logits.shape[:2], value.shape[2] * value.shape[3])
    if out.numel():
        table = _level_table(tuple(shapes), value.device)
        inputs = (value, table, references, offsets, logits)
        grid, constants = _launch(
            _tiles(value.device).forward[value.element_size()], value, references, logits, len(shapes)
        )
        with torch.cuda.device_of(value):  # Triton launches on the current device, which may be another GPU
            _forward[grid](*inputs, out, value.shape[1], logits.shape[1], **constants)
    return out


def launch_backward(
    gradient: Tensor, value: Tensor, shapes: Sequence[Size], references: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of value, offsets and logits from that of the result, each in the dtype of its tensor.

    The gradient of `value` is summed with atomic additions in float32, so its last bits depend on their order.
    """
    value, references, offsets, logits = (t.contiguous() for t in (value, references, offsets, logits))
    # Float32 zeros: half precision would lose most of the many small additions.
    of_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    of_offsets, of_logits = torch.empty_like(offsets), torch.empty_like(logits)
    if gradient.numel():
        table = _level_table(tuple(shapes), value.device)
        inputs = (value, table, references, offsets, logits, gradient.contiguous())
        grid, constants = _launch(
            _tiles(value.device).backward[value.element_size()], value, references, logits, len(shapes)
        )
        with torch.cuda.device_of(value):
            _backward[grid](*inputs, of_value, of_offsets, of_logits, value.shape[1], logits.shape[1], **constants)
    return of_value.to(value.dtype), of_offsets, of_logits


@lru_cache(maxsize=1024)
def _level_table(shapes: tuple[Size, ...], device: torch.device) -> Tensor:
    """Return (L, 3) int32: height, width and first token of each level; cached, and copied without waiting."""
    rows, start = [], 0
    for height, width in shapes:
        rows.append((height, width, start))
        start += height * width
    with torch.inference_mode(False):  # a cached inference tensor could not be used in a later training step
        return torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True)


def _tiles(device: torch.device) -> Tiles:
    """Choose by device and by nothing that is timed: a program computes the same way in every run."""
    return TUNED.get(_capability(device), DEFAULT) if device.type == "cuda" else DEFAULT


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _launch(
    tile: Tile, value: Tensor, references: Tensor, logits: Tensor, levels: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid and the constants of a kernel: its programs are blocks of queries of one head and image."""
    batch, _, heads, dim = value.shape
    queries, samples, block_d = logits.shape[1], logits.shape[-1] // heads, triton.next_power_of_2(dim)
    each = max(1, tile.numbers // block_d)  # queries of a warp
    warps = tile.warps if triton.cdiv(queries, each * tile.warps) * batch * heads >= FEW_PROGRAMS else 1
    constants = {"HEADS": heads, "DIM": dim, "LEVELS": levels, "POINTS": samples // levels, "BOX": references.shape[-1]}
    constants |= {"BLOCK_Q": each * warps, "BLOCK_D": block_d, "BLOCK_S": triton.next_power_of_2(samples)}
    # Multiplications and additions that Triton may fuse, as the compilers of other languages do.
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    return (triton.cdiv(queries, each * warps), batch * heads), constants | options


@triton.jit
def _attention(logits, slot, SAMPLES: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return the softmax over samples (BLOCK_Q, BLOCK_S), 0 in columns without a sample; largest logit; sum."""
    sample = tl.arange(0, BLOCK_S)
    columns = (sample < SAMPLES)[None, :]
    tile = tl.load(logits + slot[:, None] * SAMPLES + sample[None, :], mask=columns, other=-float("inf"))
    tile = tile.to(tl.float32)
    largest = tl.max(tile, axis=1)
    tile = tl.exp(tile - largest[:, None])
    total = tl.sum(tile, axis=1)
    return tile / total[:, None], largest, total


@triton.jit
def _center(references, row, w, h, POINTS: tl.constexpr, BOX: tl.constexpr):
    """Return where a reference lies in cells, and the cells that an offset of 1 moves, as x, y, of x, of y (BLOCK_Q,).

    Cell i has its center at i + 0.5, hence - 0.5. An offset of POINTS is half a side of a box.
    """
    x = tl.load(references + row * BOX).to(tl.float32) * w - 0.5
    y = tl.load(references + row * BOX + 1).to(tl.float32) * h - 0.5
    across = tl.zeros_like(x) + 1.0
    down = across
    if BOX == 4:
        across = tl.load(references + row * BOX + 2).to(tl.float32) * w * (0.5 / POINTS)
        down = tl.load(references + row * BOX + 3).to(tl.float32) * h * (0.5 / POINTS)
    return x, y, across, down


@triton.jit
def _neighbors(position, cells):
    """Return the cells before and after a position on an axis as indices, whether they exist, and the fraction between.

    position: (BLOCK_Q,) in cells; cells: how many the axis has. A cell that does not exist has index 0.
    """
    before = tl.floor(position)
    # Compared as floats: a location far outside, or NaN, must not become an index.
    first, second = (before >= 0) & (before < cells), (before >= -1) & (before < cells - 1)
    index, following = tl.where(first, before, 0.0).to(tl.int32), tl.where(second, before + 1, 0.0).to(tl.int32)
    return index, following, first, second, position - before


@triton.jit
def _cell(index, exists, channels, STRIDE: tl.constexpr, DIM: tl.constexpr):
    """Return where the channels of one neighbor of each location lie, and which of them exist, (BLOCK_Q, BLOCK_D)."""
    return index[:, None] * STRIDE + channels[None, :], exists[:, None] & (channels < DIM)[None, :]


@triton.jit
def _read(base, offsets, mask):
    return tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)


# Sizes of images change from batch to batch: none may compile a kernel of its own.
@triton.jit(do_not_specialize=["tokens", "queries"])
def _forward(
    value, table, references, offsets, logits, out, tokens, queries,
    HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, BOX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    head, image = tl.program_id(1) % HEADS, (tl.program_id(1) // HEADS).to(tl.int64)
    place, c = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    query = image * queries + tl.minimum(place, queries - 1)  # what lies behind the last query repeats it, unmasked
    slot = query * HEADS + head
    _, largest, sum_of_exp = _attention(logits, slot, LEVELS * POINTS, BLOCK_S)
    result = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    for level in range(LEVELS):
        h, w, start = tl.load(table + level * 3), tl.load(table + level * 3 + 1), tl.load(table + level * 3 + 2)
        base = value + ((image * tokens + start) * HEADS + head) * DIM
        center_x, center_y, across, down = _center(references, query * LEVELS + level, w, h, POINTS, BOX)
        for point in tl.static_range(POINTS):
            sample = slot * (LEVELS * POINTS) + level * POINTS + point
            x = center_x + tl.load(offsets + sample * 2).to(tl.float32) * across
            y = center_y + tl.load(offsets + sample * 2 + 1).to(tl.float32) * down
            weight = tl.exp(tl.load(logits + sample).to(tl.float32) - largest) / sum_of_exp
            x0, x1, left, right, beyond_x = _neighbors(x, w)
            y0, y1, upper, lower, beyond_y = _neighbors(y, h)
            at00, m00 = _cell(y0 * w + x0, upper & left, c, HEADS * DIM, DIM)
            at01, m01 = _cell(y0 * w + x1, upper & right, c, HEADS * DIM, DIM)
            at10, m10 = _cell(y1 * w + x0, lower & left, c, HEADS * DIM, DIM)
            at11, m11 = _cell(y1 * w + x1, lower & right, c, HEADS * DIM, DIM)
            v00, v01 = _read(base, at00, m00), _read(base, at01, m01)
            v10, v11 = _read(base, at10, m10), _read(base, at11, m11)
            of_lower, of_upper = weight * beyond_y, weight * (1 - beyond_y)
            result += v00 * (of_upper * (1 - beyond_x))[:, None] + v01 * (of_upper * beyond_x)[:, None]
            result += v10 * (of_lower * (1 - beyond_x))[:, None] + v11 * (of_lower * beyond_x)[:, None]
    there = (place < queries)[:, None] & (c < DIM)[None, :]
    tl.store(out + slot[:, None] * DIM + c[None, :], result.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens", "queries"])
def _backward(
    value, table, references, offsets, logits, gradient, of_value, of_offsets, of_logits, tokens, queries,
    HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, BOX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    head, image = tl.program_id(1) % HEADS, (tl.program_id(1) // HEADS).to(tl.int64)
    place, c = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    rows, query = place < queries, image * queries + tl.minimum(place, queries - 1)
    slot = query * HEADS + head
    attention, largest, sum_of_exp = _attention(logits, slot, LEVELS * POINTS, BLOCK_S)
    there = rows[:, None] & (c < DIM)[None, :]
    arriving = tl.load(gradient + slot[:, None] * DIM + c[None, :], mask=there, other=0.0).to(tl.float32)
    s = tl.arange(0, BLOCK_S)[None, :]
    to_weights = tl.zeros((BLOCK_Q, BLOCK_S), dtype=tl.float32)
    to_x, to_y = to_weights, to_weights
    for level in range(LEVELS):
        h, w, start = tl.load(table + level * 3), tl.load(table + level * 3 + 1), tl.load(table + level * 3 + 2)
        first = ((image * tokens + start) * HEADS + head) * DIM
        base, of_base = value + first, of_value + first
        center_x, center_y, across, down = _center(references, query * LEVELS + level, w, h, POINTS, BOX)
        for point in tl.static_range(POINTS):
            sample = slot * (LEVELS * POINTS) + level * POINTS + point
            x = center_x + tl.load(offsets + sample * 2).to(tl.float32) * across
            y = center_y + tl.load(offsets + sample * 2 + 1).to(tl.float32) * down
            weight = tl.exp(tl.load(logits + sample).to(tl.float32) - largest) / sum_of_exp
            x0, x1, left, right, beyond_x = _neighbors(x, w)
            y0, y1, upper, lower, beyond_y = _neighbors(y, h)
            before_x, before_y = 1 - beyond_x, 1 - beyond_y
            at00, m00 = _cell(y0 * w + x0, upper & left & rows, c, HEADS * DIM, DIM)
            at01, m01 = _cell(y0 * w + x1, upper & right & rows, c, HEADS * DIM, DIM)
            at10, m10 = _cell(y1 * w + x0, lower & left & rows, c, HEADS * DIM, DIM)
            at11, m11 = _cell(y1 * w + x1, lower & right & rows, c, HEADS * DIM, DIM)
            v00, v01 = _read(base, at00, m00), _read(base, at01, m01)
            v10, v11 = _read(base, at10, m10), _read(base, at11, m11)
            of_lower, of_upper = weight * beyond_y, weight * before_y
            # Relaxed: nothing is read that another program adds, so no addition needs to order memory.
            tl.atomic_add(of_base + at00, arriving * (of_upper * before_x)[:, None], mask=m00, sem="relaxed")
            tl.atomic_add(of_base + at01, arriving * (of_upper * beyond_x)[:, None], mask=m01, sem="relaxed")
            tl.atomic_add(of_base + at10, arriving * (of_lower * before_x)[:, None], mask=m10, sem="relaxed")
            tl.atomic_add(of_base + at11, arriving * (of_lower * beyond_x)[:, None], mask=m11, sem="relaxed")
            # All that the locations and the weight need of the channels is how each neighbor agrees with the gradient.
            d00, d01 = tl.sum(arriving * v00, axis=1), tl.sum(arriving * v01, axis=1)
            d10, d11 = tl.sum(arriving * v10, axis=1), tl.sum(arriving * v11, axis=1)
            above, below = d00 * before_x + d01 * beyond_x, d10 * before_x + d11 * beyond_x
            along_x = (of_upper * (d01 - d00) + of_lower * (d11 - d10)) * across
            chosen = s == level * POINTS + point
            to_weights = tl.where(chosen, (above * before_y + below * beyond_y)[:, None], to_weights)
            to_x = tl.where(chosen, along_x[:, None], to_x)
            to_y = tl.where(chosen, (weight * (below - above) * down)[:, None], to_y)
    # Softmax: each weight's own gradient less the mean of all, weighted.
    to_logits = attention * (to_weights - tl.sum(attention * to_weights, axis=1)[:, None])
    mask = rows[:, None] & (s < LEVELS * POINTS)
    at = slot[:, None] * (LEVELS * POINTS) + s
    tl.store(of_logits + at, to_logits.to(of_logits.dtype.element_ty), mask=mask)
    tl.store(of_offsets + at * 2, to_x.to(of_offsets.dtype.element_ty), mask=mask)
    tl.store(of_offsets + at * 2 + 1, to_y.to(of_offsets.dtype.element_ty), mask=mask)
