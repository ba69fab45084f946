"""Tiles of a large image, and one set of detections from those of all tiles.

An object that the edge of a tile cuts is found there as a part of itself. Tiles overlap, so the next tile often has all
of it: such a part is dropped (`seen_better`), and a part that no tile has completely gives way to a complete box around
it (`join_tiles`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

from brs_detr.ops.images import Size

MIN_TILE = 32  # pixels; smaller ones hold no object
JOIN_IOU = 0.5  # boxes of a class in different tiles that overlap more are one object
MIN_COVERED = 0.6  # a part of an object that a complete box covers to this share gives way to it
EDGE = 0.01  # a box that ends within this share of a tile's side from its edge touches it


class Tile(NamedTuple):
    """A part of an image, in pixels of the image.

    Attributes:
        x1, y1, x2, y2: its corners.
        next_x1: where the tile to the right begins. last_x2: where the one to the left ends.
        next_y1, last_y2: the same of the tiles below and above. None where there is none: the image ends there.
    """

    x1: int
    y1: int
    x2: int
    y2: int
    next_x1: int | None = None
    last_x2: int | None = None
    next_y1: int | None = None
    last_y2: int | None = None


def tile_grid(size: Size, tile: Size, overlap: float) -> list[Tile]:
    """Cover an image with tiles of one size, row by row.

    Args:
        size: (h, w) pixels of the image.
        tile: (h, w) pixels of a tile; where the image is smaller, so is the tile.
        overlap: smallest share of a tile's side that two neighbors have in common, below 1.

    Raises:
        ValueError: a tile has less than `MIN_TILE` pixels a side, or the overlap is not in [0, 0.9].
    """
    if min(tile) < MIN_TILE:
        raise ValueError(f"tiles of {tile[1]}x{tile[0]} pixels: a side needs at least {MIN_TILE}.")
    if not 0 <= overlap <= 0.9:
        raise ValueError(f"overlap of tiles {overlap:g}: must lie between 0 and 0.9.")
    columns = _spans(size[1], tile[1], overlap)
    return [
        Tile(x1, y1, x2, y2, next_x1, last_x2, next_y1, last_y2)
        for y1, y2, next_y1, last_y2 in _spans(size[0], tile[0], overlap)
        for x1, x2, next_x1, last_x2 in columns
    ]


def _spans(length: int, side: int, overlap: float) -> list[tuple[int, int, int | None, int | None]]:
    """Return begin and end of the tiles along one axis, the begin of the next one and the end of the last one."""
    if length <= side:
        return [(0, length, None, None)]
    step = max(1, int(side * (1 - overlap)))
    count = -(-(length - side) // step) + 1
    # spread evenly, so that the last tile does not overlap more than the others
    begins = [round(index * (length - side) / (count - 1)) for index in range(count)]
    following = [*begins[1:], None]
    before = [None, *(begin + side for begin in begins[:-1])]
    return [(begin, begin + side, after, last) for begin, after, last in zip(begins, following, before, strict=True)]


def touches_edge(boxes: Tensor, tile: Tile) -> Tensor:
    """Return (n, 4) bool: which sides of boxes (n, 4) xyxy image pixels lie at an edge of the tile inside the image."""
    dx, dy = _margins(tile)
    x1, y1, x2, y2 = boxes.unbind(-1)
    never = torch.zeros_like(x1, dtype=torch.bool)
    return torch.stack(
        [
            x1 <= tile.x1 + dx if tile.last_x2 is not None else never,
            y1 <= tile.y1 + dy if tile.last_y2 is not None else never,
            x2 >= tile.x2 - dx if tile.next_x1 is not None else never,
            y2 >= tile.y2 - dy if tile.next_y1 is not None else never,
        ],
        dim=-1,
    )


def seen_better(boxes: Tensor, tile: Tile) -> Tensor:
    """Return (n,) bool: boxes (n, 4) xyxy image pixels cut by an edge of the tile, of which its neighbor shows more.

    That is so where the box's opposite side lies inside the neighbor, not at its edge. Two neighbors never both leave
    an object to each other.
    """
    dx, dy = _margins(tile)
    x1, y1, x2, y2 = boxes.unbind(-1)
    left, top, right, bottom = touches_edge(boxes, tile).unbind(-1)
    better = torch.zeros_like(left)
    if tile.last_x2 is not None:
        better |= left & (x2 < tile.last_x2 - dx)
    if tile.last_y2 is not None:
        better |= top & (y2 < tile.last_y2 - dy)
    if tile.next_x1 is not None:
        better |= right & (x1 > tile.next_x1 + dx)
    if tile.next_y1 is not None:
        better |= bottom & (y1 > tile.next_y1 + dy)
    return better


def _margins(tile: Tile) -> tuple[float, float]:
    return max(1.0, EDGE * (tile.x2 - tile.x1)), max(1.0, EDGE * (tile.y2 - tile.y1))


def join_tiles(
    boxes: Tensor, scores: Tensor, labels: Tensor, tiles: Tensor, is_part: Tensor, nms_iou: float = JOIN_IOU
) -> Tensor:
    """Choose one detection of each object among those of all tiles.

    First complete boxes, best first: one that overlaps a better one of its class in another tile is dropped. Then the
    parts: one that a chosen complete box of its class covers, or that overlaps a better part, is dropped. Detections
    of one tile do not suppress each other: its detector has chosen them.

    Args:
        boxes: (n, 4) xyxy pixels of the image.
        scores: (n,). labels: (n,).
        tiles: (n,) int64, which tile each is of.
        is_part: (n,) bool, cut by an edge.
        nms_iou: of two boxes that overlap more, the better one stays.

    Returns:
        (m,) int64, indices of those that stay, best first.
    """
    order = scores.argsort(descending=True, stable=True)
    complete = _suppress(boxes, labels, tiles, order[~is_part[order]], nms_iou)
    parts = order[is_part[order]]
    if len(parts) and len(complete):
        low = torch.maximum(boxes[parts, None, :2], boxes[complete, :2])
        high = torch.minimum(boxes[parts, None, 2:], boxes[complete, 2:])
        covered = (high - low).clamp(min=0).prod(-1) / box_area(boxes[parts])[:, None].clamp(min=1e-6)
        covered = covered.masked_fill(labels[parts, None] != labels[complete], 0.0)
        parts = parts[covered.amax(1) < MIN_COVERED]
    chosen = torch.cat([complete, _suppress(boxes, labels, tiles, parts, nms_iou)])
    return chosen[scores[chosen].argsort(descending=True, stable=True)]


def _suppress(boxes: Tensor, labels: Tensor, tiles: Tensor, order: Tensor, nms_iou: float) -> Tensor:
    """Return those of `order`, best first, that overlap no better one of their class in another tile."""
    kept: list[Tensor] = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        same = (labels[rest] == labels[best]) & (tiles[rest] != tiles[best])
        order = rest[~(same & (box_iou(boxes[best][None], boxes[rest])[0] > nms_iou))]
    return torch.stack(kept) if kept else order
