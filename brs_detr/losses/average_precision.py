"""AP loss (Chen et al., CVPR 2019) and its bucketed form (Yavuz et al., ECCV 2024)."""

from functools import partial

import torch
from torch import Tensor

from .ranking import (
    Ranking,
    attach,
    join_gradient,
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
    """Compute one minus the average precision of the ranking.

    With rank = rank+ + N_FP as in `rank_sort_loss` (Bucketed Ranking-based Losses, Eq. 3, 9 and 13):

        loss = mean_i 1 - p(i),  p(i) = rank+(i) / rank(i)

    A positive counts fully in its own rank+, as in the AP loss paper, except with "bucketed", where it counts H(0)
    (1/2 for delta > 0), as in the Bucketed AP paper. The gradient distributes each positive's error over the
    negatives in proportion to H.

    Args:
        logits: any shape, M entries, all in one ranking; or (L, ...) for L rankings of M entries each.
        positives: (P,) int64, distinct indices into `logits.flatten()`; of L rankings (L, P), into `logits.flatten(1)`.
        valid: bool of the logits' shape; entries that are False are neither ranked nor given a gradient.
        delta: half width of the step.
        method: "pairwise", "bucketed" or "exact", as for `rank_sort_loss`.
        interpolate: replace each precision by the highest at its own or a higher recall, as average precision is
            evaluated and as the official AP loss does; the official Bucketed AP does not.
        scope: "process", or "global" to rank the logits of all processes together: each gets the loss, and its own part
            of the gradient, that a single process with all logits would get. Every process must call it. Sent per
            process: one number per positive, and one table of 4 numbers (exact; bucketed 2) per positive of all
            processes.

    Returns:
        scalar in [0, 1], float32 or wider; a zero attached to the graph without positives. For L rankings (L,), what
        L calls return; NaN in one of them makes that value NaN and no other.

    Raises:
        ValueError: for an unknown method, a delta that is negative or not finite, arguments whose shapes or types do
            not match, or positives that are out of range, duplicated or ignored (on a GPU: a device-side assertion).
    """
    problem = prepare(logits, positives, valid, delta, method, scope)
    if problem.group.positives == 0:
        return problem.shaped(problem.zeros())
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        if method == "pairwise":
            definition = partial(average_precision_pairwise, delta=delta, interpolate=interpolate)
            value, gradient = problem.pairwise(definition)
        else:
            ranking = rank(problem, delta, method)
            value, gradient = _from_ranking(ranking, full_self=method != "bucketed", interpolate=interpolate)
    return problem.shaped(attach(problem.logits, value, gradient, problem.group.nan_or_one))


def average_precision_pairwise(
    logits: Tensor, positives: Tensor, negative: Tensor, delta: float, interpolate: bool
) -> tuple[Tensor, Tensor]:
    """Compute AP loss (Bucketed Ranking-based Losses, Eq. 3, 9) pair by pair.

    Returns:
        value, gradient (M,).
    """
    # Ascending logits are descending recall, so the running maximum is the best precision at this recall or higher.
    positives = positives[logits[positives].argsort()]
    relevant = relevant_negatives(logits, positives, negative, delta)
    own, others = logits[positives], logits[relevant]
    errors, on_negatives = torch.zeros_like(own), torch.zeros_like(others)
    best = logits.new_zeros(())
    for i, (false_positives, above) in enumerate(pairwise_steps(own, others, delta)):
        num_fp = false_positives.sum()
        # The positive itself counts 1, not H(0).
        num_tp = above.sum() - smooth_heaviside(logits.new_zeros(()), delta) + 1
        precision = num_tp / (num_tp + num_fp)
        best = torch.maximum(best, precision) if interpolate else precision
        errors[i] = 1 - best
        on_negatives += errors[i] * false_positives / num_fp.clamp(min=torch.finfo(own.dtype).tiny)
    return errors.mean(), join_gradient(logits, positives, -errors, relevant, on_negatives) / len(own)


def _from_ranking(ranking: Ranking, full_self: bool, interpolate: bool) -> tuple[Tensor, Tensor]:
    """Return values (L,) and gradient (L, M); with `full_self` a positive counts 1 in its own rank, else H(0)."""
    num_tp = ranking.positives_above(None)[0]
    if full_self:
        num_tp = num_tp + (1 - ranking.self_step)
    num_fp = ranking.negatives.num_fp()
    position = num_tp + num_fp
    error = num_fp / position
    # error / N_FP = 1 / rank: nothing is divided by N_FP, which may be 0.
    weight = 1 / position
    if interpolate:
        best = (num_tp / position).cummax(1)[0]
        raised = best > num_tp / position
        # A precision is raised only where it is below 1, where N_FP > 0: only there is it a safe divisor.
        weight = torch.where(raised, (1 - best) / num_fp.clamp(min=torch.finfo(weight.dtype).tiny), weight)
        error = 1 - best
    count = ranking.count
    gradient = ranking.join_gradient(ranking.negatives.backprop(weight / count), -error / count)
    return error.mean(1), gradient
