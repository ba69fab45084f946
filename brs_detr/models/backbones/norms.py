"""Replacements of a backbone's batch normalization: frozen statistics, or group normalization.

A detector sees a few large images per device, too few for batch statistics. Fine-tuning keeps the ImageNet statistics
and scales (`frozen`); training from scratch normalizes over groups of channels instead (`group`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SMALL_RESIDUAL = 0.25  # scale of a frozen residual branch that would otherwise stay at its initial zero


class Folded(NamedTuple):
    """Statistics and affine map of a frozen normalization as one map, and what they were when it was computed.

    Attributes:
        scale, shift: (C, 1, 1), of the type of the features.
        sources: weight, bias, mean and variance.
        versions: how often each had been changed in place.
    """

    scale: Tensor
    shift: Tensor
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]


class FrozenBatchNorm(nn.Module):
    """Batch normalization with fixed statistics and a fixed affine map, under the parameter names of `nn.BatchNorm2d`.

    The affine map stays a (frozen) parameter, so parameter counts agree with those published for detectors.

    Both are folded into one scale and shift, which are kept until something they follow from changes: is loaded, moved,
    replaced or changed in place. (Only a change through `.data`, which torch does not count, would go unnoticed.)
    Computed in each pass, those of a ResNet-50 were 265 of its 437 operations.

    Args:
        channels: number of channels.
        eps: added to the variance.
        act: activation applied afterwards, for timm layers that fuse it into the normalization.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, act: nn.Module | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.act = act
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._folded: Folded | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, h, w), the same in training and evaluation."""
        scale, shift = self._scale_and_shift(x.dtype)
        # addcmul and not F.batch_norm: with a frozen scale, x need not be kept for the backward pass.
        x = torch.addcmul(shift, x, scale)
        return x if self.act is None else self.act(x)

    def _scale_and_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the scale and shift, (C, 1, 1), that are kept, or fold them."""
        sources = (self.weight, self.bias, self.running_mean, self.running_var)
        # A traced graph has to follow from the weights it is stored with, a gradient has to reach them, and tensors
        # made in inference mode do not count their changes.
        if torch.compiler.is_compiling() or any(s.requires_grad or s.is_inference() for s in sources):
            return self._fold(dtype)
        versions = tuple(source._version for source in sources)
        kept = self._folded
        if (
            kept is None
            or kept.scale.dtype != dtype
            or kept.versions != versions
            or any(old is not new for old, new in zip(kept.sources, sources, strict=True))
        ):
            # A validation in inference mode may be the first to come here; what it made could not be trained with.
            with torch.inference_mode(False), torch.no_grad():
                kept = Folded(*self._fold(dtype), sources, versions)
            self._folded = kept
        return kept.scale, kept.shift

    def _fold(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return scale.to(dtype)[:, None, None], shift.to(dtype)[:, None, None]

    def _apply(self, *args: Any, **kwargs: Any) -> FrozenBatchNorm:
        self._folded = None  # moving to a device or type replaces the data of a parameter without counting a change
        super()._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Copies count their changes from zero again, so a map that is copied along could pass for a current one.
        return {**super().__getstate__(), "_folded": None}

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self._folded = None  # FSDP loads into shards, and gathers them without counting a change
        # A counter of nn.BatchNorm2d, which fixed statistics do not have: it would be an unexpected key.
        state.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state, prefix, *args)


class GroupNorm(nn.GroupNorm):
    """Group normalization (Wu and He, 2018): up to 32 groups of two channels or more; activation optional."""

    def __init__(self, channels: int, eps: float = 1e-5, act: nn.Module | None = None) -> None:
        groups = math.gcd(32, channels)
        # A group of one channel would be an instance norm, which is 0 on a map of 1 x 1.
        while groups > 1 and channels // groups < 2:
            groups //= 2
        super().__init__(groups, channels, eps=eps)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, h, w) over groups of channels."""
        x = super().forward(x)
        return x if self.act is None else self.act(x)


def freeze_batch_norm(module: nn.Module, random_weights: bool = False) -> None:
    """Replace every batch normalization inside `module` by `FrozenBatchNorm` with the same numbers.

    Args:
        module: changed in place.
        random_weights: the network is not pretrained; scales that start at zero (the last one of a residual branch)
            then become small instead, since a frozen zero would silence the branch for good.
    """
    _replace_batch_norm(module, FrozenBatchNorm)
    if random_weights:
        for layer in module.modules():
            if isinstance(layer, FrozenBatchNorm) and not bool(layer.weight.any()):
                nn.init.constant_(layer.weight, SMALL_RESIDUAL)


def group_norm_for_batch_norm(module: nn.Module) -> None:
    """Replace every batch normalization inside `module` by `GroupNorm` with the same affine map, in place."""
    _replace_batch_norm(module, GroupNorm)


def _replace_batch_norm(module: nn.Module, norm: type[FrozenBatchNorm] | type[GroupNorm]) -> None:
    """Replace every batch normalization inside `module`, keeping the numbers that both have."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            new = norm(child.num_features, child.eps, getattr(child, "act", None))
            state = child.state_dict()
            own = new.state_dict()
            new.load_state_dict({key: state.get(key, value) for key, value in own.items()})
            setattr(module, name, new)
        else:
            _replace_batch_norm(child, norm)
