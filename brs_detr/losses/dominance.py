"""Sums over the points in a quadrant of the plane, many quadrants at once, in O(n log n) time and O(n) memory.

n items hold one row and one column each. The items, in column order, are sorted by row digit by digit as a radix sort
does (a wavelet tree): before each pass, prefix sums over the columns say how much of each digit lies left of any
column. A query follows the digits of its row down the tree and collects, at each level, what has a smaller digit and
lies left of it.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def quadrant_sums(row: Tensor, values: Tensor, rows_before: Tensor, columns_before: Tensor) -> Tensor:
    """Sums of the values of the items with row < rows_before and column < columns_before.

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
    # Every node of the tree has to be full; the items that fill it up lie in rows that no query reaches.
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
        # Nothing has a digit below 0, and nothing comes before the first item.
        some = (inside > 0) & (digit > 0)
        sums.addcmul_(below.index_select(1, (digit - 1).clamp_(min=0) * size + at), some.to(sums.dtype))
        inside = equal.index_select(0, digit * size + at).mul_(inside > 0)
        if bits:
            digit = level.digit(row)
            rank = equal.index_select(0, digit * size + position) - 1
            target = (((row >> bits) << bits) + rank).long()
            row = torch.empty_like(row).index_copy_(0, target, row)
            values = torch.empty_like(values).index_copy_(1, target, values)
    return sums


class Level:
    """One pass: nodes of 2^bits items whose rows agree in all higher bits; the next `step` bits are the digit."""

    def __init__(self, bits: int, step: int, size: int):
        self.bits, self.step, self.size = bits, step, size

    def digit(self, row: Tensor) -> Tensor:
        return (row >> (self.bits - self.step)) & ((1 << self.step) - 1)

    def place(self, row: Tensor, inside: Tensor) -> Tensor:
        """Position of the last of the first `inside` items of the row's node."""
        return (((row >> self.bits) << self.bits) + inside - 1).clamp_(min=0, max=self.size - 1)


def _digit_tables(row: Tensor, values: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Running sums within each node, up to and including each position.

    Returns:
        (2^step * n,) int32, the number of items with digit 0, 1, ...;
        (V, (2^step - 1) * n), the values of the items with a digit below 1, 2, ...
    """
    digit = level.digit(row).view(-1, 1 << level.bits)
    digits = torch.arange(1 << level.step, device=row.device, dtype=torch.int32)[:, None, None]
    equal = (digit == digits).cumsum(2, dtype=torch.int32)
    below = (values.view(-1, 1, *digit.shape) * (digit < digits[1:])).cumsum(3)
    return equal.flatten(), below.flatten(1)
