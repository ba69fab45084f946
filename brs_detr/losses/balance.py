"""Weights of localisation losses that follow the ranking loss, so that nobody has to tune them.

`self_balance` is the value-based rule of Rank & Sort (Oksuz et al., ICCV 2021, Sec. 3.3); `score_weights` are its
per-box weights.
"""

import torch
from torch import Tensor

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


def score_weights(logits: Tensor) -> Tensor:
    """Weight of each positive's box loss: its highest class probability over their mean.

    Args:
        logits: (P, C) class logits of the positives' rows.

    Returns:
        (P,) detached, mean 1; all ones where every probability is 0.
    """
    scores = logits.detach().float().sigmoid().amax(1) if len(logits) else logits.new_zeros(0)
    mean = scores.sum() / max(len(scores), 1)
    return torch.where(mean > 0, scores / mean.clamp(min=1e-12), torch.ones_like(scores))
