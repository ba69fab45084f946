"""Assignment of grid cells to the objects whose mass centers lie in or beside them.

Source: Wang et al., "SOLO: Segmenting Objects by Locations", ECCV 2020, section 3.3, and "SOLOv2", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brs_detr.assign.max_iou import BACKGROUND
from brs_detr.ops.images import Size


def mass_centers(masks: Tensor) -> Tensor:
    """Compute the centers of mass (m, 2) as x, y pixels of bitmaps (m, h, w); nan where a mask is empty."""
    # sums over rows and columns first: no tensor of the size of the masks is made
    columns, rows = masks.sum(dim=1, dtype=torch.float32), masks.sum(dim=2, dtype=torch.float32)
    x = torch.arange(masks.shape[2], device=masks.device) + 0.5  # centers of the pixels
    y = torch.arange(masks.shape[1], device=masks.device) + 0.5
    mass = columns.sum(dim=1)
    return torch.stack([(columns * x).sum(dim=1) / mass, (rows * y).sum(dim=1) / mass], dim=1)


def solo_assign(
    boxes: Tensor,
    centers: Tensor,
    frame: Size,
    grids: Sequence[int],
    size_ranges: Sequence[tuple[float, float]],
    sigma: float = 0.2,
) -> Tensor:
    """Give the cells of every level's grid to the objects of one image.

    An object takes part in the levels whose range holds the square root of its box's area. Its cells are those that its
    center region touches, a box of `sigma` times its sides around its mass center, but at most 3x3 around the center.
    A cell that several objects of a level claim belongs to the first of them.

    Args:
        boxes: (m, 4) xyxy pixels; m may be 0.
        centers: (m, 2) x, y pixels, of `mass_centers`; an object whose center is nan has no cell.
        frame: (h, w) pixels of the padded batch, which every grid divides evenly.
        grids: cells along each side, one per level.
        size_ranges: minimum and maximum size in pixels of each level's objects; an object may belong to two levels.
        sigma: sides of the center region, as a fraction of the box's.

    Returns:
        (N,) int64: object index or BACKGROUND, level after level, cells row-major; N is the sum of the grids' cells.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    size = sides.clamp(min=0).prod(dim=1).sqrt()
    half = sides * sigma / 2
    number = torch.arange(len(boxes), device=boxes.device)[:, None, None]
    levels = []
    for grid, (min_size, max_size) in zip(grids, size_ranges, strict=True):
        per_cell = torch.tensor([frame[1] / grid, frame[0] / grid], dtype=boxes.dtype)
        per_cell = per_cell.to(boxes.device, non_blocking=True)
        center = (centers / per_cell).floor()
        first = torch.maximum(((centers - half) / per_cell).floor(), center - 1)
        last = torch.minimum(((centers + half) / per_cell).floor(), center + 1)
        cells = torch.arange(grid, device=boxes.device)
        # comparisons with nan are false, so that an empty mask claims nothing
        inside = (cells >= first[..., None]) & (cells <= last[..., None])  # (m, 2, grid)
        fits = (size >= min_size) & (size <= max_size)
        claims = inside[:, 1, :, None] & inside[:, 0, None, :] & fits[:, None, None]
        claimed = torch.where(claims, number, len(boxes))
        # one more row, so that an image without objects has a minimum too
        earliest = torch.cat([claimed, claimed.new_full((1, grid, grid), len(boxes))]).amin(dim=0)
        levels.append(torch.where(earliest < len(boxes), earliest, BACKGROUND).flatten())
    return torch.cat(levels)
