"""Necks: from the maps of a backbone to a pyramid of one width, with coarser levels added.

`ChannelMapper` projects each level on its own, as Deformable DETR does; `FPN` also passes coarse maps down to the finer
ones, as the convolutional detectors do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

ExtraLevels = Literal["pool", "c5", "p5"]


def pyramid_strides(strides: Sequence[int], levels: int) -> tuple[int, ...]:
    """Return the strides of a pyramid's `levels` maps: those of the backbone, then each twice the one before."""
    extended = list(strides)
    while len(extended) < levels:
        extended.append(2 * extended[-1])
    return tuple(extended)


class ConvNorm(nn.Module):
    """Convolution without bias and GroupNorm, no activation.

    Args:
        inputs, outputs: channels.
        kernel: side of the kernel; padded so that stride 1 keeps the size.
        stride: stride of the convolution.
        groups: GroupNorm's groups.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.GroupNorm(groups, outputs)
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h', w')."""
        out: Tensor = self.norm(self.conv(x))
        return out


class ChannelMapper(nn.Module):
    """1x1 projections of the backbone levels, and 3x3 stride-2 convolutions for further levels.

    The first further level reads the last *backbone* map, not its projection, as in Deformable DETR.

    Args:
        channels: of the backbone's levels.
        dim: width of every output.
        levels: number of maps to return; at least `len(channels)`.
        norm_groups: GroupNorm's groups; must divide `dim`.
        is_pyramid: the backbone's maps are a pyramid already, and pass as they are where they have `dim` channels.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dim: int = 256,
        levels: int = 4,
        norm_groups: int = 32,
        is_pyramid: bool = False,
    ) -> None:
        super().__init__()
        if levels < len(channels):
            raise ValueError(f"model.levels={levels}: the backbone already has {len(channels)} levels. Raise it.")
        self.projections = nn.ModuleList(
            nn.Identity() if is_pyramid and c == dim else ConvNorm(c, dim, 1, groups=norm_groups) for c in channels
        )
        widths = [channels[-1]] + [dim] * (levels - len(channels) - 1)
        self.extra = nn.ModuleList(
            ConvNorm(c, dim, 3, 2, norm_groups) for c, _ in zip(widths, range(levels - len(channels)))
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map a list of (B, c, h, w) to a list of (B, dim, h, w), finest first."""
        maps = [project(f) for project, f in zip(self.projections, features, strict=True)]
        source = features[-1]
        for extra in self.extra:
            source = extra(source)
            maps.append(source)
        return maps


class FPN(nn.Module):
    """Feature pyramid network (Lin et al., "Feature Pyramid Networks for Object Detection", section 3).

    Every backbone map is projected by a 1x1 convolution and receives the next coarser sum, enlarged to its size by
    repeating cells; a 3x3 convolution then smooths each sum. No norm and no activation, as published. Images need not
    be padded to the coarsest stride: a map of side n lies under one of side ceil(n / 2), and cell i reads cell i // 2.

    torchvision's module is not used: its first weights depend on the inputs alone (Xavier's on inputs and outputs), and
    its P6 reads C5 or P5 by a comparison of their widths, so that a C5 as wide as the pyramid is never read.

    Args:
        channels: of the backbone's levels.
        dim: width of every output.
        levels: number of maps to return; at least `len(channels)`.
        extra: where the coarser ones come from. "pool": every second cell of the last output (Lin et al., section 4.1).
            "c5": 3x3 stride-2 convolutions, the first of the last backbone map (Lin et al., "Focal Loss for Dense
            Object Detection", section 4). "p5": the same, of the last output (ATSS and PAA).
        relu: apply ReLU between two extra convolutions, as RetinaNet's paper does. MMDetection's RetinaNet, ATSS and
            PAA do not.

    Attributes:
        num_levels: number of returned maps.

    Raises:
        ValueError: fewer levels are wanted than the backbone has.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dim: int = 256,
        levels: int = 5,
        extra: ExtraLevels = "pool",
        relu: bool = True,
    ) -> None:
        super().__init__()
        if levels < len(channels):
            raise ValueError(f"levels={levels}: the backbone already has {len(channels)} levels. Raise it.")
        if extra not in ("pool", "c5", "p5"):
            raise ValueError(f"extra={extra} is not known. Choose pool, c5 or p5.")
        self.num_levels, self.source, self.relu = levels, extra, relu
        self.projections = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        self.outputs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)
        added = 0 if extra == "pool" else levels - len(channels)
        widths = [channels[-1] if extra == "c5" else dim] + [dim] * added
        self.extra = nn.ModuleList(nn.Conv2d(c, dim, 3, 2, 1) for c in widths[:added])
        for layer in (*self.projections, *self.outputs, *self.extra):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map a list of (B, c, h, w) to a list of (B, dim, h, w), finest first."""
        sums = [project(f) for project, f in zip(self.projections, features, strict=True)]
        for level in range(len(sums) - 1, 0, -1):
            above = F.interpolate(sums[level], size=sums[level - 1].shape[-2:], mode="nearest")
            sums[level - 1] = sums[level - 1] + above
        maps = [smooth(x) for smooth, x in zip(self.outputs, sums, strict=True)]
        if self.source == "pool":
            while len(maps) < self.num_levels:
                maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        source = features[-1] if self.source == "c5" else maps[-1]
        for index, extra in enumerate(self.extra):
            source = extra(source.relu() if self.relu and index > 0 else source)
            maps.append(source)
        return maps
