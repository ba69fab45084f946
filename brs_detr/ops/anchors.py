"""Anchor boxes of a feature pyramid, and selection of those inside an image rather than in the batch padding.

Validity follows from host integers alone: the anchors of an image are the top left rectangle of every level, so they
are selected by slicing, and the host never waits for the device to read a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from brs_detr.ops.images import Size


def base_anchors(stride: int, scales: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Make the anchors of the cell at the origin, ratio-major, then scale.

    Args:
        stride: pixels per cell; an anchor of scale s has the area (stride * s)^2.
        scales: sides in multiples of the stride.
        ratios: height over width.

    Returns:
        (len(ratios) * len(scales), 4) xyxy pixels, centered at (0, 0).
    """
    # Sides (s / sqrt(r), s * sqrt(r)): the ratio is height over width, and the area stays s^2.
    root = torch.tensor(ratios, dtype=torch.float32).sqrt()[:, None]
    sides = stride * torch.tensor(scales, dtype=torch.float32)[None]
    half = 0.5 * torch.stack([sides / root, sides * root], dim=-1).reshape(-1, 2)
    return torch.cat([-half, half], dim=-1)


class AnchorGrid(nn.Module):
    """Anchors of every cell of every level, centered at ((column + offset) * stride, (row + offset) * stride).

    By default there is no offset: released Co-DETR and BRS-DETR weights, and the published rank-based detectors with
    anchors, were trained without one.

    Args:
        strides: pixels per cell of each level.
        scales: anchor sides in multiples of the stride.
        ratios: height over width of the anchors.
        offset: of the centers from the cells' corners, in cells; 0.5 for detectors that predict at points.
    """

    bases: Tensor

    def __init__(
        self, strides: Sequence[int], scales: Sequence[float], ratios: Sequence[float], offset: float = 0.0
    ) -> None:
        super().__init__()
        self.offset = offset
        self.strides = tuple(strides)
        self.per_cell = len(scales) * len(ratios)
        bases = torch.stack([base_anchors(stride, scales, ratios) for stride in strides])
        self.register_buffer("bases", bases, persistent=False)  # a buffer moves with the module; not saved
        self._latest: tuple[tuple[Any, ...], list[Tensor]] | None = None

    def forward(self, shapes: Sequence[Size], frame: Size | None = None) -> list[Tensor]:
        """Place the anchors on levels of the given (h, w) cells.

        Args:
            shapes: (h, w) cells of each level.
            frame: (h, w) pixels that the cells of a level divide evenly between them, whatever its stride; None: a cell
                is as large as the stride.

        Returns:
            (h, w, per_cell, 4) xyxy pixels per level.

        Raises:
            ValueError: there are more or fewer levels than strides.
        """
        if len(shapes) != len(self.strides):
            raise ValueError(
                f"anchors: {len(shapes)} feature maps for {len(self.strides)} strides {self.strides}. "
                "Give one map per stride."
            )
        if torch.compiler.is_compiling() or any(type(side) is not int for shape in shapes for side in shape):
            return self._place(shapes, frame)  # a graph for any size
        # Kept for the next maps of these shapes: all heads of a step have the same, and often all steps.
        key = tuple(shapes), frame, self.bases.device, self.bases.dtype, type(self.bases)
        if self._latest is None or self._latest[0] != key:
            with torch.inference_mode(False):  # a later step may need gradients
                self._latest = key, self._place(shapes, frame)
        return list(self._latest[1])

    def _place(self, shapes: Sequence[Size], frame: Size | None) -> list[Tensor]:
        """Place the anchors as `forward` does."""
        levels = []
        for (height, width), stride, base in zip(shapes, self.strides, self.bases, strict=True):
            step_y, step_x = (stride, stride) if frame is None else (frame[0] / height, frame[1] / width)
            x = (torch.arange(width, device=base.device, dtype=base.dtype) + self.offset) * step_x
            y = (torch.arange(height, device=base.device, dtype=base.dtype) + self.offset) * step_y
            y, x = torch.meshgrid(y, x, indexing="ij")
            levels.append(torch.stack([x, y, x, y], dim=-1)[:, :, None] + base)
        return levels


def octave_scales(base: float, count: int) -> tuple[float, ...]:
    """Return `count` anchor sides that divide one octave evenly, the smallest `base` (RetinaNet, section 4)."""
    return tuple(base * 2 ** (i / count) for i in range(count))


def valid_extents(size: Size, shapes: Sequence[Size], strides: Sequence[int]) -> list[Size]:
    """Count the cells of each level that lie inside one image of a padded batch.

    Args:
        size: (h, w) pixels of the image, without padding.
        shapes: (h, w) cells of each level of the padded batch.
        strides: pixels per cell of each level.

    Returns:
        (rows, columns) per level: cells whose index is below ceil(size / stride).
    """
    return [
        (min(rows, -(-size[0] // stride)), min(columns, -(-size[1] // stride)))
        for (rows, columns), stride in zip(shapes, strides, strict=True)
    ]


def frame_extents(size: Size, shapes: Sequence[Size], frame: Size) -> list[Size]:
    """Count the cells of each level that begin inside one image, where levels divide a frame evenly.

    Args:
        size: (h, w) pixels of the image, without padding.
        shapes: (h, w) cells of each level.
        frame: (h, w) pixels of the padded batch.

    Returns:
        (rows, columns) per level.
    """
    # in integers: the quotient of a frame and its cells is no exact number
    return [(-(-size[0] * rows // frame[0]), -(-size[1] * columns // frame[1])) for rows, columns in shapes]


def inside_image(anchors: Tensor, size: Size, border: float = 0.0) -> Tensor:
    """Find the anchors (n, 4) xyxy that stick out of an image of (h, w) pixels by at most `border` pixels: (n,) bool.

    An anchor that ends exactly at the right or lower border counts as sticking out, as in the published code, whose
    last pixel is number w - 1.
    """
    height, width = size
    # Compared side by side with host numbers: a tensor of the limits would be a copy to the device.
    low = (anchors[:, :2] >= -border).all(dim=1)
    return low & (anchors[:, 2] < width + border) & (anchors[:, 3] < height + border)


@lru_cache(maxsize=16)
def _cells(shapes: tuple[Size, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (row, column) (n, 2) and the level (n,) of each cell of all levels."""
    with torch.inference_mode(False):  # kept for later steps, which may need gradients
        places = [
            torch.stack(torch.meshgrid(*(torch.arange(side, device=device) for side in shape), indexing="ij"), dim=-1)
            for shape in shapes
        ]
        cells = [place.flatten(0, 1) for place in places]
        return torch.cat(cells), torch.cat([torch.full_like(own[:, 0], level) for level, own in enumerate(cells)])


@lru_cache(maxsize=16)
def rows_inside(
    extents: tuple[tuple[Size, ...], ...], shapes: tuple[Size, ...], per_cell: int, device: torch.device
) -> Tensor | None:
    """Find the entries inside their images, among all entries of the padded batch.

    They are the same for all maps of a step, and kept for the next batch of these sizes.

    Args:
        extents: per image (rows, columns) of each level that lie inside it.
        shapes: (h, w) cells of each level of the padded batch.
        per_cell: entries of a cell.
        device: of the result.

    Returns:
        (N,) int64 rows among the entries of one image after the other, level after level; None if it is all of them.
    """
    if all(own == shapes for own in extents):
        return None
    number = sum(rows * columns for own in extents for rows, columns in own)
    with torch.inference_mode(False):
        cells, level = _cells(shapes, device)
        ends = torch.tensor(extents).to(device, non_blocking=True)
        inside = (cells < ends[:, level]).all(dim=-1)
        inside = inside[..., None].expand(-1, -1, per_cell)
        return torch.nonzero_static(inside.flatten(), size=number * per_cell).flatten()


def batch_rows(levels: Sequence[Tensor], extents: Sequence[Sequence[Size]]) -> Tensor:
    """Select the entries of all images: image after image, level after level, cells row-major, anchors fastest.

    Args:
        levels: (B, h, w, ..., D) per level.
        extents: per image (rows, columns) per level.

    Returns:
        (N, D), N = entries inside their images.
    """
    rows = _rows_of(levels, extents)
    joined = torch.cat([level.flatten(1, -2) for level in levels], dim=1).flatten(0, 1)
    return joined if rows is None else joined.index_select(0, rows)


def batch_anchors(grid: Sequence[Tensor], extents: Sequence[Sequence[Size]]) -> list[Tensor]:
    """Select the anchors inside each image, as `batch_rows` selects what is said about them.

    Args:
        grid: (h, w, A, 4) per level.
        extents: per image (rows, columns) per level.

    Returns:
        Per image (n, 4).
    """
    anchors = torch.cat([level.flatten(0, -2) for level in grid])
    rows = _rows_of([level[None] for level in grid], extents)
    if rows is None:
        return [anchors] * len(extents)
    per_cell = grid[0].shape[2]
    lengths = [sum(height * width for height, width in own) * per_cell for own in extents]
    return list(anchors[rows % len(anchors)].split(lengths))


def _rows_of(levels: Sequence[Tensor], extents: Sequence[Sequence[Size]]) -> Tensor | None:
    """Return `rows_inside` for levels (B, h, w, ..., D)."""
    shapes = tuple((level.shape[1], level.shape[2]) for level in levels)
    return rows_inside(tuple(map(tuple, extents)), shapes, math.prod(levels[0].shape[3:-1]), levels[0].device)


def cell_features(
    maps: Sequence[Tensor], sizes: Sequence[Size], strides: Sequence[int], per_cell: int = 1
) -> list[Tensor]:
    """Select the features of the cells inside each image, in the order of `batch_rows`.

    Args:
        maps: (B, dim, h, w) per level.
        sizes: (h, w) pixels of each image, without padding.
        strides: pixels per cell of each level.
        per_cell: anchors of a cell, each of which gets the cell's features.

    Returns:
        Per image (n, dim), with gradient.
    """
    levels = [x.permute(0, 2, 3, 1) for x in maps]
    extents = [valid_extents(size, [(x.shape[1], x.shape[2]) for x in levels], strides) for size in sizes]
    images = batch_rows(levels, extents).split([sum(h * w for h, w in own) for own in extents])
    return [own.repeat_interleave(per_cell, dim=0) for own in images] if per_cell > 1 else list(images)


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Pick rows of each image by index: (B, N, D) and (B, n) int64 -> (B, n, D).

    `gather` and not `take_along_dim`, which `torch.export` can trace for a fixed batch size only.
    """
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
