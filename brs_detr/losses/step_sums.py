"""Sums of smoothed steps in O((P + N) log P): the exact form without a P x N matrix.

H(s_j - s_i) is, seen from s_j, a ramp from s_i - delta to s_i + delta. The 2P ends of the ramps cut the line into
2P + 1 cells; within one cell every sum over positives is a straight line alpha + beta * s_j, and every sum over
negatives needs the cell's count and sum of logits only. So one look-up per negative replaces its comparison with each
positive.

At delta = 0 the ramps are steps at s_i, there are P + 1 cells, and counts alone suffice. Cell 0 lies below every ramp:
entries that must not count (the positives themselves, ignored entries) are put there.

L rankings, each of M logits and P positives, are computed in the same operations. The tables of the L rankings lie one
after the other, and a look-up names the cell in all of them: that of ranking l is l * (K + 1) + its cell.

`ExactNegatives` and `BucketedNegatives` compute N_FP, the false positives ranked above each positive, and its gradient,
for positives in ascending order:
`num_fp()`     N_FP(i) = sum_j H(s_j - s_i) over the negatives, (L, P);
`backprop(w)`  g_j = sum_i w_i H(s_j - s_i) for every logit, (L, M), exactly 0 for positives and ignored entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .cells import cell_sums, locate
from .distributed import Group


class Cells(NamedTuple):
    """The partition of the line by the positives' ramps, of L rankings.

    Attributes:
        scores: (L, P) float64, the positives' logits in ascending order.
        points: (L, K) float64, ascending ends of the ramps; K = 2P, or P at delta 0.
        low, high: (L * P,) int64, the cells in which each positive's ramp starts and behind which it ends, as positions
            in the L * (K + 1) cells of all rankings.
        delta: half width of the step.
        num_cells: K + 1.
    """

    scores: Tensor
    points: Tensor
    low: Tensor
    high: Tensor
    delta: float
    num_cells: int


def offset_rows(index: Tensor, length: int) -> Tensor:
    """Turn indices (..., L, n) into rows of `length` entries into (..., L * n) indices into the flattened L rows."""
    layers = index.shape[-2]
    if layers > 1:
        length = max(length, 1)  # sets without rows have no index to shift
        start = torch.arange(0, layers * length, length, device=index.device, dtype=index.dtype)
        index = index + start[:, None]
    return index.flatten(-2)


def make_cells(scores: Tensor, delta: float) -> Cells:
    """Partition the line by ascending `scores` (L, P) float64, P >= 1."""
    layers, count = scores.shape
    position = torch.arange(count, device=scores.device)
    if delta == 0:
        cell = offset_rows((position + 1).expand(layers, count), count + 1)
        return Cells(scores, scores, cell, cell, delta, count + 1)
    lower, upper = scores - delta, scores + delta
    # A merge of two sorted lists: each end's position in its own list is known, only that in the other is searched.
    low, high = torch.searchsorted(upper, lower), torch.searchsorted(lower, upper, right=True)
    ends = torch.stack([low, high]) + position
    points = scores.new_empty(layers, 2 * count).scatter_(1, ends[0], lower).scatter_(1, ends[1], upper)
    # points[k] is the left end of cell k + 1
    low, high = offset_rows(ends + 1, 2 * count + 1)
    return Cells(scores, points, low, high, delta, 2 * count + 1)


def tally(cells: Cells, where: Tensor, x: Tensor, *weights: Tensor | None) -> Tensor:
    """Sum weights and weighted values in each cell.

    Args:
        where: (L * n,) cell of each value, among those of all rankings.
        x: (L, n) finite values.
        weights: V times (L, n), or None for ones.

    Returns:
        (2, V, L, K + 1) float64; at delta 0, where the sums of the weights suffice, (1, V, L, K + 1).
    """
    values = list(weights)
    if cells.delta > 0:
        values += [x if weight is None else x * weight for weight in weights]
    return cell_sums(where, values, x, cells.num_cells).view(-1, len(weights), len(x), cells.num_cells)


def sums_above(cells: Cells, table: Tensor) -> Tensor:
    """Compute sum_j weight_j H(x_j - s_i) for every positive i, from the tally of the x_j.

    Args:
        table: (2 or 1, V, L, K + 1) as `tally` returns it.

    Returns:
        (V, L, P) float64 in the order of `cells.scores`.
    """
    suffix = table.flip(3).cumsum(3).flip(3).flatten(2)
    # Values past the ramp count 1 each.
    past = suffix.index_select(2, cells.high).view(*table.shape[:2], *cells.scores.shape)
    if cells.delta == 0:
        return past[0]
    # On the ramp H = (x - s_i + delta) / (2 delta), so the weights and the weighted x there suffice.
    weight, moment = suffix.index_select(2, cells.low).view_as(past) - past
    on_ramp = moment.addcmul(cells.delta - cells.scores, weight)
    return torch.add(past[0], on_ramp, alpha=1 / (2 * cells.delta))


def lines(cells: Cells, weight: Tensor) -> Tensor:
    """Tabulate the function x -> sum_i weight_i H(x - s_i), one straight line per cell.

    Args:
        weight: (L, P) float64 in the order of `cells.scores`.

    Returns:
        (2, L * (K + 1)) float64: alpha and beta of alpha + beta * x; exactly 0 in each ranking's cell 0.
    """
    layers = len(weight)
    table = weight.new_zeros(2, layers * cells.num_cells)
    if cells.delta == 0:
        table.view(2, layers, -1)[0, :, 1:] = weight.cumsum(1)
        return table
    slope = weight / (2 * cells.delta)
    offset = slope * cells.scores
    # Each ramp adds its line where it starts, and replaces it by the constant weight where it ends.
    table.index_copy_(1, cells.low, torch.stack([weight / 2 - offset, slope]).flatten(1))
    table.index_copy_(1, cells.high, torch.stack([weight / 2 + offset, -slope]).flatten(1))
    return table.view(2, layers, -1).cumsum(2).flatten(1)


def evaluate(table: Tensor, where: Tensor, x: Tensor) -> Tensor:
    """Evaluate alpha + beta * x with the line of each value's cell, (L, n); `where` (L * n,), x (L, n)."""
    alpha, beta = (line.index_select(0, where).view_as(x) for line in table)
    result: Tensor = beta.mul_(x).add_(alpha)
    return result


def _negative_cells(points: Tensor, logits: Tensor, positives: Tensor, valid: Tensor | None) -> Tensor:
    """Look up the cell of every negative (L, M) int32; positives and ignored entries are in cell 0."""
    where = locate(points, logits)
    where.view(-1).index_fill_(0, positives, 0)
    return where if valid is None else where.mul_(valid)


class ExactNegatives:
    """Every negative at its own logit.

    Args:
        cells: partition by the positives.
        logits: (L, M) float64, all entries, in the units of `cells.scores`.
        positives: (L * P,) int64 entries of the L * M that are positives.
        valid: (L, M) bool or None; False entries are ignored.
        group: the processes that rank together; one table of (2, L, K + 1) numbers is summed over them.
    """

    def __init__(self, cells: Cells, logits: Tensor, positives: Tensor, valid: Tensor | None, group: Group) -> None:
        self.cells = cells
        self.group = group
        self.where = offset_rows(_negative_cells(cells.points, logits, positives, valid), cells.num_cells)
        # Outside the ramps a logit's value has no effect; clamping keeps infinities out of the sums.
        self.x = logits.clamp(cells.points[:, :1], cells.points[:, -1:])

    def num_fp(self) -> Tensor:
        """Compute N_FP of every positive, (L, P)."""
        return sums_above(self.cells, self.group.total(tally(self.cells, self.where, self.x, None)))[0]

    def backprop(self, weight: Tensor) -> Tensor:
        """Compute sum_i weight_i H(s_j - s_i) of every logit, (L, M)."""
        return evaluate(lines(self.cells, weight), self.where, self.x)


class BucketedNegatives:
    """Negatives between two neighboring positives share one bucket and one prototype logit, their mean.

    Bucketed Ranking-based Losses (Yavuz et al., ECCV 2024), Sec. 4. Bucket k of a negative is the number of positives
    at or below it, so no negative needs sorting; negatives that no ramp reaches (s < min positive - delta) are dropped
    first. The prototypes then go through the same cells as exact negatives do.

    Args: as for `ExactNegatives`; the table summed over processes holds the P + 1 buckets of each ranking.
    """

    def __init__(self, cells: Cells, logits: Tensor, positives: Tensor, valid: Tensor | None, group: Group) -> None:
        self.cells = cells
        edges = torch.cat([cells.points[:, :1], cells.scores], 1) if cells.delta > 0 else cells.scores
        buckets = edges.shape[1] + 1
        self.bucket = offset_rows(_negative_cells(edges, logits, positives, valid), buckets)
        # An infinite logit must not make its bucket's mean undefined.
        x = logits.clamp(max=torch.finfo(torch.float32).max).clamp_(min=edges[:, :1])
        table = group.total(cell_sums(self.bucket, [None, x], x, buckets))
        self.size = table[0, :, 1:]
        # A rounded mean may lie past an edge of its bucket, on the other side of a positive.
        upper = torch.cat([edges[:, 1:], cells.points[:, -1:]], 1)
        self.prototype = (table[1, :, 1:] / self.size.clamp(min=1)).clamp(edges, upper)
        self.where = (
            cells.high if cells.delta == 0 else offset_rows(locate(cells.points, self.prototype), cells.num_cells)
        )
        self.shape = logits.shape

    def num_fp(self) -> Tensor:
        """Compute N_FP of every positive, (L, P)."""
        return sums_above(self.cells, tally(self.cells, self.where, self.prototype, self.size))[0]

    def backprop(self, weight: Tensor) -> Tensor:
        """Compute sum_i weight_i H(s_j - s_i) of every logit, (L, M), the same for all of a bucket."""
        per_bucket = evaluate(lines(self.cells, weight), self.where, self.prototype)
        return pad(per_bucket, (1, 0)).flatten().index_select(0, self.bucket).view(self.shape)
