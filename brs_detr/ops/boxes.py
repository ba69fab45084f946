"""Boxes as offsets from reference boxes (Girshick et al., "Rich feature hierarchies", appendix C, and Faster R-CNN).

A center moves by a fraction of the reference's size and sides grow by an exponential factor; each of the four numbers
is divided by its standard deviation so that all have a comparable size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BoxCoder:
    """Conversion of boxes to offsets from reference boxes and back, in float32 or wider.

    Attributes:
        stds: divisors of (dx, dy, dw, dh).
        largest_factor: sides change at most by this factor or its inverse when decoding.
    """

    stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    largest_factor: float = 1000 / 16  # as in Faster R-CNN's code: exp() of an early prediction must not overflow

    def encode(self, references: Tensor, boxes: Tensor) -> Tensor:
        """Compute the offsets that turn each reference into the box of the same row.

        Args:
            references: (..., 4) xyxy, sides above 0.
            boxes: (..., 4) xyxy in the same unit, sides above 0.

        Returns:
            (..., 4) (dx, dy, dw, dh) over `stds`.
        """
        center, side = _center_side(_wide(references))
        target_center, target_side = _center_side(_wide(boxes))
        shift = (target_center - center) / side
        growth = (target_side / side).log()
        (sx, sy, sw, sh) = self.stds
        return torch.stack([shift[..., 0] / sx, shift[..., 1] / sy, growth[..., 0] / sw, growth[..., 1] / sh], dim=-1)

    def decode(self, references: Tensor, deltas: Tensor) -> Tensor:
        """Apply offsets to reference boxes; the result is not clipped to any image.

        Args:
            references: (..., 4) xyxy, broadcast against the deltas.
            deltas: (..., 4) as `encode` makes them.

        Returns:
            (..., 4) xyxy in the unit of the references.
        """
        center, side = _center_side(_wide(references))
        dx, dy, dw, dh = _wide(deltas).unbind(-1)
        (sx, sy, sw, sh) = self.stds
        # Only the sides are bounded: a center far outside is harmless, a side of exp(large) is infinite.
        max_log = math.log(self.largest_factor)
        center = center + torch.stack([dx * sx, dy * sy], dim=-1) * side
        half = 0.5 * side * torch.stack([dw * sw, dh * sh], dim=-1).clamp(-max_log, max_log).exp()
        return torch.cat([center - half, center + half], dim=-1)


def _wide(x: Tensor) -> Tensor:
    """Cast to float32, unless float64: half precision has too few digits for pixel coordinates."""
    return x if x.dtype == torch.float64 else x.float()


def _center_side(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return centers and sides, (..., 2) each."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) * 0.5, high - low
