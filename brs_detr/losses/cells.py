"""Sums of smoothed steps in O((P + N) log P): the exact form without a P x N matrix.

H(s_j - s_i) is, seen from s_j, a ramp from s_i - delta to s_i + delta. The 2P ends of the ramps cut the line into
2P + 1 cells; within one cell every sum over positives is a straight line alpha + beta * s_j, and every sum over
negatives needs the cell's count and sum of logits only. So one look-up per negative replaces its comparison with each
positive.

At delta = 0 the ramps are steps at s_i, there are P + 1 cells, and counts alone suffice. Cell 0 lies below every ramp:
what must not take part (the positives themselves, ignored entries) is sent there.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Cells(NamedTuple):
    """The partition of the line by the positives' ramps.

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
    # Both lists are sorted: each end's place among its own is known, and only its place among the others is looked up.
    low = position + torch.searchsorted(upper, lower)
    high = position + torch.searchsorted(lower, upper, right=True)
    points = scores.new_empty(2 * count).index_copy_(0, low, lower).index_copy_(0, high, upper)
    return Cells(scores, points, low, high, delta)


def tally(cells: Cells, where: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weight and weighted sum of the values in each cell.

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
    """sum_j weight_j H(x_j - s_i) for every positive i, from the tally of the x_j.

    Args:
        table: (2, K + 1) as `tally` returns it.

    Returns:
        (P,) float64 in the order of `cells.scores`.
    """
    suffix = table.flip(1).cumsum(1).flip(1)
    above = suffix[0].index_select(0, cells.high + 1)
    if cells.delta == 0:
        return above
    on_ramp = suffix.index_select(1, cells.low + 1) - suffix.index_select(1, cells.high + 1)
    return above + (on_ramp[1] - cells.scores * on_ramp[0]) / (2 * cells.delta) + on_ramp[0] / 2


def lines(cells: Cells, weight: Tensor) -> Tensor:
    """The function x -> sum_i weight_i H(x - s_i), one straight line per cell.

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
    table.index_copy_(1, cells.low + 1, torch.stack([weight / 2 - offset, slope]))
    table.index_copy_(1, cells.high + 1, torch.stack([weight / 2 + offset, -slope]))
    return table.cumsum(1)


def evaluate(table: Tensor, where: Tensor, x: Tensor) -> Tensor:
    """alpha + beta * x of each value's cell, (M,)."""
    return table[1].index_select(0, where).mul_(x).add_(table[0].index_select(0, where))
