"""Cells between sorted points: which one each logit lies in, and sums over each, in the cheapest way for the device.

**Look-up.** On a CPU a million binary searches cost more than all else in a ranking loss, since each takes a dozen
mispredicted branches. There a uniform grid finds the neighborhood of a value in one step, and a few branch-free steps
do the rest.

**Sums.** On a CPU the entries of a cell are added one after the other, on a GPU without hot addresses. Nearly all
negatives of a trained detector lie below every positive, and with few positives there are few cells. A GPU adds
thousands of entries at once, but those of one address one after the other: millions of entries in one cell would take
longer than all else in the loss. `spread_sums` gives every cell many addresses, and entry j adds to number j mod
copies, so that neighboring entries of a cell, which are added at the same time, have addresses beside each other.
Entries of cell 0, in which nothing is ever read, have a region of their own.

Counts are sums of ones and exact in any order, so a ranking at delta = 0 repeats bit for bit. Sums of logits are added
in the order in which a GPU comes to them: they repeat up to the last bits of a float64, of which a float32 loss shows
none as a rule, and exactly under `torch.use_deterministic_algorithms(True)`, for which torch sorts the entries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .by_device import choices

GRID = 1 << 16  # largest number of slots: a table of 256 KiB
MAX_STEPS = 6  # where a slot has 64 points or more, the binary search is used instead
MIN_GRID_QUERIES = 4096  # fewer queries do not pay for the grid
MAX_COPIES = 1024  # of each cell: 3.5 million entries of one cell are 3400 an address
MAX_SLOTS = 1 << 20  # in all copies of all cells: 8 MiB a table, which a GPU clears in a few microseconds
UNREACHED = 4096  # addresses of the entries in cell 0
MIN_ENTRIES = 4096  # fewer in a ranking are not worth the operations that spread them


def locate(points: Tensor, x: Tensor) -> Tensor:
    """Count the points at or below each value.

    Args:
        points: (L, K) ascending, K >= 1, finite; one list for each of L rankings.
        x: (L, M) same dtype, may be infinite; a NaN gives any number in 0..K.

    Returns:
        (L, M) int32 in 0..K.
    """
    if choices(x.device).grid and not torch.compiler.is_compiling() and x.shape[1] > MIN_GRID_QUERIES:
        return torch.stack([_grid_search(*row) for row in zip(points, x)])
    return torch.searchsorted(points, x, right=True, out_int32=True)


def _grid_search(points: Tensor, x: Tensor) -> Tensor:
    """Count as `locate` does, in one list (K,) for (M,) values, with a table of at most `GRID` equal slots.

    The table holds the number of points before each slot. The slot is a monotone function of the value even after
    rounding, so that points in earlier slots are below x and points in later ones above it, and only those of x's own
    slot are left to compare with. The host reads the size of the fullest slot.
    """
    slots = min(GRID, 1 << (len(x) - 1).bit_length())
    low, span = points[0], points[-1] - points[0]
    scale = torch.where(span > 0, (slots - 1) / span, 0.0).clamp_(max=torch.finfo(x.dtype).max)

    def slot(values: Tensor) -> Tensor:
        return values.sub(low).mul_(scale).nan_to_num_(nan=0.0).clamp_(0, slots - 1).int()

    filled = torch.bincount(slot(points), minlength=slots)
    fullest = int(filled.max()).bit_length()
    if fullest > MAX_STEPS:
        return torch.searchsorted(points, x, right=True, out_int32=True)
    before = (filled.cumsum(0) - filled).int()
    count = before.index_select(0, slot(x))
    # NaN past the end compares as not at or below x, even an infinite x.
    padded = torch.cat([points, points.new_full((1 << fullest,), torch.nan)])
    for step in reversed(range(fullest)):
        count.add_(padded[(1 << step) - 1 :].index_select(0, count) <= x, alpha=1 << step)
    return count


def cell_sums(where: Tensor, values: Sequence[Tensor | None], x: Tensor, count: int) -> Tensor:
    """Sum values in each cell of L rankings.

    Args:
        where: (L * n,) cell of each entry, among the L * count cells of all rankings.
        values: V tensors (L, n), or None for ones.
        x: (L, n), of whose type the sums are.
        count: number of cells of each ranking.

    Returns:
        (V, L, count). What a ranking's cell 0 holds is undefined.
    """
    spread = choices(x.device).spread and x.shape[1] > MIN_ENTRIES
    return (spread_sums if spread else plain_sums)(where, values, x, count)


def plain_sums(where: Tensor, values: Sequence[Tensor | None], x: Tensor, count: int) -> Tensor:
    """Compute `cell_sums` with one address per cell."""
    return _add(where, values, x, len(x) * count).view(len(values), len(x), count)


def spread_sums(where: Tensor, values: Sequence[Tensor | None], x: Tensor, count: int) -> Tensor:
    """Compute `cell_sums` with as many addresses per cell as memory allows, and cell 0 left out."""
    cells = len(x) * count
    copies = min(MAX_COPIES, max(1, MAX_SLOTS // cells))
    sums = _add(spread(where, count, cells, copies), values, x, cells * copies + UNREACHED)
    return sums[:, : cells * copies].view(len(values), len(x), count, copies).sum(3)


def spread(where: Tensor, count: int, cells: int, copies: int) -> Tensor:
    """Return the address that each entry is added to: one of its cell's `copies`, or of `UNREACHED` past all cells."""
    entry = torch.arange(len(where), device=where.device, dtype=torch.int32)
    reached = torch.add(entry % copies, where, alpha=copies)
    return torch.where(where % count == 0, entry % UNREACHED + cells * copies, reached)


def _add(where: Tensor, values: Sequence[Tensor | None], x: Tensor, size: int) -> Tensor:
    """Add each of V values (L, n) or ones at its entry of (V, size) zeros."""
    table = x.new_zeros(len(values), size)
    for row, value in zip(table, values):
        # Ones need no memory of their own.
        row.index_add_(0, where, x.new_ones(1).expand(len(where)) if value is None else value.flatten())
    return table
