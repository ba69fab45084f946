"""Which interval of a sorted list does each of many values fall into?

On a CPU a million binary searches cost more than all else in a ranking loss, as each takes a dozen mispredicted
branches. There a uniform grid over the list answers most of the question in one step, and a few branch-free steps
settle the rest.
"""

import torch
from torch import Tensor

GRID = 1 << 16
STEPS = 6


def locate(points: Tensor, x: Tensor) -> Tensor:
    """Number of points at or below each value.

    Args:
        points: (K,) ascending, K >= 1, finite.
        x: (M,) same dtype, may be infinite; a NaN falls anywhere in 0..K.

    Returns:
        (M,) int32 in 0..K.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and len(x) > 4096:
        return _grid_search(points, x)
    return torch.searchsorted(points, x, right=True, out_int32=True)


def _grid_search(points: Tensor, x: Tensor) -> Tensor:
    """`locate` with a table of how many points lie before each of at most `GRID` equal slots.

    The slot is a monotone function of the value even after rounding, so that points in earlier slots are below x and
    points in later ones above it, and only those of x's own slot are left to compare with. Reads the fullest slot's
    size on the host.
    """
    slots = min(GRID, 1 << (len(x) - 1).bit_length())
    low, span = points[0], points[-1] - points[0]
    scale = torch.where(span > 0, (slots - 1) / span, 0.0).clamp_(max=torch.finfo(x.dtype).max)

    def slot(values: Tensor) -> Tensor:
        return values.sub(low).mul_(scale).nan_to_num_(nan=0.0).clamp_(0, slots - 1).int()

    filled = torch.bincount(slot(points), minlength=slots)
    fullest = int(filled.max()).bit_length()
    if fullest > STEPS:
        return torch.searchsorted(points, x, right=True, out_int32=True)
    before = (filled.cumsum(0) - filled).int()
    found = before.index_select(0, slot(x))
    # Past the end nothing is at or below x, infinity included.
    padded = torch.cat([points, points.new_full((1 << fullest,), torch.nan)])
    for step in reversed(range(fullest)):
        found.add_(padded[(1 << step) - 1 :].index_select(0, found) <= x, alpha=1 << step)
    return found
