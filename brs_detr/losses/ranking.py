"""One ranking of all logits of a call: the arguments checked, the positives in order, the negatives ready to be
counted.

The smoothed step that turns a difference of logits into "ranked above".

Identity update: a loss value with a gradient that is given, not differentiated (Rank & Sort, Oksuz et al., ICCV
2021).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import accumulation_dtype, check_number, check_per_positive, check_positives, single_or_wider
from .distributed import Group
from .step_sums import BucketedNegatives, Cells, ExactNegatives, locate, make_cells, sums_above, tally

EPS = 1e-5


METHODS = ("pairwise", "bucketed", "exact")


@dataclass
class Ranking:
    """What every ranking loss is computed from; (P,) means the positives of all processes that rank together, in
    ascending order of their logits.

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
        """Values of this process's positives, in the caller's order, to (P,)."""
        return self.group.gather(values).index_select(0, self.order)

    def own(self, values: Tensor) -> Tensor:
        """Values (P,) of this process's positives only, in the caller's order."""
        return self.group.local_slice(torch.empty_like(values).index_copy_(0, self.order, values))

    @property
    def self_step(self) -> float:
        """H(0), what a positive adds to its own rank."""
        return 0.5 if self.cells.delta > 0 else 1.0

    def positives_above(self, weight: Tensor | None = None) -> Tensor:
        """sum_j weight_j H(s_j - s_i) over the positives j, i itself included with H(0), (P,)."""
        scores = self.cells.scores
        return sums_above(self.cells, tally(self.cells, locate(self.cells.points, scores), scores, weight))


def rank(logits: Tensor, positives: Tensor, valid: Tensor | None, delta: float, method: str, group: Group) -> Ranking:
    """Rank flat logits (M,) by a fast method; the group needs at least one positive."""
    x = logits.detach().to(accumulation_dtype(logits.device))
    scores, order = group.gather(x.index_select(0, positives)).sort(stable=True)
    # Centered, so that a constant added to all logits costs no precision.
    center = scores.mean()
    scores, x = scores - center, x - center
    cells = make_cells(scores, delta)
    kind = BucketedNegatives if method == "bucketed" else ExactNegatives
    return Ranking(positives, order, cells, kind(cells, x, positives, valid, group), group)


def prepare(
    logits: Tensor,
    positives: Tensor,
    valid: Tensor | None,
    delta: float,
    method: str,
    scope: str,
    **per_positive: Tensor,
):
    """Check what all losses have in common, and take ignored entries out.

    Args:
        per_positive: further values (P,), by name.

    Returns:
        logits (M,) in at least float32 with 0 for ignored entries, whatever was there; valid (M,) or None; and the
        group of processes that rank together.

    Raises:
        ValueError: naming the argument that is wrong.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    check_number("delta", delta)
    if valid is not None:
        if valid.shape != logits.shape or valid.dtype != torch.bool:
            raise ValueError(
                f"valid must be a bool mask of the logits' shape {tuple(logits.shape)}, "
                f"got {valid.dtype} of shape {tuple(valid.shape)}"
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
        raise ValueError("the pairwise method ranks one process's logits: use bucketed or exact with scope='global'")
    return flat, valid, group


def _undefined(flat: Tensor, positives: Tensor, per_positive: Iterable[Tensor]) -> Tensor:
    """() bool: is the loss undefined? A NaN logit has no rank, nor has an infinite positive (inf - inf) its own.

    Found here, once, as the sums would lose it: a NaN is neither above nor below anything. An infinite negative is no
    fault: it ranks first or last.
    """
    with torch.no_grad():
        found = flat.isnan().any()
        for values in (flat.index_select(0, positives), *per_positive):
            found = found | ~values.isfinite().all()
    return found


def negative_mask(logits: Tensor, positives: Tensor, valid: Tensor | None) -> Tensor:
    """(M,) bool: the entries that rank as negatives."""
    mask = torch.ones_like(logits, dtype=torch.bool) if valid is None else valid.clone()
    return mask.index_fill_(0, positives, False)


def attached_zero(logits: Tensor, group: Group) -> Tensor:
    """The loss without positives: a zero on the graph of the logits that no infinity among them spoils; a NaN does."""
    return logits[:0].sum() * group.sound.to(logits.dtype)


def smooth_heaviside(x: Tensor, delta: float) -> Tensor:
    """H(x): 0 below -delta, 1 above delta, linear between (Bucketed Ranking-based Losses, Eq. 2).

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
    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        first: Tensor,
        second: Tensor,
        dense: Tensor,
        index: Tensor,
        sparse: Tensor,
        sound: Tensor,
    ):
        ctx.save_for_backward(dense, index, sparse, sound)
        return first * sound, second * sound

    @staticmethod
    def backward(ctx, first: Tensor, second: Tensor):
        dense, index, sparse, sound = ctx.saved_tensors
        gradient = dense * (first * sound)
        gradient.index_add_(0, index, sparse * (second * sound))
        return gradient, None, None, None, None, None, None


def attach_two(
    logits: Tensor, first: Tensor, second: Tensor, dense: Tensor, index: Tensor, sparse: Tensor, sound: Tensor
) -> tuple[Tensor, Tensor]:
    """Two loss values with a gradient each: scaling or dropping one of them scales or drops its own gradient only.

    Args:
        logits: (M,) what the gradients belong to.
        first, second: scalars.
        dense: (M,) gradient of `first`.
        index: (P,) distinct entries that `second` depends on.
        sparse: (P,) gradient of `second` at those entries.
        sound: () 1, or NaN to make both values and all gradients NaN.

    Returns:
        (first, second) in the logits' dtype, attached to their graph.
    """
    first, second, dense, sparse, sound = (x.to(logits.dtype) for x in (first, second, dense, sparse, sound))
    return IdentityUpdate.apply(logits, first, second, dense, index, sparse, sound)


def attach(logits: Tensor, value: Tensor, gradient: Tensor, sound: Tensor) -> Tensor:
    """One loss value with its gradient (M,); `sound` as for `attach_two`."""
    none = torch.empty(0, dtype=torch.int64, device=logits.device)
    return attach_two(logits, value, torch.zeros_like(value), gradient, none, gradient[:0], sound)[0]


def relevant_negatives(logits: Tensor, positives: Tensor, negative: Tensor, delta: float) -> Tensor:
    """(R,) negatives that rank above some positive, wholly or in part."""
    return (negative & (logits >= logits[positives].min() - delta)).nonzero()[:, 0]


# The pairwise definitions of the losses are written straight from their equations, one positive at a time, in
# O(P M). Their common arguments: logits (M,) float64; positives (P,) int64 entries, P >= 1; negative (M,) bool, the
# entries that rank as negatives; delta, half width of the step. They return values first, then a gradient (M,) each.
def pairwise_steps(own: Tensor, others: Tensor, delta: float) -> Iterator[tuple[Tensor, Tensor]]:
    """H(x_ij) of each positive i: over the relevant negatives j (R,), and over the positives (P,)."""
    for logit in own:
        yield smooth_heaviside(others - logit, delta), smooth_heaviside(own - logit, delta)


def join_gradient(
    logits: Tensor, positives: Tensor, of_positives: Tensor, relevant: Tensor, of_relevant: Tensor
) -> Tensor:
    """Gradient (M,) from its parts; the other entries have none."""
    gradient = torch.zeros_like(logits)
    return gradient.index_copy_(0, relevant, of_relevant).index_copy_(0, positives, of_positives)
