"""The norm of all gradients and clipping by it, also where each process holds only parts of them (FSDP)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from brs_detr.engine.sharding import local, whole


def average_whole_gradients(model: nn.Module) -> None:
    """Average over processes the gradients of parameters that are not sharded: FSDP reduces only its own."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
    if not gradients or not torch.distributed.is_initialized():
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    means = (flat / torch.distributed.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def gradient_norm(model: nn.Module) -> Tensor:
    """L2 norm of all gradients, (), without changing them: clipping by a NaN would hide where it came from.

    Every process has to call it; all get the same value.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return nn.utils.get_total_norm(gradients)
    rest = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norm = whole(nn.utils.get_total_norm(sharded))
    return torch.hypot(norm, nn.utils.get_total_norm(rest)) if rest else norm


def clip_gradients(model: nn.Module, norm: Tensor, most: float) -> None:
    """Scale all gradients so that their L2 norm `norm`, (), becomes at most `most`; the host does not wait for it."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if any(isinstance(p, DTensor) for p in parameters):
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(p.grad) for p in parameters], factor)
    else:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
