"""Sums of smoothed steps in O((P + N) log P): the exact form without a P x N matrix.

H(s_j - s_i) is, seen from s_j, a ramp from s_i - delta to s_i + delta. The 2P ends of the ramps cut the line into
2P + 1 cells; within one cell every sum over positives is a straight line alpha + beta * s_j, and every sum over
negatives needs the cell's count and sum of logits only. So one look-up per negative replaces its comparison with each
positive.

At delta = 0 the ramps are steps at s_i, there are P + 1 cells, and counts alone suffice. Cell 0 lies below every ramp:
entries that must not count (the positives themselves, ignored entries) are put there.

`ExactNegatives` and `BucketedNegatives` compute N_FP, the false positives ranked above each positive, and its gradient,
for positives in ascending order:
`num_fp()`     N_FP(i) = sum_j H(s_j - s_i) over the negatives, (P,);
`backprop(w)`  g_j = sum_i w_i H(s_j - s_i) for every logit, (M,), exactly 0 for positives and ignored entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .distributed import Group


class Cells(NamedTuple):
    """The partition of the line by the positives' ramps.

    Attributes:
        scores: (P,) float64, the positives' logits in ascending order.
        points: (K,) float64, ascending ends of the ramps; K = 2P, or P at delta 0.
        low, high: (P,) int64, positions in `points` where each positive's ramp starts and ends.
        delta: half width of the step.
    """

    scores: Tensor
    points: Tensor
    low: Tensor
    high: Tensor
    delta: float


def make_cells(scores: Tensor, delta: float) -> Cells:
    """Partition the line by ascending `scores` (P,) float64, P >= 1."""
    count = len(scores)
    position = torch.arange(count, device=scores.device)
    if delta == 0:
        return Cells(scores, scores, position, position, delta)
    lower, upper = scores - delta, scores + delta
    # A merge of two sorted lists: each end's position in its own list is known, only that in the other is searched.
    low = position + torch.searchsorted(upper, lower)
    high = position + torch.searchsorted(lower, upper, right=True)
    points = scores.new_empty(2 * count).index_copy_(0, low, lower).index_copy_(0, high, upper)
    return Cells(scores, points, low, high, delta)


def tally(cells: Cells, where: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum the weights and the weighted values in each cell.

    Args:
        where: (M,) cell of each value.
        x: (M,) finite values.
        weight: (M,) or None for ones.

    Returns:
        (2, K + 1) float64.
    """
    table = x.new_zeros(2, len(cells.points) + 1)
    table[0].index_add_(0, where, torch.ones_like(x) if weight is None else weight)
    if cells.delta > 0:
        table[1].index_add_(0, where, x if weight is None else x * weight)
    return table


def sums_above(cells: Cells, table: Tensor) -> Tensor:
    """Compute sum_j weight_j H(x_j - s_i) for every positive i, from the tally of the x_j.

    Args:
        table: (2, K + 1) as `tally` returns it.

    Returns:
        (P,) float64 in the order of `cells.scores`.
    """
    suffix = table.flip(1).cumsum(1).flip(1)
    # Values past the ramp count 1 each; `points[k]` is the left end of cell k + 1.
    above = suffix[0].index_select(0, cells.high + 1)
    if cells.delta == 0:
        return above
    # On the ramp H = (x - s_i) / (2 delta) + 1/2, so the count and the sum of the x there suffice.
    on_ramp = suffix.index_select(1, cells.low + 1) - suffix.index_select(1, cells.high + 1)
    return above + (on_ramp[1] - cells.scores * on_ramp[0]) / (2 * cells.delta) + on_ramp[0] / 2


def lines(cells: Cells, weight: Tensor) -> Tensor:
    """Tabulate the function x -> sum_i weight_i H(x - s_i), one straight line per cell.

    Args:
        weight: (P,) float64 in the order of `cells.scores`.

    Returns:
        (2, K + 1) float64: alpha and beta of alpha + beta * x; exactly 0 in cell 0.
    """
    table = weight.new_zeros(2, len(cells.points) + 1)
    if cells.delta == 0:
        table[0, 1:] = weight.cumsum(0)
        return table
    slope = weight / (2 * cells.delta)
    offset = slope * cells.scores
    # Each ramp adds its line where it starts, and replaces it by the constant weight where it ends.
    table.index_copy_(1, cells.low + 1, torch.stack([weight / 2 - offset, slope]))
    table.index_copy_(1, cells.high + 1, torch.stack([weight / 2 + offset, -slope]))
    return table.cumsum(1)


def evaluate(table: Tensor, where: Tensor, x: Tensor) -> Tensor:
    """Evaluate alpha + beta * x with the line of each value's cell, (M,)."""
    return table[1].index_select(0, where).mul_(x).add_(table[0].index_select(0, where))


# On a CPU a million binary searches cost more than all else in a ranking loss, since each takes a dozen mispredicted
# branches. There a uniform grid finds the neighborhood of a value in one step, and a few branch-free steps do the rest.
GRID = 1 << 16  # largest number of slots: a table of 256 KiB
MAX_STEPS = 6  # where a slot has 64 points or more, the binary search is used instead
MIN_GRID_QUERIES = 4096  # fewer queries do not pay for the grid


def locate(points: Tensor, x: Tensor) -> Tensor:
    """Count the points at or below each value.

    Args:
        points: (K,) ascending, K >= 1, finite.
        x: (M,) same dtype, may be infinite; a NaN gives any number in 0..K.

    Returns:
        (M,) int32 in 0..K.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and len(x) > MIN_GRID_QUERIES:
        return _grid_search(points, x)
    return torch.searchsorted(points, x, right=True, out_int32=True)


def _grid_search(points: Tensor, x: Tensor) -> Tensor:
    """Count as `locate` does, with a table of the number of points before each of at most `GRID` equal slots.

    The slot is a monotone function of the value even after rounding, so that points in earlier slots are below x and
    points in later ones above it, and only those of x's own slot are left to compare with. The host reads the size of
    the fullest slot.
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


class ExactNegatives:
    """Every negative at its own logit.

    Args:
        cells: partition by the positives.
        logits: (M,) float64, all entries, in the units of `cells.scores`.
        positives: (P,) int64 entries that are positives.
        valid: (M,) bool or None; False entries are ignored.
        group: the processes that rank together; one table of (2, K + 1) numbers is summed over them.
    """

    def __init__(self, cells: Cells, logits: Tensor, positives: Tensor, valid: Tensor | None, group: Group) -> None:
        self.cells = cells
        self.group = group
        self.where = locate(cells.points, logits).index_fill_(0, positives, 0)
        if valid is not None:
            self.where *= valid
        # Outside the ramps a logit's value has no effect; clamping keeps infinities out of the sums.
        self.x = logits.clamp(cells.points[0], cells.points[-1])

    def num_fp(self) -> Tensor:
        """Compute N_FP of every positive, (P,)."""
        return sums_above(self.cells, self.group.total(tally(self.cells, self.where, self.x)))

    def backprop(self, weight: Tensor) -> Tensor:
        """Compute sum_i weight_i H(s_j - s_i) of every logit, (M,)."""
        return evaluate(lines(self.cells, weight), self.where, self.x)


class BucketedNegatives:
    """Negatives between two neighboring positives share one bucket and one prototype logit, their mean.

    Bucketed Ranking-based Losses (Yavuz et al., ECCV 2024), Sec. 4. Bucket k of a negative is the number of positives
    at or below it, so no negative needs sorting; negatives that no ramp reaches (s < min positive - delta) are dropped
    first. The prototypes then go through the same cells as exact negatives do.

    Args: as for `ExactNegatives`; the table summed over processes holds the P + 1 buckets.
    """

    def __init__(self, cells: Cells, logits: Tensor, positives: Tensor, valid: Tensor | None, group: Group) -> None:
        self.cells = cells
        edges = torch.cat([cells.points[:1], cells.scores]) if cells.delta > 0 else cells.scores
        self.bucket = locate(edges, logits).index_fill_(0, positives, 0)
        if valid is not None:
            self.bucket *= valid
        table = logits.new_zeros(2, len(edges) + 1)
        # An infinite logit must not make its bucket's mean undefined.
        x = logits.clamp(max=torch.finfo(torch.float32).max).clamp_(min=edges[0])
        table[0].index_add_(0, self.bucket, torch.ones_like(x))
        table[1].index_add_(0, self.bucket, x)
        table = group.total(table)
        self.size = table[0, 1:]
        # A rounded mean may lie past an edge of its bucket, on the other side of a positive.
        upper = torch.cat([edges[1:], cells.points[-1:]])
        self.prototype = (table[1, 1:] / self.size.clamp(min=1)).clamp(edges, upper)
        if cells.delta > 0:
            self.where = locate(cells.points, self.prototype)
        else:
            self.where = torch.arange(1, len(edges) + 1, device=logits.device, dtype=torch.int32)

    def num_fp(self) -> Tensor:
        """Compute N_FP of every positive, (P,)."""
        return sums_above(self.cells, tally(self.cells, self.where, self.prototype, self.size))

    def backprop(self, weight: Tensor) -> Tensor:
        """Compute sum_i weight_i H(s_j - s_i) of every logit, (M,), the same for all of a bucket."""
        per_bucket = evaluate(lines(self.cells, weight), self.where, self.prototype)
        return torch.cat([per_bucket.new_zeros(1), per_bucket]).index_select(0, self.bucket)
