"""Channel mapper: backbone levels to one width, plus one coarser level."""

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
        """(B, inputs, h, w) -> (B, outputs, h', w')."""
        return self.norm(self.conv(x))


class ChannelMapper(nn.Module):
    """A 1x1 projection for each backbone level; further levels by 3x3 stride-2 convolutions.

    The first further level reads the last *backbone* map, not its projection (as in Deformable DETR).

    Args:
        channels: of the backbone's levels.
        dim: width of every output.
        levels: how many maps to return; at least `len(channels)`.
        norm_groups: GroupNorm's groups; must divide `dim`.
    """

    def __init__(self, channels: Sequence[int], dim: int = 256, levels: int = 4, norm_groups: int = 32) -> None:
        super().__init__()
        if levels < len(channels):
            raise ValueError(f"model.levels is {levels}, the backbone already gives {len(channels)} levels")
        self.projections = nn.ModuleList(ConvNorm(c, dim, 1, groups=norm_groups) for c in channels)
        widths = [channels[-1]] + [dim] * (levels - len(channels) - 1)
        self.extra = nn.ModuleList(
            ConvNorm(c, dim, 3, 2, norm_groups) for c, _ in zip(widths, range(levels - len(channels)))
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """list of (B, c, h, w) -> list of (B, dim, h, w), finest first."""
        maps = [project(f) for project, f in zip(self.projections, features, strict=True)]
        source = features[-1]
        for extra in self.extra:
            source = extra(source)
            maps.append(source)
        return maps
