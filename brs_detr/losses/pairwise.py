"""The losses written straight from their equations, one positive at a time, in O(P M): the reference for the fast
forms.

Common arguments: logits (M,) float64; positives (P,) int64 entries, P >= 1; negative (M,) bool, the entries that rank
as negatives; delta, half width of the step. Every function returns values first, then a gradient (M,) for each.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .step import smooth_step

EPS = 1e-5


def _rows(logits: Tensor, positives: Tensor, negative: Tensor, delta: float) -> Iterator[tuple[Tensor, Tensor]]:
    """H(x_ij) of each positive i: over all entries with 0 where j is no negative (M,), and over the positives (P,)."""
    for i in positives:
        step = smooth_step(logits - logits[i], delta)
        yield torch.where(negative, step, 0.0), step[positives]


def rank_sort_pairwise(
    logits: Tensor, positives: Tensor, quality: Tensor, negative: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rank & Sort loss (Bucketed Ranking-based Losses, Eq. 10, 11, S.3, S.4), ranking term first; quality (P,) is
    t_i.
    """
    count = len(positives)
    ranking = sorting = logits.new_zeros(())
    ranking_gradient, sorting_gradient = torch.zeros_like(logits), torch.zeros_like(logits)
    rows = _rows(logits, positives, negative, delta)
    for i, t, (false_positives, above) in zip(positives, quality, rows):
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


def average_precision_pairwise(
    logits: Tensor, positives: Tensor, negative: Tensor, delta: float, interpolate: bool
) -> tuple[Tensor, Tensor]:
    """AP loss (Bucketed Ranking-based Losses, Eq. 3, 9); `interpolate` takes the best precision at higher recall."""
    count = len(positives)
    value, gradient = logits.new_zeros(()), torch.zeros_like(logits)
    best = logits.new_zeros(())
    positives = positives[logits[positives].argsort()]
    for i, (false_positives, above) in zip(positives, _rows(logits, positives, negative, delta)):
        own = above.sum() - smooth_step(logits.new_zeros(()), delta) + 1
        precision = own / (own + false_positives.sum())
        best = torch.maximum(best, precision) if interpolate else precision
        value = value + (1 - best) / count
        gradient[i] -= (1 - best) / count
        gradient += (1 - best) * false_positives / false_positives.sum().clamp(min=1e-300) / count
    return value, gradient


def alrp_pairwise(
    logits: Tensor, positives: Tensor, error: Tensor, negative: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Classification part of aLRP loss (Oksuz et al., NeurIPS 2020, Eq. 9 to 13); error (P,) is E_loc.

    Returns:
        value, the rank of each positive (P,), gradient (M,).
    """
    count = len(positives)
    value, gradient = logits.new_zeros(()), torch.zeros_like(logits)
    ranks = torch.zeros_like(error)
    for k, (false_positives, above) in enumerate(_rows(logits, positives, negative, delta)):
        others = above.clone()
        others[k] = 0
        number = false_positives.sum()
        ranks[k] = 1 + others.sum() + number
        value = value + number / ranks[k] / count
        update = torch.where(number > EPS, (number + (error * others).sum()) / ranks[k] / count, 0.0)
        gradient[positives[k]] -= update
        gradient += update * false_positives / number.clamp(min=EPS)
    return value, ranks, gradient


def ndcg_pairwise(logits: Tensor, positives: Tensor, negative: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """NDCG loss (aLRP supplement, Eq. S25 to S28), with the ideal gain as the sum of 1 / log2(1 + i)."""
    ideal = sum(1 / torch.log2(1 + logits.new_tensor(float(i))) for i in range(1, len(positives) + 1))
    value, gradient = logits.new_ones(()), torch.zeros_like(logits)
    for i, (false_positives, above) in zip(positives, _rows(logits, positives, negative, delta)):
        number = false_positives.sum()
        rank = above.sum() - smooth_step(logits.new_zeros(()), delta) + 1 + number
        gain = 1 / torch.log2(1 + rank)
        value = value - gain / ideal
        update = torch.where(number > EPS, (1 - gain) / ideal, 0.0)
        gradient[i] -= update
        gradient += update * false_positives / number.clamp(min=EPS)
    return value, gradient
