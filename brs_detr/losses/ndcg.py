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
    """One minus the NDCG of the ranking.

    With rank(i) = 1 + sum over the other positives of H + N_FP(i) (Eq. S25 to S28):

        loss = 1 - sum_i G(i) / G_max,  G(i) = 1 / log2(1 + rank(i)),  G_max = sum_{i=1..P} 1 / log2(1 + i)

    (the paper prints G_max without the reciprocals, which would not normalize). Each positive's update (1 - G(i)) /
    G_max is handed to the negatives in proportion to H; a positive without negatives above it has none.

    Args:
        logits: any shape, M entries, all in one ranking.
        positives: (P,) int64, distinct indices into `logits.flatten()`.
        valid: bool of the logits' shape; entries that are False are neither ranked nor given a gradient.
        delta: half width of the step.
        method: "pairwise", "bucketed" or "exact", as for `rank_sort_loss`.
        scope: "process", or "global" to rank the logits of all processes together: each gets the loss, and its own part
            of the gradient, that one process with everything would get. Every process must call. Travels per process:
            one number per positive, and one table of 4 numbers (exact; bucketed 2) per positive of all processes.

    Returns:
        scalar, float32 or wider; a zero attached to the graph without positives. Smoothing lets ties share a rank, so
        it may lie slightly off 0 for a perfect ranking.

    Raises:
        ValueError: for an unknown method, a delta that is negative or not finite, arguments whose shapes or types do
            not fit, or positives that are out of range, double or ignored (on a GPU the device asserts).
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
    return attach(flat, *terms, group.sound)


def ndcg_pairwise(logits: Tensor, positives: Tensor, negative: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """NDCG loss (aLRP supplement, Eq. S25 to S28), with the ideal gain as the sum of 1 / log2(1 + i)."""
    ideal = sum(1 / torch.log2(1 + logits.new_tensor(float(i))) for i in range(1, len(positives) + 1))
    relevant = relevant_negatives(logits, positives, negative, delta)
    own, others = logits[positives], logits[relevant]
    gains, updates, on_negatives = torch.zeros_like(own), torch.zeros_like(own), torch.zeros_like(others)
    for i, (false_positives, above) in enumerate(pairwise_steps(own, others, delta)):
        number = false_positives.sum()
        rank = above.sum() - smooth_heaviside(logits.new_zeros(()), delta) + 1 + number
        gains[i] = 1 / torch.log2(1 + rank)
        updates[i] = torch.where(number > EPS, (1 - gains[i]) / ideal, 0.0)
        on_negatives += updates[i] * false_positives / number.clamp(min=EPS)
    return 1 - gains.sum() / ideal, join_gradient(logits, positives, -updates, relevant, on_negatives)


def _from_ranking(ranking: Ranking) -> tuple[Tensor, Tensor]:
    false_positives = ranking.negatives.num_fp()
    position = ranking.positives_above() + (1 - ranking.self_step) + false_positives
    places = torch.arange(1, len(position) + 1, device=position.device, dtype=position.dtype)
    ideal = (1 / torch.log2(1 + places)).sum()
    gain = 1 / torch.log2(1 + position)
    update = torch.where(false_positives > EPS, (1 - gain) / ideal, 0.0)
    gradient = ranking.negatives.backprop(update / false_positives.clamp(min=EPS))
    return 1 - gain.sum() / ideal, gradient.index_copy_(0, ranking.index, ranking.own(-update))
