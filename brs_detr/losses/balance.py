"""Weights of localisation losses that follow the ranking loss, so that nobody has to tune them.

`self_balance` is the value-based rule of Rank & Sort (Oksuz et al., ICCV 2021), `box_scores` its per-box
weights, and `EpochBalance` the slower rule of aLRP (Oksuz et al., NeurIPS 2020, Sec. 4.2).
"""

import torch
from torch import Tensor, nn

FLOOR = 1e-6
CAP = 1e3


def self_balance(term: Tensor, target: Tensor, weight: float = 1.0, floor: float = FLOOR, cap: float = CAP) -> Tensor:
    """Scale a localisation loss so that its value equals `weight * target`, without sending gradient into the scale.

    The factor is weight * target / max(term, floor), at most `weight * cap`: boxes that already fit (term near 0) would
    otherwise get an unbounded gradient. Where `target` is exactly 0 (a perfect ranking) the factor is `weight`, for
    a finished ranking must not stop the boxes from learning.

    Args:
        term: scalar, the localisation loss, >= 0.
        target: scalar, ranking + sorting loss; detached here.
        weight: what the balanced value is multiplied with.
        floor: least denominator.
        cap: largest ratio target / term that is followed.

    Returns:
        scalar, attached to the graph of `term` only.
    """
    target = target.detach()
    ratio = (target / term.detach().clamp(min=floor)).clamp(max=cap)
    return term * (torch.where(target == 0, torch.ones_like(ratio), ratio) * weight)


def box_scores(logits: Tensor) -> Tensor:
    """How much each positive's box loss weighs, not yet normalised: its highest class probability.

    Args:
        logits: (P, C) class logits of the positives' rows.

    Returns:
        (P,) float32, detached.
    """
    return logits.detach().float().sigmoid().amax(1)


class EpochBalance(nn.Module):
    """Multiply aLRP's localisation part by the average of aLRP / aLRP_loc over the previous epoch.

    aLRP loss, Sec. 4.2: the classification error dominates early on and would leave the boxes untrained.

    Args:
        period: iterations per epoch (the official heads count 3665).
        start: factor during the first epoch.
        cap: largest factor.
    """

    def __init__(self, period: int = 3665, start: float = 50.0, cap: float = CAP):
        super().__init__()
        if period < 1:
            raise ValueError(f"period is a number of iterations and must be at least 1, got {period}")
        self.period = period
        self.cap = cap
        self.register_buffer("factor", torch.tensor(float(start)))
        # Sums of both parts and their count, on the device so that no step waits for the host.
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))

    def forward(self, classification: Tensor, localisation: Tensor) -> Tensor:
        """The balanced localisation part; in training mode both scalars are also counted for the next epoch."""
        # A copy: the buffer changes below, before the backward pass needs this factor.
        balanced = localisation * self.factor.to(localisation, copy=True)
        if self.training:
            seen = torch.stack([classification.detach(), localisation.detach(), torch.ones_like(localisation)])
            sums = self.sums + seen.to(self.sums)
            factor = ((sums[0] + sums[1]) / sums[1].clamp(min=FLOOR)).clamp(max=self.cap).to(self.factor)
            full = sums[2] >= self.period
            self.factor.copy_(torch.where(full, factor, self.factor))
            self.sums.copy_(torch.where(full, torch.zeros_like(sums), sums))
        return balanced
