"""Normalized discounted cumulative gain as a loss (aLRP supplement, Sec. S4)."""

import torch
from torch import Tensor

from .checks import accumulation_dtype
from .ranking import (
    EPS,
    Ranking,
    attach,
    attached_zero,
    join_gradient,
    negative_mask,
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
        logits: any shape, M entries, all in one ranking.
        positives: (P,) int64, distinct indices into `logits.flatten()`.
        valid: bool of the logits' shape; entries that are False are neither ranked nor given a gradient.
        delta: half width of the step.
        method: "pairwise", "bucketed" or "exact", as for `rank_sort_loss`.
        scope: "process", or "global" to rank the logits of all processes together: each gets the loss, and its own part
            of the gradient, that a single process with all logits would get. Every process must call it. Sent per
            process: one number per positive, and one table of 4 numbers (exact; bucketed 2) per positive of all
            processes.

    Returns:
        scalar, float32 or wider; a zero attached to the graph without positives. Smoothing lets ties share a rank, so
        it may lie slightly off 0 for a perfect ranking.

    Raises:
        ValueError: for an unknown method, a delta that is negative or not finite, arguments whose shapes or types do
            not match, or positives that are out of range, duplicated or ignored (on a GPU: a device-side assertion).
    """
    flat, valid, group = prepare(logits, positives, valid, delta, method, scope)
    if group.positives == 0:
        return attached_zero(flat, group)
    with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
        if method == "pairwise":
            terms = ndcg_pairwise(
                flat.to(accumulation_dtype(flat.device)), positives, negative_mask(flat, positives, valid), delta
            )
        else:
            terms = _from_ranking(rank(flat, positives, valid, delta, method, group))
    return attach(flat, *terms, group.nan_or_one)


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
    """Return the value and the gradient (M,)."""
    num_fp = ranking.negatives.num_fp()
    position = ranking.positives_above() + (1 - ranking.self_step) + num_fp
    # The gain of a perfect ranking: positives at ranks 1 to P.
    places = torch.arange(1, len(position) + 1, device=position.device, dtype=position.dtype)
    ideal = (1 / torch.log2(1 + places)).sum()
    gain = 1 / torch.log2(1 + position)
    update = torch.where(num_fp > EPS, (1 - gain) / ideal, 0.0)
    gradient = ranking.negatives.backprop(update / num_fp.clamp(min=EPS))
    return 1 - gain.sum() / ideal, gradient.index_copy_(0, ranking.index, ranking.own(-update))
