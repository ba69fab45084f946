"""Probabilistic anchor assignment.

Source: Kim and Lee, "Probabilistic Anchor Assignment with IoU Prediction for Object Detection", ECCV 2020, Algorithm 1.

The anchors that overlap an object are candidates. What the network pays for each of them at present, its cost, is
modeled by a mixture of two Gaussians per object; the candidates of the cheaper one, up to the likeliest, are positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from brs_detr.assign.max_iou import BACKGROUND, max_iou_assign

# The published code fits with scikit-learn's GaussianMixture; these are its settings there.
MAX_STEPS = 100
TOLERANCE = 1e-3  # of the mean log-likelihood: a fit stops after the step that changes it by less
MIN_VARIANCE = 1e-5  # added to each variance
STEPS_PER_CHECK = 10  # the host asks this rarely whether all fits have stopped, since each time it waits for the device


@dataclass(frozen=True)
class PAAAssigner:
    """Candidates by IoU, and, given their costs, the positives among them.

    Attributes:
        min_iou: anchors that overlap an object at least this much are candidates, and each object's best ones.
        topk: cheapest candidates of each level that an object's mixture is fitted to.
    """

    min_iou: float = 0.1
    topk: int = 9
    may_ignore: ClassVar[bool] = False

    def __call__(self, anchors: Tensor, level_counts: Sequence[int], objects: Tensor) -> Tensor:
        """(N, 4) anchors and (M, 4) objects -> (N,) object that each anchor is a candidate of, or BACKGROUND."""
        return max_iou_assign(anchors, objects, positive=self.min_iou, negative=self.min_iou, low_quality=0.0)

    def select(
        self,
        candidates: Tensor,
        costs: Tensor,
        level_counts: Sequence[Sequence[int]],
        num_objects: Sequence[int],
    ) -> Tensor:
        """Keep the positives of the candidates of a batch, one image after the other.

        Args:
            candidates: (N,) int64 index into the objects of the batch, or BACKGROUND.
            costs: (N,) cost of each candidate; that of other anchors is not read.
            level_counts: per image the anchors of each level.
            num_objects: of each image.

        Returns:
            (N,) int64: object index or BACKGROUND.
        """
        if sum(num_objects) == 0:
            return candidates
        tables, start, first = [], 0, 0
        for counts, objects in zip(level_counts, num_objects, strict=True):
            tables.append(_cheapest(candidates, costs, counts, range(first, first + objects), start, self.topk))
            start, first = start + sum(counts), first + objects
        width = max(values.shape[1] for values, _ in tables)
        values = torch.cat([pad(values, (0, width - values.shape[1]), value=torch.inf) for values, _ in tables])
        rows = torch.cat([pad(rows, (0, width - rows.shape[1])) for _, rows in tables])
        values, order = values.sort(dim=1)
        chosen = separate(values)
        # One more row takes what is not chosen: nothing has to be counted on the host.
        assigned = candidates.new_full((len(candidates) + 1,), BACKGROUND)
        owner = torch.arange(len(values), device=values.device)[:, None].expand_as(rows)
        assigned[torch.where(chosen, rows.gather(1, order), len(candidates))] = owner
        return assigned[:-1]


def _cheapest(
    candidates: Tensor, costs: Tensor, level_counts: Sequence[int], objects: range, start: int, topk: int
) -> tuple[Tensor, Tensor]:
    """Costs and rows (M, K) of the topk cheapest candidates per level of each object of one image.

    Costs are infinite where an object has fewer candidates. The image's anchors begin at row `start`.
    """
    index = torch.arange(objects.start, objects.stop, device=costs.device)[:, None]
    values, rows = [], []
    for count in level_counts:
        level = slice(start, start + count)
        table = torch.where(candidates[level] == index, costs[level], torch.inf)
        value, row = table.topk(min(topk, count), dim=1, largest=False)
        values.append(value)
        rows.append(row + start)
        start += count
    return torch.cat(values, dim=1), torch.cat(rows, dim=1)


class Mixture(NamedTuple):
    """Two Gaussians for each of M objects: means, variances and weights, (M, 2) each; the cheaper one first."""

    means: Tensor
    variances: Tensor
    weights: Tensor

    def log_density(self, values: Tensor) -> Tensor:
        """Logarithm of each Gaussian's weighted density (M, K, 2) at values (M, K)."""
        distance = (values[..., None] - self.means[:, None]).square() / self.variances[:, None]
        constant = self.weights.log() - 0.5 * (2 * torch.pi * self.variances).log()
        return constant[:, None] - 0.5 * distance


def separate(costs: Tensor) -> Tensor:
    """Mark the positives of each object.

    Args:
        costs: (M, K) of each object's candidates, ascending; infinite entries are not candidates.

    Returns:
        (M, K) bool: members of the cheaper Gaussian that cost no more than its member of highest likelihood (under the
        mixture). An object with fewer than two candidates has no positive, as in the published code.
    """
    present = costs.isfinite()
    values = torch.where(present, costs, 0.0)
    density = fit_mixture(values, present).log_density(values)
    cheap = present & (density[..., 0] >= density[..., 1])
    likeliest = torch.where(cheap, density.logsumexp(dim=-1), -torch.inf).argmax(dim=1, keepdim=True)
    position = torch.arange(costs.shape[1], device=costs.device)
    return cheap & (position <= likeliest) & (present.sum(dim=1, keepdim=True) > 1)


def fit_mixture(values: Tensor, present: Tensor) -> Mixture:
    """Fit two Gaussians to the values of each object by expectation maximization, all objects at a time.

    It starts from the smallest and the largest value, variances of 1 and equal weights. The fit of an object stops on
    its own, so it does not depend on the other objects.

    Args:
        values: (M, K) ascending, finite; (M, K) bool `present` marks those that count, which come first.
    """
    count = present.sum(dim=1).clamp(min=1)
    ends = torch.stack([values[:, 0], values.gather(1, count[:, None] - 1)[:, 0]], dim=1)
    fit = Mixture(ends, torch.ones_like(ends), torch.full_like(ends, 0.5))
    bound, active = torch.full_like(ends[:, 0], -torch.inf), torch.ones_like(count, dtype=torch.bool)
    for step in range(1, MAX_STEPS + 1):
        density = fit.log_density(values)
        total = density.logsumexp(dim=-1)
        share = torch.where(present[..., None], (density - total[..., None]).exp(), 0.0)
        updated = _maximize(values, share, count)
        fit = Mixture(*(torch.where(active[:, None], new, old) for new, old in zip(updated, fit, strict=True)))
        previous, bound = bound, torch.where(present, total, 0.0).sum(dim=1) / count
        active &= (bound - previous).abs() >= TOLERANCE
        if step % STEPS_PER_CHECK == 0 and not active.any():
            break
    return fit


def _maximize(values: Tensor, share: Tensor, count: Tensor) -> Mixture:
    """Maximization step: each Gaussian has a share (M, K, 2) of the values (M, K), `count` (M,) of them present."""
    # A Gaussian that has lost all values: scikit-learn's guard against a division by 0.
    size = share.sum(dim=1) + 10 * torch.finfo(values.dtype).eps
    means = (share * values[..., None]).sum(dim=1) / size
    spread = (values[..., None] - means[:, None]).square()
    return Mixture(means, (share * spread).sum(dim=1) / size + MIN_VARIANCE, size / count[:, None])
