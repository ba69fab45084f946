"""One ranking of all logits of a call: the arguments checked, the positives in order, the negatives ready to be
counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cells import Cells, make_cells, sums_above, tally
from .checks import check_number, check_per_positive, check_positives
from .lookup import locate
from .negatives import BucketedNegatives, ExactNegatives
from .precision import accumulation_dtype, single_or_wider
from .processes import Group

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
        return self.group.mine(torch.empty_like(values).index_copy_(0, self.order, values))

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
    # Centred, so that a constant added to all logits costs no precision.
    centre = scores.mean()
    scores, x = scores - centre, x - centre
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
