"""Sorting term of Rank & Sort: the order of the positives compared with that of their localization qualities.

Few positives are compared pair by pair. For many, `quadrant_sums` sums over quadrants of the (logit, quality) plane, in
O(n log n) time and O(n) memory, without any P x P matrix:

n items have one row and one column each. In column order, they are sorted by row, digit by digit as in a radix sort (a
wavelet tree): before each pass, prefix sums over the columns give the sum of each digit's items left of any column. A
query follows the digits of its row down the tree and adds up, at each level, the items that have a smaller digit and
lie left of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from .by_device import choices
from .ranking import smooth_heaviside


def quadrant_sums(row: Tensor, values: Tensor, rows_before: Tensor, columns_before: Tensor) -> Tensor:
    """Sum the values of the items with row < rows_before and column < columns_before, for many queries at once.

    Args:
        row: (n,) int64, a permutation: the row of the item in each column.
        values: (V, n) float64 by column.
        rows_before: (Q,) int64 in 0..n.
        columns_before: (Q,) int64 in 0..n.

    Returns:
        (V, Q).
    """
    count = len(row)
    bits = count.bit_length()
    size = 1 << bits
    position = torch.arange(size, device=row.device, dtype=torch.int32)
    row = torch.cat([row.int(), position[count:]])
    # Every node of the tree has to be full; the items added lie in rows that no query reaches.
    values = pad(values, (0, size - count))
    rows_before, inside = rows_before.int(), columns_before.int()
    sums = values.new_zeros(len(values), len(rows_before))
    # More bits at a time mean fewer passes over larger tables; measured on one CPU thread.
    step = 3 if bits <= 12 else 2
    while bits:
        level = Level(bits, min(bits, step), size)
        bits -= level.step
        equal, below = _digit_tables(row, values, level)
        at, digit = level.place(rows_before, inside), level.digit(rows_before)
        # No digit is below 0, and no item comes before the first one.
        nonempty = (inside > 0) & (digit > 0)
        # One row of the table after the other: a CPU is twice as fast so as at all rows of a column.
        place, nonempty = (digit - 1).clamp_(min=0).mul_(size).add_(at), nonempty.to(sums.dtype)
        for total, values_below in zip(sums, below):
            total.addcmul_(values_below.index_select(0, place), nonempty)
        inside = equal.index_select(0, digit * size + at).mul_(inside > 0)
        if bits:  # sort the items of each node by digit, for the next pass
            digit = level.digit(row)
            rank = equal.index_select(0, digit * size + position) - 1
            target = (((row >> bits) << bits) + rank).long()
            row = torch.empty_like(row).index_copy_(0, target, row)
            values = torch.empty_like(values).index_copy_(1, target, values)
    return sums


class Level:
    """One pass: nodes of 2^bits items whose rows agree in all higher bits; the next `step` bits are the digit."""

    def __init__(self, bits: int, step: int, size: int) -> None:
        self.bits, self.step, self.size = bits, step, size

    def digit(self, row: Tensor) -> Tensor:
        """Return each row's digit at this level."""
        return (row >> (self.bits - self.step)) & ((1 << self.step) - 1)

    def place(self, row: Tensor, inside: Tensor) -> Tensor:
        """Return the position of the last of the first `inside` items of the row's node."""
        return (((row >> self.bits) << self.bits) + inside - 1).clamp_(min=0, max=self.size - 1)


def _digit_tables(row: Tensor, values: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Compute running sums within each node, up to and including each position.

    Returns:
        (2^step * n,) int32, the number of items with digit 0, 1, ...;
        (V, (2^step - 1) * n), the values of the items with a digit below 1, 2, ...
    """
    digit = level.digit(row).view(-1, 1 << level.bits)
    digits = torch.arange(1 << level.step, device=row.device, dtype=torch.int32)[:, None, None]
    equal = (digit == digits).cumsum(2, dtype=torch.int32)
    below = (values.view(-1, 1, *digit.shape) * (digit < digits[1:])).cumsum_(3)
    return equal.flatten(), below.flatten(1)


# Entries of the P x P matrices that exist at a time, 128 MiB: of more rankings, some are computed after others.
MAX_ENTRIES = 1 << 24
# A positive with less missorted mass above it than this is in order; its error would be 0 / 0.
MIN_MASS = 1e-10


def sorting_terms(
    scores: Tensor, quality: Tensor, delta: float, rank: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute each positive's sorting error and the gradient of their sum (Bucketed Ranking-based Losses, S.3, S.4).

    Args:
        scores: (L, P) float64 ascending logits of the positives of L rankings.
        quality: (L, P) float64 labels t_i in [0, 1].
        delta: half width of the step.
        rank: (L, P) sum_j H(s_j - s_i), the rank of i among the positives.
        inverse: (L, P) sum_j H(s_j - s_i) (1 - t_j).

    Returns:
        errors l_S(i) - l_S*(i) (L, P) and gradients (L, P), neither divided by P.
    """
    count = scores.shape[1]
    if count <= choices(scores.device).max_dense:
        missorted, together = dense_missorted, max(1, MAX_ENTRIES // count**2)
    else:
        missorted, together = quadrant_missorted, 1
    parts = [
        _errors(missorted(one_scores, one_quality, delta), one_rank, one_inverse)
        for one_scores, one_quality, one_rank, one_inverse in zip(
            *(values.split(together) for values in (scores, quality, rank, inverse))
        )
    ]
    errors, gradients = (part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts))
    return errors, gradients


# Missorted mass M and error A of each positive, and the map that distributes values over what is missorted above each.
Missorted = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]


def _errors(missorted: Missorted, rank: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the two results of `sorting_terms` of some rankings."""
    mass, error, spread = missorted
    wrong = mass > MIN_MASS
    mass = mass.clamp(min=MIN_MASS)
    # l_S - l_S* written as M (A_M / M - A_T / R_T) / R: the difference of the two errors would lose its digits.
    # M, A_M: sums of H and H (1 - t) over the missorted; A_T, R_T: over the others; R: rank among the positives.
    share = (error / mass - (inverse - error) / (rank - mass)).clamp(min=0, max=1) / rank
    share = torch.where(wrong, share, 0.0)
    errors = share * mass
    return errors, spread(share) - errors


def dense_missorted(scores: Tensor, quality: Tensor, delta: float) -> Missorted:
    """Sum, for each positive i, over the worse localized positives (t_j < t_i) above it, from the P x P matrices.

    Args:
        scores, quality: (L, P).
        delta: half width of the step.

    Returns:
        mass M_i = sum_j H(s_j - s_i) [t_j < t_i]  (L, P),
        error A_i = the same sum of H (1 - t_j)  (L, P),
        the map x -> sum_i x_i H(s_j - s_i) [t_j < t_i]  (L, P) to (L, P).
    """
    above = smooth_heaviside(scores[:, None] - scores[:, :, None], delta)
    above.mul_(quality[:, None] < quality[:, :, None])
    mass, error = (above @ torch.stack([torch.ones_like(quality), 1 - quality], 2)).unbind(2)
    return mass, error, lambda x: (x[:, None] @ above)[:, 0]


def quadrant_missorted(scores: Tensor, quality: Tensor, delta: float) -> Missorted:
    """Compute the same as `dense_missorted` from quadrant sums, in O(P log P), of one ranking (1, P)."""
    scores, quality = scores[0], quality[0]
    count = len(scores)
    ascending, order = quality.sort(stable=True)
    place = torch.arange(count, device=order.device)
    # Each positive's row, and the rows of those of lower and of equal or lower quality. All are searched for in sorted
    # order, where neighboring searches read neighboring memory.
    lower, up_to = (torch.searchsorted(ascending, ascending, right=right) for right in (False, True))
    row, lower, up_to = (torch.empty_like(order).index_copy_(0, order, values) for values in (place, lower, up_to))
    if delta == 0:
        below, at_or_below = (torch.searchsorted(scores, scores, right=right) for right in (False, True))
    else:  # H is continuous, so it makes no difference on which side of an end a score lies that equals it
        below, at_or_below = torch.searchsorted(scores, torch.stack([scores - delta, scores + delta]))

    # Columns in descending order of the scores: what counts in i's rank lies left of one column.
    ends = (count - below, count - at_or_below)
    values = torch.stack([torch.ones_like(quality), 1 - quality]).flip(1)
    mass, error = _ramp_sums(row.flip(0), scores, values, scores.flip(0), lower, ends, delta)

    def spread(x: Tensor) -> Tensor:
        # The transposed sum, over the i that lie below j with higher quality: rows and columns in reverse order.
        ends = (at_or_below, below)
        return _ramp_sums(count - 1 - row, -scores, x, -scores, count - up_to, ends, delta)

    return mass.clamp(min=0)[None], error[None], spread


def _ramp_sums(
    row: Tensor,
    scores: Tensor,
    values: Tensor,
    of_columns: Tensor,
    rows_before: Tensor,
    ends: tuple[Tensor, Tensor],
    delta: float,
) -> Tensor:
    """Compute sum_j v_j H(s_j - s_i) over the items in the rows before a positive's own limit.

    Args:
        row: (P,) int64, the row of the item in each column; columns are in descending order of s_j.
        scores: (P,) s_i in the order of the results.
        values: (V, P) v_j by column.
        of_columns: (P,) s_j by column.
        rows_before: (P,) int64, each positive's limit.
        ends: the columns before which s_j > s_i - delta, and before which s_j > s_i + delta; (P,) int64 each.
        delta: half width of the step.

    Returns:
        (V, P).
    """
    if delta == 0:
        return quadrant_sums(row, values, rows_before, ends[0])
    # H is a ramp: 1 above s_i + delta, linear in s_j from s_i - delta on. Both ends are one query each.
    values = torch.cat([values, values * of_columns])
    sums = quadrant_sums(row, values, rows_before.repeat(2), torch.cat(ends))
    low, high = sums.chunk(2, 1)
    (on_ramp, moment), above = (low - high).chunk(2), high.chunk(2)[0]
    return above + (moment - scores * on_ramp) / (2 * delta) + on_ramp / 2
