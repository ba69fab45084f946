"""RoIAlign on a pyramid: each region is pooled from the map of its size.

Lin et al., "Feature Pyramid Networks for Object Detection", section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor
from torchvision.ops import roi_align


class Pooled(NamedTuple):
    """Windows of all RoIs of a batch.

    Attributes:
        windows: (N, dim, side, side), those of the finest map first.
        order: (N,) int64, the RoI of each window.
        back: (N,) int64, the window of each RoI.
    """

    windows: Tensor
    order: Tensor
    back: Tensor

    def features(self) -> Tensor:
        """Return the mean (N, dim) of each RoI's window."""
        return reduce(self.windows, "n d y x -> n d", "mean")[self.back]


def finest_scale(strides: Sequence[int]) -> int:
    """Return half the side of the smallest RoIs that are not pooled from the finest map: 56 pixels at stride 4."""
    return 14 * strides[0]


def map_of(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Choose the map (N,) that each RoI (N, 4) xyxy pixels is pooled from: by its size, 0 the finest."""
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
    return (area.sqrt() / finest_scale(strides) + 1e-6).log2().floor().clamp(0, len(strides) - 1).long()


def count_levels(level: Tensor, levels: int) -> Tensor:
    """Count the entries (N,) of each level: (levels,), without waiting for the device as `bincount` does."""
    return (level[:, None] == torch.arange(levels, device=level.device)).sum(dim=0)


def pool_rois(
    features: Sequence[Tensor],
    rois: Sequence[Tensor],
    strides: Sequence[int],
    side: int,
    counts: Sequence[int] | None = None,
) -> Pooled:
    """Pool every RoI on the map of its size, by RoIAlign.

    Args:
        features: (B, dim, h, w) per stride; further maps are not used.
        rois: per image (n_b, 4) xyxy pixels.
        strides: pixels per cell of the maps.
        side: cells a side of the pooled window.
        counts: RoIs of each map; None: the host waits for the device to know them.
    """
    boxes = torch.cat(list(rois)).float()
    # On the host, since the numbers are there: on a GPU, repeat_interleave would wait for their sum.
    image = torch.arange(len(rois)).repeat_interleave(torch.tensor([len(own) for own in rois]))
    image = image.to(boxes, non_blocking=True)[:, None]
    level = map_of(boxes, strides)
    order = level.argsort(stable=True)
    if counts is None:
        counts = count_levels(level, len(strides)).tolist()
    per_level = torch.cat([image, boxes], dim=1)[order].split(list(counts))
    # sampling_ratio=0 takes ceil(side / cells) samples per bin and axis, as the published weights expect
    pooled = [
        roi_align(x.float(), roi, side, spatial_scale=1 / stride, sampling_ratio=0, aligned=True).to(x.dtype)
        for x, roi, stride in zip(features, per_level, strides)
    ]
    return Pooled(torch.cat(pooled), order, _inverse(order))


def _inverse(order: Tensor) -> Tensor:
    """Return the permutation (N,) that undoes one."""
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return back
