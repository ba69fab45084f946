"""Channel mapper: projects backbone levels to one width and adds coarser levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


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
    """

    def __init__(self, channels: Sequence[int], dim: int = 256, levels: int = 4, norm_groups: int = 32) -> None:
        super().__init__()
        if levels < len(channels):
            raise ValueError(f"model.levels={levels}: the backbone already has {len(channels)} levels. Raise it.")
        self.projections = nn.ModuleList(ConvNorm(c, dim, 1, groups=norm_groups) for c in channels)
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
