"""Deformable encoder: each cell of each level attends to a few points of all levels (Deformable DETR, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brs_detr.models.transformer.attention import DeformableAttention, FeedForward, sine_of_cells
from brs_detr.ops.images import Size, level_sizes


@dataclass(frozen=True)
class Memory:
    """Feature maps of all levels as one sequence of tokens.

    Attributes:
        tokens: (B, N, dim), row-major within a level, finest level first.
        padding: (B, N) bool, True where a token is in an image's padding.
        shapes: (h, w) of each level.
        valid_sizes: (B, L, 2) float32, unpadded cells as (columns, rows).
        valid_ratios: (B, L, 2) float32, the same as a fraction of the level's (w, h).
    """

    tokens: Tensor
    padding: Tensor
    shapes: list[Size]
    valid_sizes: Tensor
    valid_ratios: Tensor

    def maps(self) -> list[Tensor]:
        """Split the tokens into (B, dim, h, w) maps."""
        levels = self.tokens.split([h * w for h, w in self.shapes], dim=1)
        return [rearrange(t, "b (y x) d -> b d y x", y=h, x=w) for t, (h, w) in zip(levels, self.shapes, strict=True)]


def level_masks(padding: Tensor, shapes: Sequence[Size]) -> list[Tensor]:
    """Downsample the padding (B, H, W) of pixels to (B, h, w) bool per level: cell i reads pixel floor(i * H / h).

    In integers and not by `F.interpolate`, which reads other pixels at some sizes once exported to ONNX.
    """
    height, width = padding.shape[-2:]
    masks = []
    for h, w in shapes:
        rows = torch.arange(h, device=padding.device) * height // h
        columns = torch.arange(w, device=padding.device) * width // w
        masks.append(padding.index_select(1, rows).index_select(2, columns))
    return masks


def cell_centers(shape: Size, valid_size: Tensor) -> Tensor:
    """Compute the centers of a level's cells in units of each image's unpadded extent.

    Args:
        shape: (h, w) of the level.
        valid_size: (B, 2) unpadded (columns, rows).

    Returns:
        (B, h * w, 2) as (x, y); above 1 in the padding.
    """
    h, w = shape
    ys = torch.arange(h, device=valid_size.device, dtype=valid_size.dtype) + 0.5
    xs = torch.arange(w, device=valid_size.device, dtype=valid_size.dtype) + 0.5
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)
    return rearrange(grid, "y x xy -> 1 (y x) xy") / valid_size[:, None]


class EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward, each with a residual and then LayerNorm."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, hidden: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(dim, heads, levels, points)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, hidden)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, position: Tensor, references: Tensor, shapes: Sequence[Size], padding: Tensor
    ) -> Tensor:
        """Update the tokens x (B, N, dim), given position (B, N, dim), references (B, N, L, 2) and padding (B, N)."""
        x = self.attention_norm(x + self.attention(x + position, x, references, shapes, padding))
        out: Tensor = self.ffn_norm(x + self.ffn(x))
        return out


class DeformableEncoder(nn.Module):
    """Deformable encoder over the flattened levels, with sine and level encodings.

    Args:
        dim, heads, levels, points, hidden: sizes of the layers.
        layers: number of layers.
        temperature, offset: of the cells' sine encoding, see `sine_of_cells`.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        dim: int = 256,
        *,
        layers: int = 6,
        heads: int = 8,
        levels: int = 4,
        points: int = 4,
        hidden: int = 2048,
        temperature: float = 10000.0,
        offset: float = -0.5,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.offset = temperature, offset
        self.level_embed = nn.Parameter(torch.randn(levels, dim))
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, levels, points, hidden) for _ in range(layers))
        self.activation_checkpointing = activation_checkpointing

    def forward(self, maps: Sequence[Tensor], padding: Tensor) -> Memory:
        """Encode feature maps.

        Args:
            maps: (B, dim, h, w) per level.
            padding: (B, H, W) bool on pixels, True where padded.

        Returns:
            The memory. Tokens in the padding are not zeroed; its readers apply the mask.
        """
        shapes = [(m.shape[-2], m.shape[-1]) for m in maps]
        masks = level_masks(padding, shapes)
        dim = maps[0].shape[1]
        x = torch.cat([rearrange(m, "b d y x -> b (y x) d") for m in maps], dim=1)
        wave = {"temperature": self.temperature, "offset": self.offset}
        sines = [rearrange(sine_of_cells(mask, dim // 2, **wave), "b d y x -> b (y x) d") for mask in masks]
        position = torch.cat([s + e for s, e in zip(sines, self.level_embed, strict=True)], dim=1)
        padded = torch.cat([rearrange(mask, "b y x -> b (y x)") for mask in masks], dim=1)
        # Images are padded at the right and bottom only, so the first row and column show the unpadded extent.
        valid_sizes = torch.stack([torch.stack([(~m[:, 0, :]).sum(1), (~m[:, :, 0]).sum(1)], -1) for m in masks], 1)
        valid_sizes = valid_sizes.to(torch.float32)
        valid_ratios = valid_sizes / level_sizes(shapes, valid_sizes)
        centers = torch.cat([cell_centers(s, valid_sizes[:, i]) for i, s in enumerate(shapes)], dim=1)
        # Each cell's own center, on every level.
        references = centers[:, :, None] * valid_ratios[:, None]
        for layer in self.layers:
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, position, references, shapes, padded, use_reentrant=False)
            else:
                x = layer(x, position, references, shapes, padded)
        return Memory(x, padded, shapes, valid_sizes, valid_ratios)
