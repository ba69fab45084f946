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
    position = torch.arange(size, device=row.device)
    row = torch.cat([row, position[count:]])
    values = pad(torch.cat([torch.ones_like(values[:1]), values]), (0, size - count))
    values[0, count:] = 1
    sums = values.new_zeros(len(values), len(rows_before))
    inside = columns_before
    while bits:
        # Two bits at a time: half the passes for 5 / 3 of the table.
        step = 2 - bits % 2
        node = 1 << bits
        bits -= step
        table = _digit_table(row >> bits, values, 1 << step, node)
        plane = size // node * (node + 1)
        at = _table_index(rows_before >> bits, inside, 1 << step, node, plane)
        sums += table.index_select(1, at)
        inside = _count(table, at, plane)
        own = _table_index(row >> bits, position % node, 1 << step, node, plane)
        target = ((row >> bits) << bits) + _count(table, own, plane)
        row = torch.empty_like(row).index_copy_(0, target, row)
        values = torch.empty_like(values).index_copy_(1, target, values)
    return sums


def _digit_table(prefix: Tensor, values: Tensor, radix: int, node: int) -> Tensor:
    """Sums by column within each node of the items whose last digit is below 0, 1, ... radix: (V, (radix + 1) *
    plane).
    """
    digit = prefix % radix
    below = digit < torch.arange(radix + 1, device=digit.device)[:, None]
    table = (values[:, None] * below).unflatten(2, (-1, node)).cumsum(3)
    return pad(table, (1, 0)).flatten(1)


def _table_index(prefix: Tensor, inside: Tensor, radix: int, node: int, plane: int) -> Tensor:
    """Where the table holds, for the node above `prefix`, the sums of smaller digits over its first `inside` items."""
    return prefix % radix * plane + prefix // radix * (node + 1) + inside


def _count(table: Tensor, at: Tensor, plane: int) -> Tensor:
    """How many items have exactly the digit, not a smaller one."""
    return (table[0].index_select(0, at + plane) - table[0].index_select(0, at)).long()
