"""Sorting terms of Rank & Sort: how the positives rank among themselves against their localisation qualities.

Few positives are compared pair by pair; many go through quadrant sums of the (logit, quality) plane, where nothing of
size P x P exists.
"""

import torch
from torch import Tensor

from .dominance import quadrant_sums
from .step import smooth_step

# Measured on one CPU thread: above this many positives the quadrant sums are faster.
DENSE = 400
NOTHING = 1e-10


def sorting_terms(
    scores: Tensor, quality: Tensor, delta: float, rank: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Sorting error of each positive and the gradient of their sum (Bucketed Ranking-based Losses, Eq. S.3 and S.4).

    Args:
        scores: (P,) float64 ascending logits of the positives.
        quality: (P,) float64 labels t_i in [0, 1].
        delta: half width of the step.
        rank: (P,) sum_j H(s_j - s_i), the rank of i among the positives.
        inverse: (P,) sum_j H(s_j - s_i) (1 - t_j).

    Returns:
        errors l_S(i) - l_S*(i) (P,) and gradients (P,), neither divided by P.
    """
    method = dense_missorted if len(scores) <= DENSE else quadrant_missorted
    mass, error, spread = method(scores, quality, delta)
    found = mass > NOTHING
    mass = mass.clamp(min=NOTHING)
    # M (A_M / M - A_T / R_T) / R, since the difference of the current and the target error would cancel.
    share = (error / mass - (inverse - error) / (rank - mass)).clamp(min=0, max=1) / rank
    share = torch.where(found, share, 0.0)
    errors = share * mass
    return errors, spread(share) - errors


def dense_missorted(scores: Tensor, quality: Tensor, delta: float):
    """What each positive i sees above itself among the worse localised (t_j < t_i), from the P x P matrix.

    Returns:
        mass M_i = sum_j H(s_j - s_i) [t_j < t_i]  (P,),
        error A_i = the same sum of H (1 - t_j)  (P,),
        the map x -> sum_i x_i H(s_j - s_i) [t_j < t_i]  (P,) to (P,).
    """
    missorted = smooth_step(scores[None] - scores[:, None], delta) * (quality[None] < quality[:, None])
    mass, error = (missorted @ torch.stack([torch.ones_like(quality), 1 - quality], 1)).unbind(1)
    return mass, error, lambda x: x @ missorted


def quadrant_missorted(scores: Tensor, quality: Tensor, delta: float):
    """`dense_missorted` from quadrant sums, in O(P log P)."""
    mass, error = _missorted_sums(scores, quality, torch.stack([torch.ones_like(quality), 1 - quality]), delta)

    def spread(x: Tensor) -> Tensor:
        # With both signs turned, j looks at i as i looked at j.
        return _missorted_sums(-scores.flip(0), -quality.flip(0), x.flip(0)[None], delta)[0].flip(0)

    return mass.clamp(min=0), error, spread


def _missorted_sums(scores: Tensor, quality: Tensor, values: Tensor, delta: float) -> Tensor:
    """sum_j v_j H(s_j - s_i) [t_j < t_i] for ascending scores; values and result (V, P)."""
    count = len(scores)
    ascending, order = quality.sort(stable=True)
    row = torch.empty_like(order).index_copy_(0, order, torch.arange(count, device=order.device)).flip(0)
    rows_before = torch.searchsorted(ascending, quality)
    if delta == 0:
        return quadrant_sums(row, values.flip(1), rows_before, count - torch.searchsorted(scores, scores))
    starts = count - torch.searchsorted(scores, torch.cat([scores - delta, scores + delta]))
    values = torch.cat([values, values * scores]).flip(1)
    sums = quadrant_sums(row, values, rows_before.repeat(2), starts)
    low, high = sums.chunk(2, 1)
    (on_ramp, moment), above = (low - high).chunk(2), high.chunk(2)[0]
    return above + (moment - scores * on_ramp) / (2 * delta) + on_ramp / 2
