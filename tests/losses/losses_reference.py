"""Slow, obvious references and input makers shared by the tests of the losses."""

import torch
from torch import Tensor

from brs_detr.losses.ranking import smooth_heaviside


def bucketed_average_precision(logits: Tensor, positives: Tensor, negative: Tensor, delta: float):
    """Bucketed AP by walking down the sorted list; a negative that ties with a positive comes first.

    Returns the loss and its gradient, by the definition: one prototype per run of relevant negatives, its mean.
    """
    is_positive = torch.zeros(len(logits), dtype=torch.bool)
    is_positive[positives] = True
    margin = logits[positives].min() - delta
    buckets, run = [], []
    for i in sorted(range(len(logits)), key=lambda i: (-logits[i].item(), bool(is_positive[i]))):
        if is_positive[i]:
            buckets.append(run)
            run = []
        elif negative[i] and logits[i] >= margin:
            run.append(i)
    buckets = [bucket for bucket in [*buckets, run] if bucket]
    loss, gradient = logits.new_zeros(()), torch.zeros_like(logits)
    for i in positives:
        above = smooth_heaviside(logits[positives] - logits[i], delta).sum()
        steps = []
        for bucket in buckets:
            mean = logits[bucket].mean().clamp(logits[bucket].min(), logits[bucket].max())
            steps.append(smooth_heaviside(mean - logits[i], delta))
        number = sum((step * len(bucket) for step, bucket in zip(steps, buckets)), logits.new_zeros(()))
        error = number / (above + number)
        loss = loss + error / len(positives)
        gradient[i] -= error / len(positives)
        for step, bucket in zip(steps, buckets):
            gradient[bucket] += step / (above + number) / len(positives)
    return loss, gradient


def detector_like(positives: int, negatives: int, dtype=torch.float64):
    """Shuffled logits of a half-trained detector, indices of the positives, and their qualities."""
    logits = torch.cat([torch.randn(positives) * 1.5, torch.randn(negatives) * 1.5 - 1]).to(dtype)
    order = torch.randperm(len(logits))
    where = (order < positives).nonzero()[:, 0]
    return logits[order].requires_grad_(), where, torch.rand(positives).to(dtype)


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    """d loss / d logits, without leaving it behind in .grad."""
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]
