"""Sharded weights (FSDP 2): each process keeps a part of every weight, gradient and optimizer state.

Accelerate shards the detector; here is what a detector needs besides. Weights stay float32 and autocast rounds, as
without sharding: a policy that casts a module's inputs and outputs would round boxes in pixels to bf16.

The norm of all gradients and clipping by it, also where each process holds only parts of them (FSDP).

What a step needs of its device and process: random numbers, targets in place, buffers alike everywhere.

What one process cannot do, none does: processes that wait for each other in a step would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, compare_versions, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from brs_detr.exit_codes import ExitCode, Interruption


def sharding_wanted() -> bool:
    """Does the launch ask for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def sharding_plugin() -> FullyShardedDataParallelPlugin | None:
    """What the launch says about FSDP, with float32 weights; None where it says nothing.

    Raises:
        ValueError: the launch asks for the first version of FSDP or contradicts itself, or Accelerate is too old.
    """
    if not sharding_wanted():
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP of version 1 is not supported; set fsdp_version: 2 as configs/accelerate/fsdp.yaml does")
    if compare_versions("accelerate", "<", "1.13"):  # older ones shard scalars, or do not resume exactly
        raise ValueError("FSDP needs accelerate 1.13 or newer; pip install --upgrade accelerate")
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def is_sharded(accelerator: Accelerator) -> bool:
    """Does `accelerator.prepare` shard the model."""
    return accelerator.distributed_type == DistributedType.FSDP


def keep_scalars_whole(model: nn.Module, accelerator: Accelerator) -> None:
    """Leave parameters without dimensions out of the sharding, which cannot part them; call it before `prepare`."""
    owners = [m for m in model.modules() if any(p.ndim == 0 for p in m.parameters(recurse=False))]
    accelerator.state.fsdp_plugin.ignored_modules = owners or None


def keep_known_layers(model: nn.Module, accelerator: Accelerator) -> str:
    """Of the layer classes that the launch wants to be sharded one by one, keep those the model has; before `prepare`.

    Returns:
        A line for the log: how many layers of which class, and which classes the model has not.
    """
    plugin = accelerator.state.fsdp_plugin
    names = plugin.transformer_cls_names_to_wrap or []
    counts = {name: sum(type(module).__name__ == name for module in model.modules()) for name in names}
    plugin.transformer_cls_names_to_wrap = [name for name in names if counts[name]]
    layers = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    absent = ", ".join(name for name, count in counts.items() if not count)
    return f"layers sharded one by one: {layers or 'none'}" + (f"; not in this detector: {absent}" if absent else "")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, any other tensor as it is; no process waits for another."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor with all its parts, any other tensor as it is; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def whole_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Every process holds all weights inside, so that processes may make different numbers of forward passes.

    A sharded forward pass gathers weights and waits for all processes; validation has as many passes as a process has
    batches. Changes nothing for a model that is not sharded.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:  # the root keeps its weights from the forward to the backward pass, as FSDP's default is
            again = part is not model and bool(accelerator.state.fsdp_plugin.reshard_after_forward)
            part.set_reshard_after_forward(again, recurse=False)
            part.reshard()


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


def clip_gradients(model: nn.Module, norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their L2 norm `norm`, (), becomes at most `max_norm`; the host does not wait for "
    "it."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if any(isinstance(p, DTensor) for p in parameters):
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(p.grad) for p in parameters], factor)
    else:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed torch's generators (all devices) so that a step's random draws depend on nothing that went before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0] >> 1))


def share_buffers(module: nn.Module) -> None:
    """Give every process the main one's buffers: batch statistics differ, since each process saw other images."""
    for buffer in module.buffers():
        torch.distributed.broadcast(buffer, src=0)


def to_device(targets: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Targets with their tensors on `device`; other values as they are."""
    return [
        {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in t.items()}
        for t in targets
    ]


def raise_together(mine: Interruption | None, accelerator: Accelerator) -> None:
    """Raise in every process where some process was interrupted; every process calls this at the same point.

    Args:
        mine: what this process met, or None.
        accelerator: of the launch.

    Raises:
        Interruption: with what that process said and its exit code; of several the highest, so that being told to
            stop comes before what a stop may bring about.
    """
    if accelerator.num_processes == 1:
        if mine is not None:
            raise mine
        return
    code = torch.tensor(0 if mine is None else int(mine.code), dtype=torch.float32, device=accelerator.device)
    if accelerator.reduce(code, reduction="sum").item() == 0:
        return
    met = gather_object([(-1, 0, "") if mine is None else (accelerator.process_index, int(mine.code), str(mine))])
    process, worst, text = max(met, key=lambda entry: entry[1])
    raise Interruption(f"process {process}: {text}", ExitCode(worst)) from mine
