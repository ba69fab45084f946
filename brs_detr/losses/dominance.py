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
        (1 + V, Q): the number of items, then the sums.
    """
    count = len(row)
    bits = count.bit_length()
    size = 1 << bits
    position = torch.arange(size, device=row.device, dtype=torch.int32)
    row = torch.cat([row.int(), position[count:]])
    values = pad(torch.cat([torch.ones_like(values[:1]), values]), (0, size - count))
    # Items that fill up to a power of two lie below all rows asked for, but every node of the tree has to be full.
    values[0, count:] = 1
    rows_before, inside = rows_before.int(), columns_before.int()
    sums = values.new_zeros(len(values), len(rows_before))
    # More bits at a time mean fewer passes over larger tables; measured on one CPU thread.
    step = 3 if bits <= 14 else 2
    while bits:
        level = Level(bits, min(bits, step), size)
        bits -= level.step
        table = _digit_table(row, values, level)
        at = _table_index(rows_before, inside, level)
        sums += table.flatten(1).index_select(1, at)
        inside = _count(table[0], at)
        if bits:
            own = _table_index(row, position & (level.node - 1), level)
            target = ((row >> bits) << bits) + _count(table[0], own)
            row = torch.empty_like(row).index_copy_(0, target.long(), row)
            values = torch.empty_like(values).index_copy_(1, target.long(), values)
    return sums


class Level:
    """One pass: nodes of 2^bits items whose rows agree in all higher bits; the next `step` bits are the digit."""

    def __init__(self, bits: int, step: int, size: int):
        self.bits, self.step = bits, step
        self.node = 1 << bits
        self.plane = (size >> bits) * (self.node + 1)

    def digit(self, row: Tensor) -> Tensor:
        return (row >> (self.bits - self.step)) & ((1 << self.step) - 1)


def _digit_table(row: Tensor, values: Tensor, level: Level) -> Tensor:
    """Sums of the first items of each node whose digit is below 0, 1, ...: (V, 2^step + 1, nodes * (node + 1))."""
    digits = torch.arange((1 << level.step) + 1, device=row.device, dtype=torch.int32)
    below = level.digit(row) < digits[:, None]
    table = (values[:, None] * below).unflatten(2, (-1, level.node)).cumsum(3)
    return pad(table, (1, 0)).flatten(2)


def _table_index(row: Tensor, inside: Tensor, level: Level) -> Tensor:
    """Where a flat table holds, for the node and digit of `row`, the sum of smaller digits over `inside` items."""
    return level.digit(row) * level.plane + (row >> level.bits) * (level.node + 1) + inside


def _count(counts: Tensor, at: Tensor) -> Tensor:
    """How many items have exactly the digit, not a smaller one."""
    flat = counts.flatten()
    return (flat.index_select(0, at + counts.shape[1]) - flat.index_select(0, at)).int()
