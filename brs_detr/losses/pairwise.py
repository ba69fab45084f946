"""The losses written straight from their equations, one positive at a time, in O(P N): the reference for the fast
forms.
"""

import torch
from torch import Tensor

from .step import smooth_step


def rank_sort_pairwise(
    logits: Tensor, positives: Tensor, quality: Tensor, negative: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rank & Sort loss (Oksuz et al., ICCV 2021, Eq. 5 to 9), without any reordering.

    Args:
        logits: (M,) float64.
        positives: (P,) int64 entries, P >= 1.
        quality: (P,) float64 labels t_i in [0, 1].
        negative: (M,) bool, the entries ranked as negatives.
        delta: half width of the step.

    Returns:
        ranking loss, sorting loss, gradient of the ranking loss (M,), gradient of the sorting loss (M,).
    """
    count = len(positives)
    ranking = sorting = logits.new_zeros(())
    ranking_gradient, sorting_gradient = torch.zeros_like(logits), torch.zeros_like(logits)
    for i, t in zip(positives, quality):
        false_positives = torch.where(negative, smooth_step(logits - logits[i], delta), 0.0)
        above = smooth_step(logits[positives] - logits[i], delta)

        rank = above.sum() + false_positives.sum()
        ranking_error = false_positives.sum() / rank
        ranking = ranking + ranking_error / count
        ranking_gradient[i] -= ranking_error / count
        ranking_gradient += false_positives / rank / count

        target = above * (quality >= t)
        missorted = above * (quality < t)
        current_error = (above * (1 - quality)).sum() / above.sum()
        target_error = (target * (1 - quality)).sum() / target.sum()
        sorting_error = torch.where(missorted.sum() > 1e-10, current_error - target_error, 0.0)
        sorting = sorting + sorting_error / count
        sorting_gradient[i] -= sorting_error / count
        sorting_gradient[positives] += sorting_error * missorted / missorted.sum().clamp(min=1e-10) / count
    return ranking, sorting, ranking_gradient, sorting_gradient
