"""Rank & Sort loss (Oksuz et al., ICCV 2021) and its bucketed form (Yavuz et al., ECCV 2024)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import accumulation_dtype, check_quality
from .dominance import sorting_terms
from .ranking import (
    Problem,
    Ranking,
    attach_two,
    join_gradient,
    pairwise_steps,
    prepare,
    rank,
    relevant_negatives,
)

# Ranking terms, sorting terms (L,), gradient (L, M) of the first, entries (L * P,) of the positives, gradient (L, P) of
# the second there.
Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class RankSort(NamedTuple):
    """Ranking and sorting term of Rank & Sort, with a gradient each; scalars, or (L,) for L rankings."""

    ranking: Tensor
    sorting: Tensor


def rank_sort_loss(
    logits: Tensor,
    positives: Tensor,
    quality: Tensor,
    *,
    valid: Tensor | None = None,
    delta: float = 0.5,
    method: str = "exact",
    scope: str = "process",
) -> RankSort:
    """Rank every positive above every negative, and the positives among themselves by their localization quality.

    With x_ij = s_j - s_i, the smoothed step H, rank+(i) = sum of H(x_ij) over positives (i included with H(0)),
    N_FP(i) = sum over negatives and rank = rank+ + N_FP (Bucketed Ranking-based Losses, Eq. 10, 11, S.3 and S.4):

        ranking = mean_i N_FP(i) / rank(i)
        sorting = mean_i l_S(i) - l_S*(i),  l_S(i) = sum_j H(x_ij) (1 - t_j) / rank+(i),  l_S*: over t_j >= t_i only

    The gradient is the identity update: the ranking error of a positive is distributed over the negatives in proportion
    to H, and its sorting error over the positives above it with lower quality. `(ranking + sorting).backward()` trains
    with both terms; scaling or leaving out one of them scales or drops its own gradient only.

    Args:
        logits: any shape, M entries, all in one ranking; or (L, ...) for L rankings of M entries each.
        positives: (P,) int64, distinct indices into `logits.flatten()`; of L rankings (L, P), into `logits.flatten(1)`.
        quality: (P,) or (L, P), t_i in [0, 1], e.g. the IoU of each positive; detached. A positive of quality 0 stays a
            positive.
        valid: bool of the logits' shape; entries that are False are neither ranked nor given a gradient.
        delta: half width of the step.
        method: "pairwise" compares all pairs in O(P M), the reference; "exact" gives the same in O((P + M) log P) time
            and O(P + M) memory; "bucketed" replaces the negatives between two neighboring positives by their mean,
            which changes nothing at delta = 0 and approximates the gradient of the negatives above it.
        scope: "process", or "global" to rank the logits of all processes together: each gets the loss, and its own part
            of the gradient, that a single process with all logits would get. Every process must call it. Sent per
            process: two numbers per positive, and one table of 4 numbers (exact; bucketed 2) per positive of all
            processes.

    Returns:
        two scalars >= 0, in float32 or wider; zeros attached to the graph without positives. For L rankings (L,), what
        L calls return; NaN in one of them makes that value NaN and no other.

    Raises:
        ValueError: for an unknown method, a delta that is negative or not finite, arguments whose shapes or types do
            not match, positives that are out of range, duplicated or ignored (on a GPU: a device-side assertion), or,
            on a CPU, a quality outside [0, 1].
    """
    problem = prepare(logits, positives, valid, delta, method, scope, quality=quality)
    check_quality(quality)
    if problem.group.positives == 0:
        zeros = problem.shaped(problem.zeros())
        return RankSort(zeros, zeros)
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        quality = problem.per_positive(quality.detach()).to(accumulation_dtype(logits.device))
        if method == "pairwise":
            terms = _pairwise(problem, quality, delta)
        else:
            terms = _from_ranking(rank(problem, delta, method), quality)
    return RankSort(*map(problem.shaped, attach_two(problem.logits, *terms, problem.group.nan_or_one)))


def rank_sort_pairwise(
    logits: Tensor, positives: Tensor, quality: Tensor, negative: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Rank & Sort loss (Bucketed Ranking-based Losses, Eq. 10, 11, S.3, S.4) pair by pair; quality (P,) is t_i.

    Returns:
        ranking term, sorting term, gradient (M,) of the first, gradient (M,) of the second.
    """
    count = len(positives)
    relevant = relevant_negatives(logits, positives, negative, delta)
    own, others = logits[positives], logits[relevant]
    ranking_errors, sorting_errors = torch.zeros_like(own), torch.zeros_like(own)
    on_negatives, on_positives = torch.zeros_like(others), torch.zeros_like(own)
    for i, (false_positives, above) in enumerate(pairwise_steps(own, others, delta)):
        num_fp = false_positives.sum()
        rank = above.sum() + num_fp
        ranking_errors[i] = num_fp / rank
        # (N_FP / rank) H / N_FP: the division by N_FP, which may be 0, cancels.
        on_negatives += false_positives / rank

        # The target ranking keeps only the positives of at least this quality above i.
        target = above * (quality >= quality[i])
        missorted = above * (quality < quality[i])
        current_error = (above * (1 - quality)).sum() / above.sum()
        target_error = (target * (1 - quality)).sum() / target.sum()
        sorting_errors[i] = torch.where(missorted.sum() > 1e-10, current_error - target_error, 0.0)
        on_positives += sorting_errors[i] * missorted / missorted.sum().clamp(min=1e-10)
    ranking_gradient = join_gradient(logits, positives, -ranking_errors, relevant, on_negatives) / count
    sorting_gradient = join_gradient(logits, positives, on_positives - sorting_errors, relevant[:0], others[:0]) / count
    return ranking_errors.mean(), sorting_errors.mean(), ranking_gradient, sorting_gradient


def _pairwise(problem: Problem, quality: Tensor, delta: float) -> Terms:
    """Arrange the results of `rank_sort_pairwise` for `attach_two`; quality (L, P)."""

    def definition(logits: Tensor, positives: Tensor, negative: Tensor, quality: Tensor) -> tuple[Tensor, ...]:
        return rank_sort_pairwise(logits, positives, quality, negative, delta)

    ranking, sorting, dense, sparse = problem.pairwise(definition, quality)
    return ranking, sorting, dense, problem.entries, sparse.gather(1, problem.positives)


def _from_ranking(ranking: Ranking, quality: Tensor) -> Terms:
    """Compute both terms by a fast method; quality (L, P)."""
    count = ranking.count
    quality = ranking.sort(quality)
    above, inverse = ranking.positives_above(None, 1 - quality)
    num_fp = ranking.negatives.num_fp()
    position = above + num_fp
    ranking_error = num_fp / position
    # l_R(i) H / N_FP(i) = H / rank(i): nothing is divided by N_FP, which may be 0.
    dense = ranking.join_gradient(ranking.negatives.backprop(1 / (position * count)), -ranking_error / count)
    sorting_error, sparse = sorting_terms(ranking.cells.scores, quality, ranking.cells.delta, above, inverse)
    sparse = ranking.own(sparse / count)
    return ranking_error.mean(1), sorting_error.mean(1), dense, ranking.problem.entries, sparse
