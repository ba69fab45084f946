"""What all ranking losses share: argument checks, the sorted positives, the smoothed step, the identity update.

The identity update (Rank & Sort, Oksuz et al., ICCV 2021) attaches a given gradient to a loss value, for a ranking is
piecewise constant and has no useful derivative.

A call computes L rankings of M logits and P positives each, with a leading dimension L on every tensor; one ranking is
the case L = 1, to which `prepare` adds that dimension and from whose results `Problem.shaped` takes it again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import locate
from .checks import (
    accumulation_dtype,
    check_indices,
    check_number,
    check_per_positive,
    check_positives,
    single_or_wider,
)
from .distributed import Group
from .step_sums import BucketedNegatives, Cells, ExactNegatives, make_cells, offset_rows, sums_above, tally

EPS = 1e-5  # a smaller N_FP counts as no negative above; the eps of the official aLRP loss
METHODS = ("pairwise", "bucketed", "exact")


class Problem(NamedTuple):
    """The checked arguments that all losses have in common, of L rankings.

    Attributes:
        logits: (L, M) in float32 or wider, on the graph; 0 where ignored, so that a NaN there has no effect.
        positives: (L, P) int64 entries of each ranking.
        entries: (L * P,) the same as entries of `logits.flatten()`.
        valid: (L, M) bool or None.
        group: the processes that rank together.
        single: whether the caller gave one ranking without the leading dimension.
    """

    logits: Tensor
    positives: Tensor
    entries: Tensor
    valid: Tensor | None
    group: Group
    single: bool

    def shaped(self, values: Tensor) -> Tensor:
        """Return values (L,) as the caller expects them: a scalar for a single ranking."""
        return values.squeeze(0) if self.single else values

    def per_positive(self, values: Tensor) -> Tensor:
        """Return the caller's values, one per positive, as (L, P)."""
        return values[None] if self.single else values

    def zeros(self) -> Tensor:
        """Return the losses without positives: zeros on the graph of the logits, NaN where the loss is undefined."""
        # Sums over no entry: 0 * logits.sum() would turn an infinite logit into NaN.
        return self.logits[:, :0].sum(1) * self.group.nan_or_one.to(self.logits.dtype)

    def negative(self) -> Tensor:
        """Return (L, M) bool, True for the entries that rank as negatives."""
        mask = torch.ones_like(self.logits, dtype=torch.bool) if self.valid is None else self.valid.clone()
        return mask.scatter_(1, self.positives, False)

    def pairwise(self, definition: Callable[..., tuple[Tensor, ...]], *per_positive: Tensor) -> tuple[Tensor, ...]:
        """Apply a pairwise definition to each ranking; each of its results is returned with the leading dimension.

        Args:
            definition: called with logits (M,), positives (P,), negative (M,) and each of `per_positive` (P,).
            per_positive: (L, P) each.
        """
        logits = self.logits.detach().to(accumulation_dtype(self.logits.device))
        rankings = zip(logits, self.positives, self.negative(), *per_positive)
        return tuple(torch.stack(results) for results in zip(*(definition(*ranking) for ranking in rankings)))


def prepare(
    logits: Tensor,
    positives: Tensor,
    valid: Tensor | None,
    delta: float,
    method: str,
    scope: str,
    **per_positive: Tensor,
) -> Problem:
    """Check the arguments that all losses have in common, flatten the logits, and blank ignored entries.

    Args:
        per_positive: further arguments of the shape of `positives`, by name.

    Raises:
        ValueError: naming the invalid argument.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    check_number("delta", delta)
    if valid is not None and (valid.shape != logits.shape or valid.dtype != torch.bool):
        raise ValueError(
            f"valid: {valid.dtype} of shape {tuple(valid.shape)} does not match logits of shape "
            f"{tuple(logits.shape)}. Give torch.bool of the logits' shape."
        )
    check_indices(positives, logits)
    for name, values in per_positive.items():
        check_per_positive(name, values, positives)
    single = positives.ndim == 1
    positives = positives[None] if single else positives
    flat = _rankings(single_or_wider(logits), single)
    if valid is not None:
        valid = _rankings(valid, single)
        flat = flat.masked_fill(~valid, 0)
    check_positives(positives, flat.shape[1], valid)
    entries = offset_rows(positives, flat.shape[1])
    # Gathered by ranking and not by entry: a GPU asserts here that no index lies past its own ranking.
    own = flat.detach().gather(1, positives)
    group = Group(scope, positives.shape[1], _undefined(flat.detach(), own, *per_positive.values()))
    if method == "pairwise" and len(group.counts) > 1:
        raise ValueError(
            "method: pairwise ranks the logits of one process only. Use bucketed or exact with scope='global'."
        )
    return Problem(flat, positives, entries, valid, group, single)


def _rankings(values: Tensor, single: bool) -> Tensor:
    """Flatten values to (L, M); L = 1 for a single ranking."""
    return values.reshape(1, -1) if single else values.flatten(1)


def _undefined(flat: Tensor, own: Tensor, *per_positive: Tensor) -> Tensor:
    """Return (L,) bool: where the loss is undefined, as a NaN logit has no rank, nor an infinite positive (inf - inf).

    Checked once, here, because sums of steps hide it: a NaN compares as neither above nor below. An infinite negative
    is allowed: it ranks first or last.

    Args:
        flat: (L, M) logits.
        own: (L, P) those of the positives.
        per_positive: further values that have to be finite, (L, P) or for a single ranking (P,).
    """
    with torch.no_grad():
        # x - x is 0 for a finite x, and NaN for any other
        differences = own - own
        for values in per_positive:
            differences = differences + (values - values).view_as(own)
        return flat.isnan().any(1) | differences.isnan().any(1)


@dataclass
class Ranking:
    """The sorted positives and the negatives of L rankings.

    (L, P) means the positives of all processes that rank together, in ascending order of their logits.

    Attributes:
        problem: the arguments, of this process.
        order: (L, P) int64, ascending order of all positives of each ranking.
        cells: partition of the line by the positives.
        where: (L * P,) the cell of each positive.
        negatives: the other valid entries.
    """

    problem: Problem
    order: Tensor
    cells: Cells
    where: Tensor
    negatives: BucketedNegatives | ExactNegatives

    @property
    def count(self) -> int:
        """Return the number of positives of each ranking, over all processes."""
        return self.order.shape[1]

    def sort(self, values: Tensor) -> Tensor:
        """Gather and sort values of this process's positives, in the caller's order, to (L, P)."""
        return self.problem.group.gather(values).gather(1, self.order)

    def own(self, values: Tensor) -> Tensor:
        """Select this process's positives from (L, P) values, in the caller's order."""
        return self.problem.group.local_slice(torch.empty_like(values).scatter_(1, self.order, values))

    def join_gradient(self, of_negatives: Tensor, of_positives: Tensor) -> Tensor:
        """Write gradients of all processes' positives (L, P), in ascending order, into those of the logits (L, M)."""
        of_negatives.view(-1).index_copy_(0, self.problem.entries, self.own(of_positives).flatten())
        return of_negatives

    @property
    def self_step(self) -> float:
        """Return H(0), the contribution of a positive to its own rank."""
        return 0.5 if self.cells.delta > 0 else 1.0

    def positives_above(self, *weights: Tensor | None) -> Tensor:
        """Compute sum_j weight_j H(s_j - s_i) over the positives j, i itself included with H(0).

        Args:
            weights: V times (L, P), or None for ones.

        Returns:
            (V, L, P).
        """
        return sums_above(self.cells, tally(self.cells, self.where, self.cells.scores, *weights))


def rank(problem: Problem, delta: float, method: str) -> Ranking:
    """Rank by a fast method; the group must have at least one positive."""
    x = problem.logits.detach().to(accumulation_dtype(problem.logits.device))
    scores, order = problem.group.gather(x.gather(1, problem.positives)).sort(dim=1, stable=True)
    # Centered, so that adding a constant to all logits costs no precision.
    center = scores.mean(1, keepdim=True)
    scores, x = scores - center, x - center
    cells = make_cells(scores, delta)
    where = offset_rows(locate(cells.points, scores), cells.num_cells)
    negatives = BucketedNegatives if method == "bucketed" else ExactNegatives
    return Ranking(problem, order, cells, where, negatives(cells, x, problem.entries, problem.valid, problem.group))


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
        gradient = dense * (first * nan_or_one)[:, None]
        gradient.view(-1).index_add_(0, index, (sparse * (second * nan_or_one)[:, None]).flatten())
        return gradient, None, None, None, None, None, None


def attach_two(
    logits: Tensor, first: Tensor, second: Tensor, dense: Tensor, index: Tensor, sparse: Tensor, nan_or_one: Tensor
) -> tuple[Tensor, Tensor]:
    """Attach a gradient to each of two loss values; scaling or dropping one value scales or drops its gradient only.

    Args:
        logits: (L, M), which the gradients are of.
        first, second: (L,).
        dense: (L, M) gradient of `first`.
        index: (L * P,) distinct entries of the flat logits that `second` depends on.
        sparse: (L, P) gradient of `second` at those entries.
        nan_or_one: (L,) 1, or NaN to make both values and all gradients of a ranking NaN.

    Returns:
        (first, second) in the logits' dtype, attached to their graph.
    """
    first, second, dense, sparse, nan_or_one = (x.to(logits.dtype) for x in (first, second, dense, sparse, nan_or_one))
    values: tuple[Tensor, Tensor] = IdentityUpdate.apply(logits, first, second, dense, index, sparse, nan_or_one)
    return values


def attach(logits: Tensor, value: Tensor, gradient: Tensor, nan_or_one: Tensor) -> Tensor:
    """Attach a gradient (L, M) to one loss value (L,); `nan_or_one` as for `attach_two`."""
    no_index = torch.empty(0, dtype=torch.int64, device=logits.device)
    return attach_two(logits, value, torch.zeros_like(value), gradient, no_index, gradient[:, :0], nan_or_one)[0]


def relevant_negatives(logits: Tensor, positives: Tensor, negative: Tensor, delta: float) -> Tensor:
    """Return the entries (R,) of the negatives that rank above some positive, fully or on the ramp."""
    return (negative & (logits >= logits[positives].min() - delta)).nonzero()[:, 0]


# The pairwise definitions of the losses are written straight from their equations, one ranking and one positive at a
# time, in O(P M). Their common arguments: logits (M,) float64; positives (P,) int64 entries, P >= 1; negative (M,)
# bool, the entries that rank as negatives; delta, half width of the step. They return values first, then a gradient
# (M,) each.
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
