"""The negatives as the positives see them: how many rank above each positive, and the way back.

Both classes offer the same two maps for positives given in ascending order:
`counts()`   N_FP(i) = sum_j H(s_j - s_i) over the negatives, (P,);
`spread(w)`  g_j = sum_i w_i H(s_j - s_i) for every logit, (M,), exactly 0 for positives and ignored entries.
"""

import torch
from torch import Tensor

from .cells import Cells, evaluate, lines, sums_above, tally
from .lookup import locate
from .processes import Group


class ExactNegatives:
    """Every negative at its own logit.

    Args:
        cells: partition by the positives.
        logits: (M,) float64, all entries, in the units of `cells.scores`.
        positives: (P,) int64 entries that are positives.
        valid: (M,) bool or None; False entries are ignored.
        group: the processes that rank together; one table of (2, K + 1) numbers is summed over them.
    """

    def __init__(self, cells: Cells, logits: Tensor, positives: Tensor, valid: Tensor | None, group: Group):
        self.cells = cells
        self.group = group
        self.where = locate(cells.points, logits).index_fill_(0, positives, 0)
        if valid is not None:
            self.where *= valid
        # Outside the ramps a logit's value is of no account; clamping keeps infinities out of the sums.
        self.x = logits.clamp(cells.points[0], cells.points[-1])

    def counts(self) -> Tensor:
        return sums_above(self.cells, self.group.total(tally(self.cells, self.where, self.x)))

    def spread(self, weight: Tensor) -> Tensor:
        return evaluate(lines(self.cells, weight), self.where, self.x)


class BucketedNegatives:
    """Negatives between two neighbouring positives share one bucket and one prototype logit, their mean.

    Bucketed Ranking-based Losses (Yavuz et al., ECCV 2024), Sec. 4. Bucket k of a negative is the number of positives
    at or below it, so no negative needs sorting; negatives that no ramp reaches (s < min positive - delta) are dropped
    first. The prototypes then go through the same cells as exact negatives do.

    Args: as for `ExactNegatives`; the table summed over processes holds the P + 1 buckets.
    """

    def __init__(self, cells: Cells, logits: Tensor, positives: Tensor, valid: Tensor | None, group: Group):
        self.cells = cells
        edges = torch.cat([cells.points[:1], cells.scores]) if cells.delta > 0 else cells.scores
        self.bucket = locate(edges, logits).index_fill_(0, positives, 0)
        if valid is not None:
            self.bucket *= valid
        table = logits.new_zeros(2, len(edges) + 1)
        # An infinite logit may not make its bucket's mean undefined.
        x = logits.clamp(max=torch.finfo(torch.float32).max).clamp_(min=edges[0])
        table[0].index_add_(0, self.bucket, torch.ones_like(x))
        table[1].index_add_(0, self.bucket, x)
        table = group.total(table)
        self.size = table[0, 1:]
        # A mean may round past an edge of its bucket, and would then lie on the wrong side of a positive.
        upper = torch.cat([edges[1:], cells.points[-1:]])
        self.prototype = (table[1, 1:] / self.size.clamp(min=1)).clamp(edges, upper)
        if cells.delta > 0:
            self.where = locate(cells.points, self.prototype)
        else:
            self.where = torch.arange(1, len(edges) + 1, device=logits.device, dtype=torch.int32)

    def counts(self) -> Tensor:
        return sums_above(self.cells, tally(self.cells, self.where, self.prototype, self.size))

    def spread(self, weight: Tensor) -> Tensor:
        per_bucket = evaluate(lines(self.cells, weight), self.where, self.prototype)
        return torch.cat([per_bucket.new_zeros(1), per_bucket]).index_select(0, self.bucket)
