"""Random subset of an assignment with a bounded share of positives (Faster R-CNN, section 3.1.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from brs_detr.assign.max_iou import BACKGROUND, IGNORED


def random_permutation(count: int, device: torch.device) -> Tensor:
    """(count,) random order of 0..count-1."""
    return torch.randperm(count, device=device)


@dataclass(frozen=True)
class RandomSampler:
    """Keeps at most `count` entries of an assignment and ignores the rest.

    Attributes:
        count: entries to keep; background fills what the positives leave free.
        positive_fraction: at most this share of `count` are positives.
        permute: makes the order in which entries are considered; replaced by `torch.arange` where a run must repeat.
    """

    count: int
    positive_fraction: float
    permute: Callable[[int, torch.device], Tensor] = random_permutation

    def __call__(self, assigned: Tensor) -> Tensor:
        """(N,) assignment -> (N,) the same with entries not drawn set to IGNORED, without a device sync."""
        order = self.permute(assigned.shape[0], assigned.device)
        shuffled = assigned[order]
        positive = _first(shuffled >= 0, int(self.count * self.positive_fraction))
        background = _first(shuffled == BACKGROUND, self.count - positive.sum())
        kept = torch.empty_like(positive)
        kept[order] = positive | background
        return torch.where(kept, assigned, IGNORED)


def _first(mask: Tensor, count: int | Tensor) -> Tensor:
    """The first `count` true entries of a mask."""
    return mask & (mask.cumsum(0) <= count)
