"""Normalized discounted cumulative gain as a loss (aLRP supplement, Sec. S4)."""

from functools import partial

import torch
from torch import Tensor

from .ranking import (
    EPS,
    Ranking,
    attach,
    join_gradient,
    pairwise_steps,
    prepare,
    rank,
    relevant_negatives,
    smooth_heaviside,
)


def ndcg_loss(
    logits: Tensor,
    positives: Tensor,
    *,
    valid: Tensor | None = None,
    delta: float = 1.0,
    method: str = "exact",
    scope: str = "process",
) -> Tensor:
    """Compute one minus the NDCG of the ranking.

    With rank(i) = 1 + sum over the other positives of H + N_FP(i) (Eq. S25 to S28):

        loss = 1 - sum_i G(i) / G_max,  G(i) = 1 / log2(1 + rank(i)),  G_max = sum_{i=1..P} 1 / log2(1 + i)

    (the paper prints G_max without the reciprocals, which would not normalize). Each positive's update (1 - G(i)) /
    G_max is distributed over the negatives in proportion to H; it is 0 for a positive without negatives above it.

    Args:
        logits: any shape, M entries, all in one ranking; or (L, ...) for L rankings of M entries each.
        positives: (P,) int64, distinct indices into `logits.flatten()`; of L rankings (L, P), into `logits.flatten(1)`.
        valid: bool of the logits' shape; entries that are False are neither ranked nor given a gradient.
        delta: half width of the step.
        method: "pairwise", "bucketed" or "exact", as for `rank_sort_loss`.
        scope: "process", or "global" to rank the logits of all processes together: each gets the loss, and its own part
            of the gradient, that a single process with all logits would get. Every process must call it. Sent per
            process: one number per positive, and one table of 4 numbers (exact; bucketed 2) per positive of all
            processes.

    Returns:
        scalar, float32 or wider; a zero attached to the graph without positives. Smoothing lets ties share a rank, so
        it may lie slightly off 0 for a perfect ranking. For L rankings (L,), what L calls return; NaN in one of them
        makes that value NaN and no other.

    Raises:
        ValueError: for an unknown method, a delta that is negative or not finite, arguments whose shapes or types do
            not match, or positives that are out of range, duplicated or ignored (on a GPU: a device-side assertion).
    """
    problem = prepare(logits, positives, valid, delta, method, scope)
    if problem.group.positives == 0:
        return problem.shaped(problem.zeros())
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        if method == "pairwise":
            value, gradient = problem.pairwise(partial(ndcg_pairwise, delta=delta))
        else:
            value, gradient = _from_ranking(rank(problem, delta, method))
    return problem.shaped(attach(problem.logits, value, gradient, problem.group.nan_or_one))


def ndcg_pairwise(logits: Tensor, positives: Tensor, negative: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Compute NDCG loss (aLRP supplement, Eq. S25 to S28) pair by pair.

    Returns:
        value, gradient (M,).
    """
    ideal = sum(1 / torch.log2(1 + logits.new_tensor(float(i))) for i in range(1, len(positives) + 1))
    relevant = relevant_negatives(logits, positives, negative, delta)
    own, others = logits[positives], logits[relevant]
    gains, updates, on_negatives = torch.zeros_like(own), torch.zeros_like(own), torch.zeros_like(others)
    for i, (false_positives, above) in enumerate(pairwise_steps(own, others, delta)):
        num_fp = false_positives.sum()
        # The positive itself counts 1 in its rank, not H(0).
        rank = above.sum() - smooth_heaviside(logits.new_zeros(()), delta) + 1 + num_fp
        gains[i] = 1 / torch.log2(1 + rank)
        updates[i] = torch.where(num_fp > EPS, (1 - gains[i]) / ideal, 0.0)
        on_negatives += updates[i] * false_positives / num_fp.clamp(min=EPS)
    return 1 - gains.sum() / ideal, join_gradient(logits, positives, -updates, relevant, on_negatives)


def _from_ranking(ranking: Ranking) -> tuple[Tensor, Tensor]:
    """Return values (L,) and gradient (L, M)."""
    num_fp = ranking.negatives.num_fp()
    position = ranking.positives_above(None)[0] + (1 - ranking.self_step) + num_fp
    # The gain of a perfect ranking: positives at ranks 1 to P.
    places = torch.arange(1, ranking.count + 1, device=position.device, dtype=position.dtype)
    ideal = (1 / torch.log2(1 + places)).sum()
    gain = 1 / torch.log2(1 + position)
    update = torch.where(num_fp > EPS, (1 - gain) / ideal, 0.0)
    gradient = ranking.negatives.backprop(update / num_fp.clamp(min=EPS))
    return 1 - gain.sum(1) / ideal, ranking.join_gradient(gradient, -update)
