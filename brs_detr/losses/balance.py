"""Self-balancing weights for the box losses (no tuning).

`self_balance` is the value-based rule of Rank & Sort (Oksuz et al., ICCV 2021), `box_scores` its per-box
weights, and `EpochBalance` the slower rule of aLRP (Oksuz et al., NeurIPS 2020, Sec. 4.2).
"""

import torch
from torch import Tensor, nn

from .checks import check_number

FLOOR = 1e-6
CAP = 1e3
LEAST = 0.1


def self_balance(
    term: Tensor,
    target: Tensor,
    weight: float = 1.0,
    floor: float = FLOOR,
    cap: float = CAP,
    least: float = LEAST,
) -> Tensor:
    """Scale a localization loss so that its value equals `weight * target`, without sending gradient into the scale.

    The factor is weight * max(target, least) / max(term, floor), at most `weight * cap`: boxes that already fit (term
    near 0) would otherwise get an unbounded gradient. The papers have no `least`: there the boxes stop learning when
    their ranking is nearly perfect, as it soon is on few images, though no box need fit. A target of 0.1 is
    a mean precision of 0.9 or better with no error left in the order; from there on up the value is the papers'.

    Args:
        term: scalar, the localization loss, >= 0.
        target: scalar, ranking + sorting loss; detached here.
        weight: what the balanced value is multiplied with.
        floor: least denominator.
        cap: largest ratio of target and term that is followed.
        least: smallest target that is followed; 0 is the papers' rule.

    Returns:
        scalar, attached to the graph of `term` only.
    """
    ratio = (target.detach().clamp(min=least) / term.detach().clamp(min=floor)).clamp(max=cap)
    return term * (ratio * weight)


def box_scores(logits: Tensor) -> Tensor:
    """How much each positive's box loss weighs, not yet normalized: its highest class probability.

    Args:
        logits: (P, C) class logits of the positives' rows.

    Returns:
        (P,) float32, detached.
    """
    return logits.detach().float().sigmoid().amax(1)


class EpochBalance(nn.Module):
    """Multiply aLRP's localization part by the average of aLRP / aLRP_loc over an epoch.

    aLRP loss, Sec. 4.2: the classification error dominates early on and would leave the boxes untrained. As in the
    official heads, only iterations with objects count, and the one that completes a period uses the new factor already.

    Args:
        period: counted iterations per epoch (the official heads count 3665).
        start: factor during the first epoch.
        cap: largest factor.
    """

    def __init__(self, period: int = 3665, start: float = 50.0, cap: float = CAP):
        super().__init__()
        if period < 1:
            raise ValueError(f"period is a number of iterations and must be at least 1, got {period}")
        check_number("start", start)
        check_number("cap", cap)
        self.period = period
        self.cap = cap
        self.register_buffer("factor", torch.tensor(float(start)))
        # Sums of both parts and their count, on the device so that no step waits for the host.
        # In float32, as not every device has more; at 3665 terms of about 1 that is exact to six digits.
        self.register_buffer("sums", torch.zeros(3))

    def forward(self, classification: Tensor, localization: Tensor, positives: Tensor | int = 1) -> Tensor:
        """The balanced localization part.

        Args:
            classification, localization: scalars, the parts of the loss; counted in training mode.
            positives: how many there were; an iteration with 0 is not counted.

        Returns:
            scalar, attached to the graph of `localization` only.
        """
        if self.training:
            self._count(classification.detach(), localization.detach(), positives)
        # A copy: the buffer may change before the backward pass needs this factor.
        return localization * self.factor.to(localization, copy=True)

    def _count(self, classification: Tensor, localization: Tensor, positives: Tensor | int) -> None:
        seen = torch.stack([classification, localization, torch.ones_like(localization)]).to(self.sums)
        # One step that is not finite, and is skipped by the trainer, may not spoil all later factors.
        counts = seen.isfinite().all() & (positives > 0)
        sums = self.sums + torch.where(counts, seen, 0.0)
        factor = ((sums[0] + sums[1]) / sums[1].clamp(min=FLOOR)).clamp(max=self.cap).to(self.factor)
        full = sums[2] >= self.period
        self.factor.copy_(torch.where(full, factor, self.factor))
        self.sums.copy_(torch.where(full, torch.zeros_like(sums), sums))
