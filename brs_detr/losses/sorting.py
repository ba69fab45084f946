"""Sorting terms of Rank & Sort: how the positives rank among themselves against their localisation qualities."""

from typing import NamedTuple

import torch
from torch import Tensor

from .step import smooth_step

BLOCK = 1 << 20


class Missorted(NamedTuple):
    """What each positive i sees above itself, split by quality (P,) each.

    mass, error: sum of H and of H (1 - t_j) over missorted j (t_j < t_i).
    target_mass, target_error: the same over the rest (t_j >= t_i, i itself included).
    """

    mass: Tensor
    error: Tensor
    target_mass: Tensor
    target_error: Tensor


def sorting_errors(seen: Missorted) -> Tensor:
    """Current minus target sorting error of each positive, l_S(i) - l_S*(i) (RS Loss, Eq. 6 and 7), (P,).

    Written as M (A_M / M - A_T / R_T) / R, since the difference of the two quotients would cancel.
    """
    missorted_mean = seen.error / seen.mass.clamp(min=1e-10)
    error = seen.mass * (missorted_mean - seen.target_error / seen.target_mass) / (seen.mass + seen.target_mass)
    return torch.where(seen.mass > 1e-10, error, torch.zeros_like(error))


def dense_sorting(scores: Tensor, quality: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Sorting error and gradient by blocks of rows of the P x P matrix.

    Args:
        scores: (P,) float64 logits of the positives.
        quality: (P,) float64 in [0, 1].
        delta: half width of the step.

    Returns:
        errors (P,) and gradients (P,), neither divided by P.
    """
    count = len(scores)
    errors = torch.empty_like(scores)
    received = torch.zeros_like(scores)
    inverse = torch.stack([torch.ones_like(quality), 1 - quality], 1)
    rows = max(1, BLOCK // count)
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        step = smooth_step(scores[None] - scores[block, None], delta)
        missorted = step * (quality[None] < quality[block, None])
        mass, error = (missorted @ inverse).unbind(1)
        target_mass, target_error = ((step - missorted) @ inverse).unbind(1)
        seen = Missorted(mass, error, target_mass, target_error)
        errors[block] = sorting_errors(seen)
        received += (errors[block] / mass.clamp(min=1e-10)) @ missorted
    return errors, received - errors
