"""The losses written straight from their equations, one positive at a time, in O(P M): the reference for the fast
forms.

Common arguments: logits (M,) float64; positives (P,) int64 entries, P >= 1; negative (M,) bool, the entries that rank
as negatives; delta, half width of the step. Every function returns values first, then a gradient (M,) for each.
Negatives below every positive's step are left out at once, as the published code does: their H is 0 throughout.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .step import smooth_step

EPS = 1e-5


def _relevant(logits: Tensor, positives: Tensor, negative: Tensor, delta: float) -> Tensor:
    """(R,) negatives that rank above some positive, wholly or in part."""
    return (negative & (logits >= logits[positives].min() - delta)).nonzero()[:, 0]


def _rows(own: Tensor, others: Tensor, delta: float) -> Iterator[tuple[Tensor, Tensor]]:
    """H(x_ij) of each positive i: over the relevant negatives j (R,), and over the positives (P,)."""
    for logit in own:
        yield smooth_step(others - logit, delta), smooth_step(own - logit, delta)


def _whole(logits: Tensor, positives: Tensor, of_positives: Tensor, relevant: Tensor, of_relevant: Tensor) -> Tensor:
    """Gradient (M,) from its parts; the other entries have none."""
    gradient = torch.zeros_like(logits)
    return gradient.index_copy_(0, relevant, of_relevant).index_copy_(0, positives, of_positives)


def rank_sort_pairwise(
    logits: Tensor, positives: Tensor, quality: Tensor, negative: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rank & Sort loss (Bucketed Ranking-based Losses, Eq. 10, 11, S.3, S.4), ranking term first; quality (P,) is
    t_i.
    """
    count = len(positives)
    relevant = _relevant(logits, positives, negative, delta)
    own, others = logits[positives], logits[relevant]
    ranking_errors, sorting_errors = torch.zeros_like(own), torch.zeros_like(own)
    on_negatives, on_positives = torch.zeros_like(others), torch.zeros_like(own)
    for i, (false_positives, above) in enumerate(_rows(own, others, delta)):
        number = false_positives.sum()
        rank = above.sum() + number
        ranking_errors[i] = number / rank
        on_negatives += false_positives / rank

        target = above * (quality >= quality[i])
        missorted = above * (quality < quality[i])
        current_error = (above * (1 - quality)).sum() / above.sum()
        target_error = (target * (1 - quality)).sum() / target.sum()
        sorting_errors[i] = torch.where(missorted.sum() > 1e-10, current_error - target_error, 0.0)
        on_positives += sorting_errors[i] * missorted / missorted.sum().clamp(min=1e-10)
    ranking_gradient = _whole(logits, positives, -ranking_errors, relevant, on_negatives) / count
    sorting_gradient = _whole(logits, positives, on_positives - sorting_errors, relevant[:0], others[:0]) / count
    return ranking_errors.mean(), sorting_errors.mean(), ranking_gradient, sorting_gradient


def average_precision_pairwise(
    logits: Tensor, positives: Tensor, negative: Tensor, delta: float, interpolate: bool
) -> tuple[Tensor, Tensor]:
    """AP loss (Bucketed Ranking-based Losses, Eq. 3, 9); `interpolate` takes the best precision at higher recall."""
    positives = positives[logits[positives].argsort()]
    relevant = _relevant(logits, positives, negative, delta)
    own, others = logits[positives], logits[relevant]
    errors, on_negatives = torch.zeros_like(own), torch.zeros_like(others)
    best = logits.new_zeros(())
    for i, (false_positives, above) in enumerate(_rows(own, others, delta)):
        number = false_positives.sum()
        counted = above.sum() - smooth_step(logits.new_zeros(()), delta) + 1
        precision = counted / (counted + number)
        best = torch.maximum(best, precision) if interpolate else precision
        errors[i] = 1 - best
        on_negatives += errors[i] * false_positives / number.clamp(min=torch.finfo(own.dtype).tiny)
    return errors.mean(), _whole(logits, positives, -errors, relevant, on_negatives) / len(own)


def alrp_pairwise(
    logits: Tensor, positives: Tensor, error: Tensor, negative: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Classification part of aLRP loss (Oksuz et al., NeurIPS 2020, Eq. 9 to 13); error (P,) is E_loc.

    Returns:
        value, the rank of each positive (P,), gradient (M,).
    """
    relevant = _relevant(logits, positives, negative, delta)
    own, others = logits[positives], logits[relevant]
    ranks, numbers, updates = (torch.zeros_like(own) for _ in range(3))
    on_negatives = torch.zeros_like(others)
    for i, (false_positives, above) in enumerate(_rows(own, others, delta)):
        rivals = above.clone()
        rivals[i] = 0
        number = numbers[i] = false_positives.sum()
        ranks[i] = 1 + rivals.sum() + number
        updates[i] = torch.where(number > EPS, (number + (error * rivals).sum()) / ranks[i], 0.0)
        on_negatives += updates[i] * false_positives / number.clamp(min=EPS)
    gradient = _whole(logits, positives, -updates, relevant, on_negatives) / len(own)
    return (numbers / ranks).mean(), ranks, gradient


def ndcg_pairwise(logits: Tensor, positives: Tensor, negative: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """NDCG loss (aLRP supplement, Eq. S25 to S28), with the ideal gain as the sum of 1 / log2(1 + i)."""
    ideal = sum(1 / torch.log2(1 + logits.new_tensor(float(i))) for i in range(1, len(positives) + 1))
    relevant = _relevant(logits, positives, negative, delta)
    own, others = logits[positives], logits[relevant]
    gains, updates, on_negatives = torch.zeros_like(own), torch.zeros_like(own), torch.zeros_like(others)
    for i, (false_positives, above) in enumerate(_rows(own, others, delta)):
        number = false_positives.sum()
        rank = above.sum() - smooth_step(logits.new_zeros(()), delta) + 1 + number
        gains[i] = 1 / torch.log2(1 + rank)
        updates[i] = torch.where(number > EPS, (1 - gains[i]) / ideal, 0.0)
        on_negatives += updates[i] * false_positives / number.clamp(min=EPS)
    return 1 - gains.sum() / ideal, _whole(logits, positives, -updates, relevant, on_negatives)
