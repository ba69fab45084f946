"""Assignment of points to the objects in whose center region they lie.

Source: Kong et al., "FoveaBox: Beyound Anchor-based Object Detection", TIP 2020, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from brs_detr.assign.max_iou import BACKGROUND

SIZE_RANGES = ((1.0, 64.0), (32.0, 128.0), (64.0, 256.0), (128.0, 512.0), (256.0, 2048.0))


@dataclass(frozen=True)
class FoveaAssigner:
    """An object's positives are the cells whose center lies in its center region, on the levels of its size.

    A cell in the center regions of several objects goes to the smallest. Like the published code, which counts in full
    cells and then clamps them to the map, it gives an object whose region lies between the outermost centers and the
    border the cells at the border.

    Attributes:
        strides: pixels per cell of each level.
        size_ranges: minimum and maximum square root of an object's area, in pixels, for each level; an object may
            belong to two levels, or to none.
        sigma: sides of the center region, as a fraction of those of the object.
    """

    strides: tuple[int, ...]
    size_ranges: tuple[tuple[float, float], ...] = SIZE_RANGES
    sigma: float = 0.4
    may_ignore: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Compare the numbers of levels.

        Raises:
            ValueError: there is not one size range for each stride.
        """
        if len(self.strides) != len(self.size_ranges):
            raise ValueError(
                f"size_ranges: {len(self.size_ranges)} ranges for {len(self.strides)} strides {self.strides}. "
                "Give one range per stride."
            )

    def __call__(self, anchors: Tensor, level_counts: Sequence[int], objects: Tensor) -> Tensor:
        """Assign cells to objects.

        Args:
            anchors: (N, 4) xyxy pixels, boxes around the centers of the cells, level after level, row-major.
            level_counts: cells of each level; they sum to N.
            objects: (M, 4) xyxy pixels; M may be 0.

        Returns:
            (N,) int64: object index or BACKGROUND.
        """
        if objects.shape[0] == 0 or anchors.shape[0] == 0:
            return torch.full((anchors.shape[0],), BACKGROUND, dtype=torch.int64, device=anchors.device)
        centers = ((anchors[:, :2] + anchors[:, 2:]) * 0.5).split(list(level_counts))
        area = (objects[:, 2:] - objects[:, :2]).clamp(min=0).prod(dim=1)
        levels = []
        for own, stride, (min_size, max_size) in zip(centers, self.strides, self.size_ranges, strict=True):
            fits = (area.sqrt() >= min_size) & (area.sqrt() <= max_size)
            claims = fits & self._in_region(own / stride - 0.5, objects / stride)
            smallest, index = torch.where(claims, area, torch.inf).min(dim=1)
            levels.append(torch.where(smallest.isfinite(), index, BACKGROUND))
        return torch.cat(levels)

    def _in_region(self, cells: Tensor, objects: Tensor) -> Tensor:
        """Return (n, M) bool, True where a cell (n, 2), by column and row, is in the center region of an object (M, 4).

        Args:
            cells: integers, the last one that of the bottom right corner.
            objects: xyxy in cells.
        """
        half = (objects[:, 2:] - objects[:, :2]) * 0.5
        first = (objects[:, :2] + (1 - self.sigma) * half - 0.5).ceil()
        last = (objects[:, :2] + (1 + self.sigma) * half - 0.5).floor()
        # An interval without a cell stays empty, unless both of its ends are clamped to the same cell of the border.
        first, last = (torch.minimum(end.clamp(min=0), cells[-1:]) for end in (first, last))
        return ((cells[:, None] >= first) & (cells[:, None] <= last)).all(dim=-1)
