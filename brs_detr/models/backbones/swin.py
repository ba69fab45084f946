"""Swin Transformer for detection (Liu et al., 2021), on timm's blocks and weights.

timm's classification network differs from the published detection backbone in three ways that are corrected here: it
rolls the map before padding it to full windows, so that windows mix opposite borders; it stops shifting if the map is
no larger than a window; and it lacks a LayerNorm per output map. Maps of any size are accepted, as in the original.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

# Attributes of timm's block, partly private, that `PadThenRollBlock` and `use_published_order` rely on.
NEEDED_OF_A_BLOCK = (
    "norm1",
    "norm2",
    "attn",
    "mlp",
    "window_size",
    "shift_size",
    "window_area",
    "get_attn_mask",
    "_attn",
)


class PadThenRollBlock(SwinTransformerBlock):
    """timm's block in the published order: pad to full windows, roll, attend inside windows, roll back, crop."""

    def _attn(self, x: Tensor) -> Tensor:
        """Apply windowed self-attention to (B, h, w, C), h and w of any size."""
        height, width = x.shape[1:3]
        window_height, window_width = self.window_size
        x = F.pad(x, (0, 0, 0, -width % window_width, 0, -height % window_height))
        padded = x.shape
        rolled = any(self.shift_size)
        if rolled:
            x = torch.roll(x, (-self.shift_size[0], -self.shift_size[1]), (1, 2))
        mask = self.get_attn_mask(x)
        windows = self.attn(window_partition(x, self.window_size).flatten(1, 2), mask=mask)
        x = window_reverse(windows.unflatten(1, self.window_size), self.window_size, padded[1], padded[2])
        if rolled:
            x = torch.roll(x, self.shift_size, (1, 2))
        return x[:, :height, :width].contiguous()


class SwinBackbone(nn.Module):
    """Swin Transformer that returns the maps of several stages, each after a LayerNorm of its own.

    Args:
        network: timm's `SwinTransformer`, built with `TIMM_SETTINGS`; its blocks are changed in place.
        strides: ascending, from 4, 8, 16, 32 (for the usual patch size of 4).
        activation_checkpointing: recompute the blocks in the backward pass instead of keeping their activations.

    Attributes:
        channels: of each returned map.
        strides: of each returned map.
        stages: name of each stage.

    Raises:
        RuntimeError: the Swin of the installed timm is not supported.
    """

    TIMM_SETTINGS: ClassVar[dict[str, Any]] = {"always_partition": True, "strict_img_size": False}

    def __init__(
        self, network: SwinTransformer, strides: Sequence[int], activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        info = network.feature_info
        self.levels = [index for index, item in enumerate(info) if item["reduction"] in strides]
        self.strides = [info[level]["reduction"] for level in self.levels]
        self.channels = [info[level]["num_chs"] for level in self.levels]
        self.patch_size: tuple[int, int] = cast(Any, network.patch_embed).patch_size
        self.activation_checkpointing = activation_checkpointing
        self.patch_embed = network.patch_embed
        # Stages above the last wanted map would have parameters without a gradient, which DDP does not accept.
        self.layers = network.layers[: self.levels[-1] + 1]
        self.stages = [f"layers_{index}" for index in range(len(self.layers))]
        for stage in self.layers:
            for block in _blocks(stage):
                use_published_order(block)
        for level, channels in zip(self.levels, self.channels, strict=True):
            self.add_module(f"norm{level}", nn.LayerNorm(channels))

    def train(self, mode: bool = True) -> SwinBackbone:
        """Set the mode; frozen parts stay in evaluation mode, without stochastic depth."""
        super().train(mode)
        for part in (self.patch_embed, *self.layers):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute one (B, c, h, w) map per stride from (B, 3, H, W) normalized images of any size."""
        patch_height, patch_width = self.patch_size
        x = F.pad(x, (0, -x.shape[-1] % patch_width, 0, -x.shape[-2] % patch_height))
        x = self.patch_embed(x)
        maps = []
        for index, stage in enumerate(self.layers):
            x = stage.get_submodule("downsample")(x)
            for block in _blocks(stage):
                x = self._run(block, x)
            if index in self.levels:
                normed = self.get_submodule(f"norm{index}")(x)
                maps.append(rearrange(normed, "b y x d -> b d y x").contiguous())
        return maps

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run a block, with activation checkpointing if it is on and there is a backward pass to save memory for."""
        checkpointed = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        out: Tensor = recompute(block, x, use_reentrant=False) if checkpointed else block(x)
        return out


def _blocks(stage: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the blocks of a timm Swin stage."""
    return stage.get_submodule("blocks").children()


def use_published_order(block: nn.Module) -> None:
    """Make a timm Swin block pad before it rolls, in place.

    Raises:
        RuntimeError: the block lacks an attribute that is needed, or would not shift or mask as published.
    """
    missing = [part for part in NEEDED_OF_A_BLOCK if not hasattr(block, part)]
    dynamic = getattr(block, "always_partition", False) and getattr(block, "dynamic_mask", False)
    if type(block) is not SwinTransformerBlock or missing or not dynamic:
        detail = f"no {', '.join(missing)}" if missing else f"{type(block).__name__} without always_partition"
        raise RuntimeError(
            f"timm {timm.__version__} has a Swin block that cannot be used for detection ({detail}). "
            "Install timm 1.0.20 to 1.0.31, or set model.backbone.name to a ResNet."
        )
    # In place, since timm offers no way to build its network from another block.
    block.__class__ = PadThenRollBlock


def rename_official_swin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of the original Swin and of Co-DETR checkpoints; timm's own names stay unchanged.

    The original merges patches at the end of a stage, timm at the start of the next one.
    """
    original = any(name.startswith("layers.0.downsample.") for name in state)
    renamed = {}
    for name, value in state.items():
        if name.endswith(("relative_position_index", "attn_mask")):  # constants of the window size, not weights
            continue
        if original:
            name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)
        renamed[name] = value
    return renamed
