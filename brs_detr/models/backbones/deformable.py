"""Modulated deformable convolutions in a backbone (Zhu et al., "Deformable ConvNets v2", section 3).

Each tap of a 3x3 kernel reads the map at a learned offset and scales what it reads by a learned mask:

    y(p) = sum over taps k of  w_k  x(p + p_k + offset_k(p))  mask_k(p),   mask_k = sigmoid(.) in (0, 1)

Both come from one further convolution of the same input, which starts at zero: offsets are 0 and masks 0.5 at first, so
the layer starts as half of the convolution that it replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

TAPS = 9


class DeformableConv(nn.Module):
    """Modulated deformable 3x3 convolution in place of a plain one.

    `weight` and `bias` are the parameters of the replaced layer, under their names. The convolution of offsets and
    masks is `conv_offset`, as in published checkpoints: 27 channels for each group, of which the first 18 per group
    are the (dy, dx) pixels of the taps, row by row, and the last 9 per group their mask logits.

    Args:
        conv: a 3x3 convolution, of any stride, padding, dilation and number of groups.
        offset_groups: groups of input channels with offsets of their own.

    Raises:
        ValueError: the input channels cannot be divided into so many groups.
    """

    def __init__(self, conv: nn.Conv2d, offset_groups: int = 1) -> None:
        super().__init__()
        if conv.in_channels % offset_groups != 0:
            raise ValueError(
                f"model.backbone.deformable_groups={offset_groups} does not divide the {conv.in_channels} channels of "
                "a 3x3 convolution. Choose a divisor, such as 1 or 4."
            )
        self.stride, self.padding, self.dilation = _pair(conv.stride), _pair(conv.padding), _pair(conv.dilation)
        self.groups, self.offset_groups = conv.groups, offset_groups
        self.weight, self.bias = conv.weight, conv.bias
        self.conv_offset = nn.Conv2d(
            conv.in_channels, 3 * TAPS * offset_groups, 3, self.stride, self.padding, self.dilation
        )
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(cast(Tensor, self.conv_offset.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, D, h', w')."""
        learned = self.conv_offset(x)
        # The kernels lack bfloat16, float16 has too few digits for a position on a large map, and autocast does not
        # widen them on the CPU.
        wide = torch.promote_types(x.dtype, torch.float32)
        offsets, mask = learned.to(wide).split([2 * TAPS * self.offset_groups, TAPS * self.offset_groups], dim=1)
        out: Tensor = deform_conv2d(
            x.to(wide),
            offsets,
            self.weight.to(wide),
            None if self.bias is None else self.bias.to(wide),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=mask.sigmoid(),
        )
        return out.to(learned.dtype)  # that of a plain convolution here, also under autocast

    def extra_repr(self) -> str:
        """Describe the layer where a module is printed."""
        channels = f"{self.weight.shape[1] * self.groups}, {self.weight.shape[0]}"
        return f"{channels}, stride={self.stride}, groups={self.groups}, offset_groups={self.offset_groups}"


def make_deformable(backbone: nn.Module, stages: Sequence[int], offset_groups: int) -> None:
    """Replace the 3x3 convolutions of some stages by deformable ones, in place; their weights are kept.

    Args:
        backbone: with `stages`, the names of its stages.
        stages: 1 is the first stage after the stem (stride 4).
        offset_groups: see `DeformableConv`.

    Raises:
        ValueError: a stage does not exist, has no 3x3 convolution, or has channels that cannot be divided.
    """
    names: list[str] = cast(Any, backbone).stages
    for stage in stages:
        setting = f"model.backbone.deformable_stages={list(stages)}"
        if not 1 <= stage <= len(names):
            raise ValueError(f"{setting}: this backbone has stages 1 to {len(names)}.")
        # Missing are stages above the last wanted map, and all of a network that timm wraps in another way.
        replaced = list(_plain_convs(dict(backbone.named_children()).get(names[stage - 1], nn.Identity())))
        if not replaced:
            raise ValueError(
                f"{setting}: stage {stage} of this backbone has no plain 3x3 convolution to replace, or no map of "
                "model.backbone.levels needs it. Leave it out, or set model.backbone.name to a ResNet or ResNeXt."
            )
        for parent, name, conv in replaced:
            setattr(parent, name, DeformableConv(conv, offset_groups))


def _pair(size: Any) -> tuple[int, int]:
    """Return the two numbers of a layer's setting, which torch describes as any tuple."""
    vertical, horizontal = size
    return vertical, horizontal


def _plain_convs(stage: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d]]:
    """Iterate over the 3x3 convolutions of a stage with the modules that hold them and their names there."""
    for parent in stage.modules():
        for name, conv in parent.named_children():
            # Subclasses, such as those with padding "same", compute something else.
            if type(conv) is nn.Conv2d and conv.kernel_size == (3, 3) and not isinstance(conv.padding, str):
                yield parent, name, conv
