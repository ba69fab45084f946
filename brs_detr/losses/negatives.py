"""The negatives as the positives see them: how many rank above each positive, and the way back.

Both classes offer the same two maps for positives given in ascending order:
`counts()`   N_FP(i) = sum_j H(s_j - s_i) over the negatives, (P,);
`spread(w)`  g_j = sum_i w_i H(s_j - s_i) for every logit, (M,), exactly 0 for positives and ignored entries.
"""

import torch
from torch import Tensor

from .cells import Cells, evaluate, lines, locate, sums_above, tally


class ExactNegatives:
    """Every negative at its own logit.

    Args:
        cells: partition by the positives.
        logits: (M,) float64, all entries, in the units of `cells.scores`.
        positives: (P,) int64 entries that are positives.
        valid: (M,) bool or None; False entries are ignored.
    """

    def __init__(self, cells: Cells, logits: Tensor, positives: Tensor, valid: Tensor | None = None):
        self.cells = cells
        self.where = locate(cells, logits)
        self.where[positives] = 0
        if valid is not None:
            self.where *= valid
        # Outside the ramps a logit's value is of no account; clamping keeps infinities out of the sums.
        self.x = logits.clamp(cells.points[0], cells.points[-1])

    def counts(self) -> Tensor:
        return sums_above(self.cells, tally(self.cells, self.where, self.x))

    def spread(self, weight: Tensor) -> Tensor:
        return evaluate(lines(self.cells, weight), self.where, self.x)


class BucketedNegatives:
    """Negatives between two neighbouring positives share one bucket and one prototype logit, their mean.

    Bucketed Ranking-based Losses (Yavuz et al., ECCV 2024), Sec. 4. Bucket k of a negative is the number of positives
    at or below it, so no negative needs sorting; negatives that no ramp reaches (s < min positive - delta) are dropped
    first.

    Args: as for `ExactNegatives`.
    """

    def __init__(self, cells: Cells, logits: Tensor, positives: Tensor, valid: Tensor | None = None):
        self.cells = cells
        edges = torch.cat([cells.scores[:1] - cells.delta, cells.scores])
        self.bucket = torch.searchsorted(edges, logits, right=True)
        self.bucket[positives] = 0
        if valid is not None:
            self.bucket *= valid
        # An infinite logit may not make its bucket's mean undefined.
        span = torch.finfo(torch.float32).max
        x = logits.clamp(edges[0], span)
        table = logits.new_zeros(2, len(edges) + 1)
        table[0].index_add_(0, self.bucket, torch.ones_like(x))
        table[1].index_add_(0, self.bucket, x)
        self.size = table[0]
        self.size[0] = 0
        # A mean may round past the edge of its bucket, and would then be ranked on the wrong side of a positive.
        mean = table[1, 1:] / self.size[1:].clamp(min=1)
        mean = torch.minimum(torch.maximum(mean, edges), torch.cat([edges[1:], cells.points[-1:]]))
        self.prototype = torch.cat([edges[:1], mean])
        # At delta 0 the cell of a prototype is known from its bucket, whatever its rounded mean.
        self.where = (
            torch.arange(len(edges) + 1, device=logits.device).sub_(1).clamp_(min=0)
            if cells.delta == 0
            else locate(cells, self.prototype)
        )

    def counts(self) -> Tensor:
        return sums_above(self.cells, tally(self.cells, self.where, self.prototype, self.size))

    def spread(self, weight: Tensor) -> Tensor:
        per_bucket = evaluate(lines(self.cells, weight), self.where, self.prototype)
        per_bucket[0] = 0
        return per_bucket[self.bucket]
