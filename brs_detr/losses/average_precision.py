"""AP loss (Chen et al., CVPR 2019) and its bucketed form (Yavuz et al., ECCV 2024)."""

import torch
from torch import Tensor

from .checks import accumulation_dtype
from .ranking import (
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


def average_precision_loss(
    logits: Tensor,
    positives: Tensor,
    *,
    valid: Tensor | None = None,
    delta: float = 1.0,
    method: str = "exact",
    scope: str = "process",
    interpolate: bool = False,
) -> Tensor:
    """One minus the average precision of the ranking.

    With rank = rank+ + N_FP as in `rank_sort_loss` (Bucketed Ranking-based Losses, Eq. 3, 9 and 13):

        loss = mean_i 1 - p(i),  p(i) = rank+(i) / rank(i)

    A positive counts fully in its own rank+, as in the AP loss paper, except with "bucketed", where it counts H(0)
    (1/2 for delta > 0), as in the Bucketed AP paper. The gradient hands each positive's error to the negatives in
    proportion to H.

    Args:
        logits: any shape, M entries, all in one ranking.
        positives: (P,) int64, distinct indices into `logits.flatten()`.
        valid: bool of the logits' shape; entries that are False are neither ranked nor given a gradient.
        delta: half width of the step.
        method: "pairwise", "bucketed" or "exact", as for `rank_sort_loss`.
        interpolate: replace each precision by the highest at its own or a higher recall, as average precision is
            evaluated and as the official AP loss does; the official Bucketed AP does not.
        scope: "process", or "global" to rank the logits of all processes together: each gets the loss, and its own part
            of the gradient, that one process with everything would get. Every process must call. Travels per process:
            one number per positive, and one table of 4 numbers (exact; bucketed 2) per positive of all processes.

    Returns:
        scalar in [0, 1], float32 or wider; a zero attached to the graph without positives.

    Raises:
        ValueError: for an unknown method, a delta that is negative or not finite, arguments whose shapes or types do
            not fit, or positives that are out of range, double or ignored (on a GPU the device asserts).
    """
    flat, valid, group = prepare(logits, positives, valid, delta, method, scope)
    if group.positives == 0:
        return attached_zero(flat, group)
    with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
        if method == "pairwise":
            negative = negative_mask(flat, positives, valid)
            terms = average_precision_pairwise(
                flat.to(accumulation_dtype(flat.device)), positives, negative, delta, interpolate
            )
        else:
            ranking = rank(flat, positives, valid, delta, method, group)
            terms = _from_ranking(ranking, full_self=method != "bucketed", interpolate=interpolate)
    return attach(flat, *terms, group.sound)


def average_precision_pairwise(
    logits: Tensor, positives: Tensor, negative: Tensor, delta: float, interpolate: bool
) -> tuple[Tensor, Tensor]:
    """AP loss (Bucketed Ranking-based Losses, Eq. 3, 9); `interpolate` takes the best precision at higher recall."""
    positives = positives[logits[positives].argsort()]
    relevant = relevant_negatives(logits, positives, negative, delta)
    own, others = logits[positives], logits[relevant]
    errors, on_negatives = torch.zeros_like(own), torch.zeros_like(others)
    best = logits.new_zeros(())
    for i, (false_positives, above) in enumerate(pairwise_steps(own, others, delta)):
        number = false_positives.sum()
        counted = above.sum() - smooth_heaviside(logits.new_zeros(()), delta) + 1
        precision = counted / (counted + number)
        best = torch.maximum(best, precision) if interpolate else precision
        errors[i] = 1 - best
        on_negatives += errors[i] * false_positives / number.clamp(min=torch.finfo(own.dtype).tiny)
    return errors.mean(), join_gradient(logits, positives, -errors, relevant, on_negatives) / len(own)


def _from_ranking(ranking: Ranking, full_self: bool, interpolate: bool) -> tuple[Tensor, Tensor]:
    own = ranking.positives_above()
    if full_self:
        own = own + (1 - ranking.self_step)
    false_positives = ranking.negatives.num_fp()
    position = own + false_positives
    error = false_positives / position
    weight = 1 / position
    if interpolate:
        best = (own / position).cummax(0)[0]
        raised = best > own / position
        # Only a positive below the best has false positives for certain, so only there may they divide.
        weight = torch.where(raised, (1 - best) / false_positives.clamp(min=torch.finfo(weight.dtype).tiny), weight)
        error = 1 - best
    count = len(error)
    gradient = ranking.negatives.backprop(weight / count).index_copy_(0, ranking.index, ranking.own(-error / count))
    return error.mean(), gradient
