"""Which cell each logit lies in: the number of points at or below it, in the cheapest way for the device.

On a CPU a million binary searches cost more than all else in a ranking loss, since each takes a dozen mispredicted
branches. There a uniform grid finds the neighborhood of a value in one step, and a few branch-free steps do the rest.
"""

import torch
from torch import Tensor

from .by_device import choices

GRID = 1 << 16  # largest number of slots: a table of 256 KiB
MAX_STEPS = 6  # where a slot has 64 points or more, the binary search is used instead
MIN_GRID_QUERIES = 4096  # fewer queries do not pay for the grid


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
