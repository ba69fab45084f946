"""Score-based classification losses: each row is compared with its label, not with other rows; one value per row."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PRIOR_BIAS = -math.log(99.0)
"""Bias of a sigmoid classifier that starts at a probability of 0.01 (Lin et al., ICCV 2017, section 4.1)."""


def _one_hot(logits: Tensor, labels: Tensor, rows: Tensor, value: Tensor | float = 1.0) -> Tensor:
    """Return (N, C) zeros with `value` at each positive row's own class."""
    target = torch.zeros_like(logits)
    target[rows, labels[rows]] = value
    return target


def focal(logits: Tensor, labels: Tensor, rows: Tensor, quality: Tensor, alpha: float, gamma: float) -> Tensor:
    """Compute sigmoid focal loss (Lin et al., ICCV 2017, Eq. 5), summed over classes.

    Args:
        logits: (N, C) float32.
        labels: (N,) int64.
        rows: (P,) rows of the positives.
        quality: (P,), unused; all losses of this file take the same arguments.
        alpha, gamma: balance and focusing parameters.

    Returns:
        (N,).
    """
    # Imported here so that the ranking losses can be used where torchvision is not installed.
    from torchvision.ops import sigmoid_focal_loss

    loss: Tensor = sigmoid_focal_loss(logits, _one_hot(logits, labels, rows), alpha, gamma)
    return loss.sum(1)


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, rows: Tensor, quality: Tensor, alpha: float, gamma: float
) -> Tensor:
    """Compute sigmoid cross entropy with the one-hot label, summed over classes; arguments as for `focal`."""
    return F.binary_cross_entropy_with_logits(logits, _one_hot(logits, labels, rows), reduction="none").sum(1)


def cross_entropy(logits: Tensor, labels: Tensor, rows: Tensor, quality: Tensor, alpha: float, gamma: float) -> Tensor:
    """Compute softmax cross entropy over C + 1 columns, the last one background.

    Arguments as for `focal`, with (N, C + 1) logits.
    """
    # Ignored rows may have any label; clamped, they index a column, and the caller drops their loss.
    return F.cross_entropy(logits, labels.clamp(0, logits.shape[1] - 1), reduction="none")


def quality_focal(logits: Tensor, labels: Tensor, rows: Tensor, quality: Tensor, alpha: float, gamma: float) -> Tensor:
    """Compute quality focal loss (Li et al., NeurIPS 2020): cross entropy with the IoU, weighted by |IoU - p|^gamma.

    Arguments as for `focal`; `quality` is the target of the positives' own class.
    """
    # The modulating factor is differentiated too, as in the official implementation.
    target = _one_hot(logits, labels, rows, quality)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * (target - logits.sigmoid()).abs().pow(gamma)).sum(1)


SCORE_LOSSES = {
    "focal": focal,
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "quality_focal": quality_focal,
}
