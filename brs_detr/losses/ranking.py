"""What all ranking losses share: argument checks, the sorted positives, the smoothed step, the identity update.

The identity update (Rank & Sort, Oksuz et al., ICCV 2021) attaches a given gradient to a loss value, for a ranking is
piecewise constant and has no useful derivative.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import accumulation_dtype, check_number, check_per_positive, check_positives, single_or_wider
from .distributed import Group
from .step_sums import BucketedNegatives, Cells, ExactNegatives, locate, make_cells, sums_above, tally

EPS = 1e-5  # a smaller N_FP counts as no negative above; the eps of the official aLRP loss
METHODS = ("pairwise", "bucketed", "exact")


@dataclass
class Ranking:
    """The sorted positives and the negatives of one loss call.

    (P,) means the positives of all processes that rank together, in ascending order of their logits.

    Attributes:
        index: entries of this process's positives in its flat logits, in the caller's order.
        order: (P,) int64, ascending order of all positives.
        cells: partition of the line by the positives.
        negatives: the other valid entries.
        group: the processes that rank together.
    """

    index: Tensor
    order: Tensor
    cells: Cells
    negatives: BucketedNegatives | ExactNegatives
    group: Group

    def sort(self, values: Tensor) -> Tensor:
        """Gather and sort values of this process's positives, in the caller's order, to (P,)."""
        return self.group.gather(values).index_select(0, self.order)

    def own(self, values: Tensor) -> Tensor:
        """Select this process's positives from (P,) values, in the caller's order."""
        return self.group.local_slice(torch.empty_like(values).index_copy_(0, self.order, values))

    @property
    def self_step(self) -> float:
        """Return H(0), the contribution of a positive to its own rank."""
        return 0.5 if self.cells.delta > 0 else 1.0

    def positives_above(self, weight: Tensor | None = None) -> Tensor:
        """Compute sum_j weight_j H(s_j - s_i) over the positives j, i itself included with H(0), (P,)."""
        scores = self.cells.scores
        return sums_above(self.cells, tally(self.cells, locate(self.cells.points, scores), scores, weight))


def rank(logits: Tensor, positives: Tensor, valid: Tensor | None, delta: float, method: str, group: Group) -> Ranking:
    """Rank flat logits (M,) by a fast method; the group must have at least one positive."""
    x = logits.detach().to(accumulation_dtype(logits.device))
    scores, order = group.gather(x.index_select(0, positives)).sort(stable=True)
    # Centered, so that adding a constant to all logits costs no precision.
    center = scores.mean()
    scores, x = scores - center, x - center
    cells = make_cells(scores, delta)
    negatives = BucketedNegatives if method == "bucketed" else ExactNegatives
    return Ranking(positives, order, cells, negatives(cells, x, positives, valid, group), group)


def prepare(
    logits: Tensor,
    positives: Tensor,
    valid: Tensor | None,
    delta: float,
    method: str,
    scope: str,
    **per_positive: Tensor,
) -> tuple[Tensor, Tensor | None, Group]:
    """Check the arguments that all losses have in common, flatten the logits, and blank ignored entries.

    Args:
        per_positive: further arguments of shape (P,), by name.

    Returns:
        logits (M,) in float32 or wider, 0 where ignored (a NaN there has no effect); valid (M,) or None; and the group
        of processes that rank together.

    Raises:
        ValueError: naming the invalid argument.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    check_number("delta", delta)
    if valid is not None:
        if valid.shape != logits.shape or valid.dtype != torch.bool:
            raise ValueError(
                f"valid: {valid.dtype} of shape {tuple(valid.shape)} does not match logits of shape "
                f"{tuple(logits.shape)}. Give torch.bool of the logits' shape."
            )
        valid = valid.reshape(-1)
    check_positives(positives, logits.numel(), valid)
    for name, values in per_positive.items():
        check_per_positive(name, values, positives)
    flat = single_or_wider(logits).reshape(-1)
    if valid is not None:
        flat = flat.masked_fill(~valid, 0)
    group = Group(scope, len(positives), _undefined(flat.detach(), positives, per_positive.values()))
    if method == "pairwise" and len(group.counts) > 1:
        raise ValueError(
            "method: pairwise ranks the logits of one process only. Use bucketed or exact with scope='global'."
        )
    return flat, valid, group


def _undefined(flat: Tensor, positives: Tensor, per_positive: Iterable[Tensor]) -> Tensor:
    """Return () bool, True if the loss is undefined: a NaN logit has no rank, nor has an infinite positive (inf - inf).

    Checked once, here, because sums of steps hide it: a NaN compares as neither above nor below. An infinite negative
    is allowed: it ranks first or last.
    """
    with torch.no_grad():
        undefined = flat.isnan().any()
        for values in (flat.index_select(0, positives), *per_positive):
            undefined = undefined | ~values.isfinite().all()
    return undefined


def negative_mask(logits: Tensor, positives: Tensor, valid: Tensor | None) -> Tensor:
    """Return (M,) bool, True for the entries that rank as negatives."""
    mask = torch.ones_like(logits, dtype=torch.bool) if valid is None else valid.clone()
    return mask.index_fill_(0, positives, False)


def attached_zero(logits: Tensor, group: Group) -> Tensor:
    """Return the loss without positives: a zero on the graph of the logits; NaN if the loss is undefined."""
    # A sum over no entry: 0 * logits.sum() would turn an infinite logit into NaN.
    return logits[:0].sum() * group.nan_or_one.to(logits.dtype)


def smooth_heaviside(x: Tensor, delta: float) -> Tensor:
    """Compute H(x): 0 below -delta, 1 above delta, linear between (Bucketed Ranking-based Losses, Eq. 2).

    Args:
        x: differences s_j - s_i of logits, any shape.
        delta: half width; at 0 the step is x >= 0, so a tie counts as ranked above.

    Returns:
        Tensor of x's shape and dtype.
    """
    if delta == 0:
        return (x >= 0).to(x.dtype)
    return (x / (2 * delta) + 0.5).clamp(0, 1)


class IdentityUpdate(torch.autograd.Function):
    """The autograd function behind `attach_two`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        first: Tensor,
        second: Tensor,
        dense: Tensor,
        index: Tensor,
        sparse: Tensor,
        nan_or_one: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the two values; their gradients are kept for the backward pass."""
        ctx.save_for_backward(dense, index, sparse, nan_or_one)
        return first * nan_or_one, second * nan_or_one

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        """Scale each given gradient by the gradient that arrives at its value, and add them."""
        dense, index, sparse, nan_or_one = ctx.saved_tensors
        gradient = dense * (first * nan_or_one)
        gradient.index_add_(0, index, sparse * (second * nan_or_one))
        return gradient, None, None, None, None, None, None


def attach_two(
    logits: Tensor, first: Tensor, second: Tensor, dense: Tensor, index: Tensor, sparse: Tensor, nan_or_one: Tensor
) -> tuple[Tensor, Tensor]:
    """Attach a gradient to each of two loss values; scaling or dropping one value scales or drops its gradient only.

    Args:
        logits: (M,), which the gradients are of.
        first, second: scalars.
        dense: (M,) gradient of `first`.
        index: (P,) distinct entries that `second` depends on.
        sparse: (P,) gradient of `second` at those entries.
        nan_or_one: () 1, or NaN to make both values and all gradients NaN.

    Returns:
        (first, second) in the logits' dtype, attached to their graph.
    """
    first, second, dense, sparse, nan_or_one = (x.to(logits.dtype) for x in (first, second, dense, sparse, nan_or_one))
    values: tuple[Tensor, Tensor] = IdentityUpdate.apply(logits, first, second, dense, index, sparse, nan_or_one)
    return values


def attach(logits: Tensor, value: Tensor, gradient: Tensor, nan_or_one: Tensor) -> Tensor:
    """Attach a gradient (M,) to one loss value; `nan_or_one` as for `attach_two`."""
    no_index = torch.empty(0, dtype=torch.int64, device=logits.device)
    return attach_two(logits, value, torch.zeros_like(value), gradient, no_index, gradient[:0], nan_or_one)[0]


def relevant_negatives(logits: Tensor, positives: Tensor, negative: Tensor, delta: float) -> Tensor:
    """Return the entries (R,) of the negatives that rank above some positive, fully or on the ramp."""
    return (negative & (logits >= logits[positives].min() - delta)).nonzero()[:, 0]


# The pairwise definitions of the losses are written straight from their equations, one positive at a time, in
# O(P M). Their common arguments: logits (M,) float64; positives (P,) int64 entries, P >= 1; negative (M,) bool, the
# entries that rank as negatives; delta, half width of the step. They return values first, then a gradient (M,) each.
def pairwise_steps(own: Tensor, others: Tensor, delta: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield H(x_ij) of each positive i: over the relevant negatives j (R,), and over the positives (P,)."""
    for logit in own:
        yield smooth_heaviside(others - logit, delta), smooth_heaviside(own - logit, delta)


def join_gradient(
    logits: Tensor, positives: Tensor, of_positives: Tensor, relevant: Tensor, of_relevant: Tensor
) -> Tensor:
    """Assemble a gradient (M,) from its parts; 0 for all other entries."""
    gradient = torch.zeros_like(logits)
    return gradient.index_copy_(0, relevant, of_relevant).index_copy_(0, positives, of_positives)
