"""Average Localization Recall Precision loss (Oksuz et al., NeurIPS 2020): one ranking for scores and boxes."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import accumulation_dtype
from .ranking import (
    EPS,
    Problem,
    Ranking,
    attach,
    join_gradient,
    pairwise_steps,
    prepare,
    rank,
    relevant_negatives,
)


class ALRP(NamedTuple):
    """The two parts of aLRP: classification trains the logits, localization the boxes; their sum is the loss.

    Scalars, or (L,) for L rankings.
    """

    classification: Tensor
    localization: Tensor


def alrp_loss(
    logits: Tensor,
    positives: Tensor,
    localization_error: Tensor,
    *,
    valid: Tensor | None = None,
    delta: float = 1.0,
    method: str = "exact",
    scope: str = "process",
) -> ALRP:
    """Compute the mean over positives of the LRP error at each positive's score.

    With N_FP as in `rank_sort_loss`, E the localization errors and rank(i) = 1 + sum over the other positives of H +
    N_FP (Eq. 9 to 13 of the paper):

        classification = mean_i N_FP(i) / rank(i)
        localization   = mean_i (sum of E_k over positives ranked at or above i) / rank(i)

    The gradient of the logits minimizes N_FP(i) + sum_k E_k H(x_ik) over the other positives k, so it also lowers the
    badly localized positives above i; it is distributed over the negatives in proportion to H. The localization part is
    differentiated with respect to E only, with the rank held fixed, and ranks the positives strictly (equal logits:
    later entries first), as the official heads do. For its self-balance see `balance.EpochBalance`.

    Args:
        logits: any shape, M entries, all in one ranking; or (L, ...) for L rankings of M entries each.
        positives: (P,) int64, distinct indices into `logits.flatten()`; of L rankings (L, P), into `logits.flatten(1)`.
        localization_error: (P,) or (L, P), E of each positive, (1 - IoU) / (1 - tau), or GIoU loss / 2 / (1 - tau) as
            in the paper.
        valid: bool of the logits' shape; entries that are False are neither ranked nor given a gradient.
        delta: half width of the step.
        method: "pairwise", "bucketed" or "exact", as for `rank_sort_loss`.
        scope: "process", or "global" to rank the logits of all processes together: each gets the loss, and its own part
            of the gradient, that a single process with all logits would get. Every process must call it. Sent per
            process: two numbers per positive, and one table of 4 numbers (exact; bucketed 2) per positive of all
            processes.

    Returns:
        two scalars in float32 or wider; zeros attached to the graph without positives. For L rankings (L,), what L
        calls return; NaN in one of them makes its values NaN and no others.

    Raises:
        ValueError: for an unknown method, a delta that is negative or not finite, arguments whose shapes or types do
            not match, or positives that are out of range, duplicated or ignored (on a GPU: a device-side assertion).
    """
    problem = prepare(logits, positives, valid, delta, method, scope, localization_error=localization_error)
    group, dtype = problem.group, problem.logits.dtype
    given = problem.per_positive(localization_error)
    if group.positives == 0:
        zeros = problem.zeros()
        return ALRP(*map(problem.shaped, (zeros, given.sum(1).to(dtype) + zeros)))
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        error = given.detach().to(accumulation_dtype(logits.device))
        if method == "pairwise":
            value, share, gradient = _pairwise(problem, error, delta)
        else:
            ranking = rank(problem, delta, method)
            value, ranks, gradient = _from_ranking(ranking, error)
            share = ranking.own(_shares(ranks))
        # The errors of other processes: part of the value, but not of this process's gradient.
        own = (error * share).sum(1)
        others = group.total(own) - own
    with torch.autocast(logits.device.type, enabled=False):
        share = (share * group.nan_or_one[:, None]).to(dtype)
        localization = (given.to(dtype) * share).sum(1) + others.to(dtype)
        classification = attach(problem.logits, value, gradient, group.nan_or_one)
    return ALRP(*map(problem.shaped, (classification, localization)))


def alrp_pairwise(
    logits: Tensor, positives: Tensor, error: Tensor, negative: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the classification part of aLRP loss (Eq. 9 to 13) pair by pair; error (P,) is E_loc.

    Returns:
        value, the rank of each positive (P,), gradient (M,).
    """
    relevant = relevant_negatives(logits, positives, negative, delta)
    own, others = logits[positives], logits[relevant]
    ranks, numbers, updates = (torch.zeros_like(own) for _ in range(3))
    on_negatives = torch.zeros_like(others)
    for i, (false_positives, above) in enumerate(pairwise_steps(own, others, delta)):
        other_positives = above.clone()
        other_positives[i] = 0
        num_fp = numbers[i] = false_positives.sum()
        ranks[i] = 1 + other_positives.sum() + num_fp
        # Without a negative above it there is nothing to distribute the error over, so the positive has no update.
        updates[i] = torch.where(num_fp > EPS, (num_fp + (error * other_positives).sum()) / ranks[i], 0.0)
        on_negatives += updates[i] * false_positives / num_fp.clamp(min=EPS)
    gradient = join_gradient(logits, positives, -updates, relevant, on_negatives) / len(own)
    return (numbers / ranks).mean(), ranks, gradient


def _shares(ranks: Tensor) -> Tensor:
    """Return the weight of each error in the localization part: it counts at its own and all lower scores.

    Args:
        ranks: (L, P) in ascending order of the logits.
    """
    return (1 / ranks).cumsum(1) / ranks.shape[1]


def _pairwise(problem: Problem, error: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return values (L,), the weight of each error (L, P), and the gradient (L, M), by definition; error (L, P)."""

    def definition(logits: Tensor, positives: Tensor, negative: Tensor, error: Tensor) -> tuple[Tensor, ...]:
        return alrp_pairwise(logits, positives, error, negative, delta)

    value, ranks, gradient = problem.pairwise(definition, error)
    order = problem.logits.gather(1, problem.positives).argsort(dim=1, stable=True)
    return value, torch.empty_like(ranks).scatter_(1, order, _shares(ranks.gather(1, order))), gradient


def _from_ranking(ranking: Ranking, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values (L,), ranks (L, P) in ascending order of the logits, and the gradient (L, M); error (L, P)."""
    error = ranking.sort(error)
    others, error_above = ranking.positives_above(None, error)
    others, error_above = others - ranking.self_step, error_above - ranking.self_step * error
    num_fp = ranking.negatives.num_fp()
    # The positive itself counts fully in its rank (Eq. 9), not with H(0).
    position = 1 + others + num_fp
    update = torch.where(num_fp > EPS, (num_fp + error_above) / position, 0.0) / ranking.count
    gradient = ranking.negatives.backprop(update / num_fp.clamp(min=EPS))
    return (num_fp / position).mean(1), position, ranking.join_gradient(gradient, -update)
