"""Self-balancing weights for the box losses (no tuning).

`self_balance` is the value-based rule of Rank & Sort (Oksuz et al., ICCV 2021), `box_scores` gives its per-box weights,
and `EpochBalance` is the slower rule of aLRP (Oksuz et al., NeurIPS 2020, Sec. 4.2).
"""

import torch
from torch import Tensor, nn

from .checks import check_number

FLOOR = 1e-6  # smallest denominator; far below the loss of any box that still has something to learn
CAP = 1e3  # largest ratio: the gradient of boxes that already fit stays bounded
MIN_TARGET = 0.1  # smallest value that box losses are balanced against, see `self_balance`


def self_balance(
    term: Tensor,
    target: Tensor,
    weight: float = 1.0,
    floor: float = FLOOR,
    cap: float = CAP,
    min_target: float = MIN_TARGET,
) -> Tensor:
    """Scale a localization loss so that its value equals `weight * target`, without sending gradient into the scale.

    The factor is weight * max(target, min_target) / max(term, floor), at most `weight * cap`: boxes that already fit
    (term near 0) would otherwise get an unbounded gradient. The papers have no `min_target`: there the boxes stop
    learning when the ranking is nearly perfect, as it soon is on few images, however badly the boxes fit. A target of
    0.1 is a mean precision of 0.9 or better with no sorting error left; above it the value is that of the papers.

    Args:
        term: any shape, localization losses, >= 0.
        target: of the same shape, ranking + sorting losses; detached here.
        weight: what the balanced value is multiplied with.
        floor: smallest denominator.
        cap: largest ratio of target and term.
        min_target: smallest target; 0 is the papers' rule.

    Returns:
        of the same shape, attached to the graph of `term` only.
    """
    ratio = (target.detach().clamp(min=min_target) / term.detach().clamp(min=floor)).clamp(max=cap)
    return term * (ratio * weight)


def box_scores(logits: Tensor) -> Tensor:
    """Return the weight of each positive's box loss, not yet normalized: its highest class probability.

    Args:
        logits: (..., C) class logits of the positives' rows.

    Returns:
        (...) float32, detached.
    """
    return logits.detach().float().sigmoid().amax(-1)


class EpochBalance(nn.Module):
    """Multiply aLRP's localization part by the average of aLRP / aLRP_loc over an epoch.

    aLRP loss, Sec. 4.2: the classification error dominates early on and would leave the boxes untrained. As in the
    official heads, only iterations with positives count, and the one that completes a period already uses the new
    factor.

    Args:
        period: counted iterations per epoch (the official heads count 3665).
        start: factor during the first epoch.
        cap: largest factor.
        min_target: smallest mean of the loss over an epoch that is balanced against, for the reason given at
            `self_balance`; 0 is the paper's rule, from which the default differs only where the loss is below it.
    """

    factor: Tensor
    sums: Tensor

    def __init__(
        self, period: int = 3665, start: float = 50.0, cap: float = CAP, min_target: float = MIN_TARGET
    ) -> None:
        super().__init__()
        if period < 1:
            raise ValueError(f"period: {period} is out of range. Give a number of iterations that is at least 1.")
        check_number("start", start)
        check_number("cap", cap)
        check_number("min_target", min_target)
        self.period = period
        self.cap = cap
        self.min_target = min_target
        self.register_buffer("factor", torch.tensor(float(start)))
        # Sums of both parts and their count, on the device so that no step waits for the host; in float32, as not
        # every device has more: over 3665 terms of about 1 the sums are exact to six digits.
        self.register_buffer("sums", torch.zeros(3))

    def forward(self, classification: Tensor, localization: Tensor, positives: Tensor | int = 1) -> Tensor:
        """Multiply the localization part by the current factor.

        Args:
            classification, localization: scalars, the parts of the loss; counted in training mode.
            positives: number of positives; an iteration with 0 is not counted.

        Returns:
            scalar, attached to the graph of `localization` only.
        """
        if self.training:
            self._count(classification.detach(), localization.detach(), positives)
        # A copy: the next iteration may change the buffer before the backward pass of this one reads the factor.
        return localization * self.factor.to(localization, copy=True)

    def _count(self, classification: Tensor, localization: Tensor, positives: Tensor | int) -> None:
        """Add an iteration to the sums; at the end of a period, update the factor and start again from 0."""
        parts = torch.stack([classification, localization, torch.ones_like(localization)]).to(self.sums)
        # A non-finite step, which the trainer skips, must not make all later factors non-finite.
        counted = parts.isfinite().all() & (positives > 0)
        # Selected by `where` and not by `if`, so that the host need not read the flags.
        sums = self.sums + torch.where(counted, parts, 0.0)
        full = sums[2] >= self.period
        # As in `self_balance`, the target (here the mean of both parts) has a smallest value.
        target = torch.maximum(sums[0] + sums[1], self.min_target * sums[2])
        factor = (target / sums[1].clamp(min=FLOOR)).clamp(max=self.cap).to(self.factor)
        self.factor.copy_(torch.where(full, factor, self.factor))
        self.sums.copy_(torch.where(full, torch.zeros_like(sums), sums))


def set_epoch_length(module: nn.Module, iterations: int) -> None:
    """Set the period of every `EpochBalance` in a module to the iterations of an epoch, at least 1."""
    for part in module.modules():
        if isinstance(part, EpochBalance):
            part.period = max(1, iterations)
