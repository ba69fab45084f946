"""Sums over the points in a quadrant of the plane, many quadrants at once, in O(n^(4/3)) time and memory.

n items hold one row and one column each (two permutations). The n x n plane is cut into blocks of b x b: a table of
block sums gives all whole blocks of a quadrant in one look-up, and two strips of b items complete it.
"""

import torch
from torch import Tensor

CHUNK = 1 << 20


def quadrant_sums(column: Tensor, values: Tensor, rows_before: Tensor, columns_from: Tensor, block: int) -> Tensor:
    """Sums of the values of the items with row < rows_before and column >= columns_from.

    Args:
        column: (n,) int64, a permutation: the column of the item in each row.
        values: (V, n) by row.
        rows_before: (Q,) int64 in 0..n.
        columns_from: (Q,) int64 in 0..n.
        block: b, about the cube root of n.

    Returns:
        (V, Q).
    """
    count = column.shape[0]
    blocks = -(-count // block) + 1
    padding = blocks * block - count
    column = torch.cat([column, torch.arange(count, count + padding, device=column.device)])
    values = torch.nn.functional.pad(values, (0, padding))
    row = torch.empty_like(column)
    row[column] = torch.arange(blocks * block, device=column.device)

    table = _block_table(column, values, block, blocks)
    whole_rows = rows_before // block
    whole_columns = (columns_from + block - 1) // block
    sums = table.flatten(1).index_select(1, whole_rows * (blocks + 1) + whole_columns)
    lanes = torch.arange(block, device=column.device)
    by_row = column.view(blocks, block), values.view(-1, blocks, block)
    by_column = row.view(blocks, block), values.index_select(1, row).view(-1, blocks, block)
    chunk = max(1, CHUNK // (block * len(values)))
    for start in range(0, len(rows_before), chunk):
        part = slice(start, start + chunk)
        rows, columns = whole_rows[part], columns_from[part]
        inside = by_row[0].index_select(0, rows) >= columns[:, None]
        inside &= lanes < (rows_before[part] - rows * block)[:, None]
        sums[:, part] += (by_row[1].index_select(1, rows) * inside).sum(-1)

        strip = (whole_columns[part] - 1).clamp(min=0)
        inside = by_column[0].index_select(0, strip) < (rows * block)[:, None]
        inside &= lanes >= (columns - strip * block)[:, None]
        # Without a partial block the look-up already holds the strip.
        inside &= (whole_columns[part] * block > columns)[:, None]
        sums[:, part] += (by_column[1].index_select(1, strip) * inside).sum(-1)
    return sums


def _block_table(column: Tensor, values: Tensor, block: int, blocks: int) -> Tensor:
    """Sums over whole blocks, (V, blocks + 1, blocks + 1): rows of earlier blocks, columns of this and later ones."""
    cell = torch.arange(blocks, device=column.device).repeat_interleave(block) * blocks + column // block
    sums = values.new_zeros(len(values), blocks * blocks).index_add_(1, cell, values).view(-1, blocks, blocks)
    table = values.new_zeros(len(values), blocks + 1, blocks + 1)
    table[:, 1:, :-1] = sums
    return table.cumsum(1).flip(2).cumsum(2).flip(2)
