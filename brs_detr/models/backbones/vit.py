"""EVA-02 (Fang et al., 2023) as a backbone, with ViTDet's windows and a pyramid of maps (Li et al., 2022).

The blocks and their weights are timm's. Around them: attention inside windows in most blocks, positions for maps of any
size, patches of 16 pixels whatever the network was trained with, and maps of other strides made from the one of stride
16, as in Co-DETR's ViT-L.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import LayerNorm2d, RotaryEmbeddingCat, resample_patch_embed
from timm.models.eva import Eva, EvaBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

PATCH = 16  # pixels a side
GRAIN = 32  # images are padded to a multiple of it, as Co-DETR's are; the published weights saw the padding
STRIDES = (4, 8, 16, 32, 64)  # of the pyramid
# Parameters of a block in the files of EVA-02 and of Co-DETR, and in timm.
BLOCK_NAMES = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    "mlp.w1.": "mlp.fc1_g.",
    "mlp.w2.": "mlp.fc1_x.",
    "mlp.w3.": "mlp.fc2.",
    "mlp.ffn_ln.": "mlp.norm.",
}


class WindowedBlock(EvaBlock):
    """timm's block on maps, whose attention is inside windows that do not overlap.

    Attributes:
        window: cells a side; 0: the window is the map.
    """

    window: int = 0

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:  # type: ignore[override]  # timm's knows no maps
        """Update (B, h, w, C), given the rotations (N, 2 * head width) of the N cells of a window."""
        out = self.attend(self.norm1(x), rope)
        x = x + self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)

    def attend(self, x: Tensor, rope: Tensor) -> Tensor:
        """Apply attention to normalized (B, h, w, C).

        What windows reach beyond the map is zero and, as published, attended to: its keys are zero (they have no bias)
        and its values the bias.
        """
        (height, width), size = x.shape[1:3], self.window
        if size == 0:
            out = self.attn(rearrange(x, "b y x c -> b (y x) c"), rope=rope)
            return rearrange(out, "b (y x) c -> b y x c", y=height)
        x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        rows = x.shape[1] // size
        windows = rearrange(x, "b (i y) (j x) c -> (b i j) (y x) c", y=size, x=size)
        out = self.attn(windows, rope=rope)
        out = rearrange(out, "(b i j) (y x) c -> b (i y) (j x) c", b=x.shape[0], i=rows, y=size)
        return out[:, :height, :width]


class Pyramid(nn.Module):
    """Maps of several strides from the one of stride 16, each by its own convolutions.

    Finer ones are enlarged by repeating cells, coarser ones shrunk by the maximum over 3x3 cells, unlike in ViTDet. The
    parts are numbered as in Co-DETR, whose `neck.p2` to `neck.p6` they are.

    Args:
        inputs: channels of the map.
        dim: channels of the results.
        strides: ascending, from `STRIDES`; there are no parameters for others.
    """

    def __init__(self, inputs: int, dim: int, strides: Sequence[int]) -> None:
        super().__init__()
        half, quarter = inputs // 2, inputs // 4
        layers: dict[int, list[nn.Module]] = {
            4: [_double(), *_conv(inputs, half, 3), _double(), *_conv(half, quarter, 3), *_conv(quarter, dim, 1)],
            8: [_double(), *_conv(inputs, half, 3), *_conv(half, dim, 1)],
            16: _conv(inputs, dim, 1),
            32: [_halve(), *_conv(inputs, dim, 1)],
            64: [_halve(), *_conv(inputs, inputs, 3, stride=2), *_conv(inputs, dim, 1)],
        }
        for stride in strides:
            # no activation after the last norm
            self.add_module(f"p{stride.bit_length() - 1}", nn.Sequential(*layers[stride], *_conv(dim, dim, 3)[:2]))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (B, inputs, h, w) to one (B, dim, h', w') per stride, finest first."""
        return [branch(x) for branch in self.children()]


class ViTBackbone(nn.Module):
    """EVA-02 with a pyramid of maps.

    Args:
        network: timm's; its parts are taken and changed.
        strides: ascending, from `STRIDES`.
        window: cells a side of an attention window.
        global_every: of so many blocks, the last one attends to the whole map.
        activation_checkpointing: recompute the blocks in the backward pass instead of keeping their activations.
        dim: channels of the maps.

    Attributes:
        channels: of each map.
        strides: of each map.
        stages: name of each block.
        is_pyramid: necks that only project maps need not.

    Raises:
        RuntimeError: the network is none that this works for.
        ValueError: a stride is none of the pyramid's.
    """

    is_pyramid = True

    def __init__(
        self,
        network: nn.Module,
        strides: Sequence[int],
        window: int = 24,
        global_every: int = 4,
        activation_checkpointing: bool = False,
        dim: int = 256,
    ) -> None:
        super().__init__()
        if missing := sorted(set(strides) - set(STRIDES)):
            raise ValueError(f"model.backbone.levels: EVA-02's pyramid has maps of stride {STRIDES}, not {missing}.")
        network = _checked(network)
        channels = network.embed_dim
        self.strides, self.channels = list(strides), [dim] * len(strides)
        self.prefix = 0 if network.no_embed_class else network.num_prefix_tokens
        self.activation_checkpointing = activation_checkpointing
        self.patch_embed = nn.Sequential(OrderedDict(proj=_patches_of_16(cast(Any, network.patch_embed).proj)))
        # Like the published one with its first row, the position of a class token, which is not used.
        self.pos_embed = cast(nn.Parameter, network.pos_embed)
        self.rope = cast(RotaryEmbeddingCat, network.rope)
        self.blocks = network.blocks
        self.stages = [f"blocks_{index}" for index in range(len(self.blocks))]
        for index, block in enumerate(self.blocks):
            cast(Any, block.attn).num_prefix_tokens = 0
            # In place, since timm offers no way to build its network from another block.
            block.__class__ = WindowedBlock
            cast(WindowedBlock, block).window = 0 if (index + 1) % global_every == 0 else window
        self.out_norm = nn.LayerNorm(channels)
        self.pyramid = Pyramid(channels, dim, strides)

    def train(self, mode: bool = True) -> ViTBackbone:
        """Set the mode; frozen blocks stay in evaluation mode, without stochastic depth."""
        super().train(mode)
        for block in self.blocks:
            if not any(parameter.requires_grad for parameter in block.parameters()):
                block.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute one (B, dim, h, w) map per stride from (B, 3, H, W) normalized images of any size."""
        height, width = x.shape[-2:]
        x = self.patch_embed(F.pad(x, (0, -width % GRAIN, 0, -height % GRAIN)))
        rows, columns = x.shape[-2:]
        x = rearrange(x, "b c y x -> b y x c") + self.positions(rows, columns)
        ropes: dict[int, Tensor] = {}
        for block in self.blocks:
            window = cast(WindowedBlock, block).window
            if window not in ropes:
                ropes[window] = self.rope.get_embed([window, window] if window else [rows, columns])
            x = self._run(block, x, ropes[window])
        x = rearrange(self.out_norm(x), "b y x c -> b c y x").contiguous()
        # Maps end where those of any other backbone would, so that a cell is where its index says.
        return [
            level[..., : -(-height // stride), : -(-width // stride)]
            for level, stride in zip(self.pyramid(x), self.strides, strict=True)
        ]

    def positions(self, rows: int, columns: int) -> Tensor:
        """Return the learned positions (1, rows, columns, C), resized to a map."""
        table = self.pos_embed[:, self.prefix :]
        side = math.isqrt(table.shape[1])
        table = rearrange(table, "1 (y x) c -> 1 c y x", y=side)
        if (rows, columns) != (side, side):
            table = F.interpolate(table, size=(rows, columns), mode="bicubic")
        return rearrange(table, "1 c y x -> 1 y x c")

    def _run(self, block: nn.Module, x: Tensor, rope: Tensor) -> Tensor:
        """Run a block, with activation checkpointing if it is on and there is a backward pass to save memory for."""
        checkpointed = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        out: Tensor = recompute(block, x, rope, use_reentrant=False) if checkpointed else block(x, rope)
        return out


def rename_eva(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of EVA-02's own files and of Co-DETR checkpoints, and make patches 16 pixels wide.

    timm's own names stay unchanged.
    """
    renamed = {}
    for name, value in state.items():
        if "rope" in name:  # follows from the size of the map
            continue
        for theirs, ours in BLOCK_NAMES.items():
            name = name.replace(theirs, ours)
        if name == "patch_embed.proj.weight":
            value = resample_patch_embed(value, [PATCH, PATCH])
        renamed[name] = value
    return renamed


def _double() -> nn.Module:
    return nn.Upsample(scale_factor=2)


def _halve() -> nn.Module:
    return nn.MaxPool2d(3, stride=2, padding=1)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Build a convolution without bias, LayerNorm over the channels of each cell, and GELU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, LayerNorm2d(outputs, eps=1e-6), nn.GELU()]


def _patches_of_16(patches: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution for patches of 16 pixels that does what `patches` does for patches of its own size."""
    conv = nn.Conv2d(patches.in_channels, patches.out_channels, PATCH, PATCH)
    with torch.no_grad():
        conv.weight.copy_(resample_patch_embed(patches.weight, [PATCH, PATCH]))
        conv.bias.copy_(patches.bias)  # type: ignore[union-attr, arg-type]
    return conv


def _checked(network: nn.Module) -> Eva:
    """Return timm's network, or raise RuntimeError if it is not an EVA-02 as in the paper."""
    problem = ""
    if not isinstance(network, Eva):
        problem = f"it is a {type(network).__name__}"
    elif any(type(block) is not EvaBlock for block in network.blocks):
        problem = "its blocks are others"
    elif type(network.rope) is not RotaryEmbeddingCat or network.pos_embed is None:
        problem = "its positions are others"
    if problem:
        raise RuntimeError(
            f"timm {timm.__version__}: the network cannot be used as an EVA-02 backbone, {problem}. Choose another, "
            "such as model.backbone.name=eva02_large_patch14_448.mim_m38m_ft_in22k_in1k; known to work are timm 1.0.20 "
            "to 1.0.31."
        )
    return cast(Eva, network)
