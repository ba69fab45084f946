"""Training on several processes: sharding (FSDP 2), gradient clipping, seeds, buffers, and errors of one process.

Under FSDP each process holds a part of every weight, gradient and optimizer state. Accelerate shards the detector; this
module adds what a detector needs besides. Weights stay float32 and autocast rounds, as without sharding: a policy that
casts the inputs and outputs of modules would round boxes in pixels to bf16.
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
    """Return True if the launch requests FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def sharding_plugin() -> FullyShardedDataParallelPlugin | None:
    """Build Accelerate's FSDP plugin from the launch, with float32 weights; None without FSDP.

    Raises:
        ValueError: the launch requests version 1 of FSDP or contradicts itself, or Accelerate is too old.
    """
    if not sharding_wanted():
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP version 1 is not supported. Set fsdp_version: 2, as configs/accelerate/fsdp.yaml does.")
    if compare_versions("accelerate", "<", "1.13"):  # older ones shard scalars, or do not resume exactly
        raise ValueError("FSDP needs accelerate 1.13 or newer. Run `pip install --upgrade accelerate`.")
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def is_sharded(accelerator: Accelerator) -> bool:
    """Return True if `accelerator.prepare` shards the model."""
    return accelerator.distributed_type == DistributedType.FSDP


def keep_scalars_whole(model: nn.Module, accelerator: Accelerator) -> None:
    """Exclude 0-dimensional parameters from sharding, which cannot split them; call it before `prepare`."""
    owners = [m for m in model.modules() if any(p.ndim == 0 for p in m.parameters(recurse=False))]
    accelerator.state.fsdp_plugin.ignored_modules = owners or None


def keep_known_layers(model: nn.Module, accelerator: Accelerator) -> str:
    """Reduce the launch's list of layer classes to be sharded to those of the model; call it before `prepare`.

    Accelerate raises for a class that the model does not have, but one launch file serves all detectors.

    Returns:
        A line for the log: how many layers of which class, and which classes the model does not have.
    """
    plugin = accelerator.state.fsdp_plugin
    names = plugin.transformer_cls_names_to_wrap or []
    counts = {name: sum(type(module).__name__ == name for module in model.modules()) for name in names}
    plugin.transformer_cls_names_to_wrap = [name for name in names if counts[name]]
    layers = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    absent = ", ".join(name for name, count in counts.items() if not count)
    return f"layers sharded one by one: {layers or 'none'}" + (f"; not in this detector: {absent}" if absent else "")


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, any other tensor unchanged; without communication."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, return any other tensor unchanged; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def unsharded_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Unshard the weights inside, so that processes may run different numbers of forward passes.

    A sharded forward pass gathers weights and waits for all processes; in validation the number of passes is the number
    of batches of each process. No effect on a model that is not sharded.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:  # the root keeps its weights from forward to backward pass, which is FSDP's default
            again = part is not model and bool(accelerator.state.fsdp_plugin.reshard_after_forward)
            part.set_reshard_after_forward(again, recurse=False)
            part.reshard()


def average_unsharded_gradients(model: nn.Module) -> None:
    """Average over processes the gradients of parameters that are not sharded: FSDP reduces only the sharded ones."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
    if not gradients or not torch.distributed.is_initialized():
        return
    # One all-reduce of all of them, summed and divided: gloo cannot average.
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    means = (flat / torch.distributed.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def gradient_norm(model: nn.Module) -> Tensor:
    """Compute the L2 norm of all gradients, (), without clipping: clipping by NaN would hide where it came from.

    Every process has to call it; all get the same value.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return nn.utils.get_total_norm(gradients)
    rest = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    # The norm of sharded tensors is itself a partial result, to be summed over processes before it is used.
    norm = full_tensor(nn.utils.get_total_norm(sharded))
    return torch.hypot(norm, nn.utils.get_total_norm(rest)) if rest else norm


def clip_gradients(model: nn.Module, norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their L2 norm `norm`, (), becomes at most `max_norm`, without waiting for it."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if any(isinstance(p, DTensor) for p in parameters):
        # The formula of clip_grads_with_norm_, which does not take sharded and other gradients together.
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local_tensor(p.grad) for p in parameters if p.grad is not None], factor)
    else:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed torch's generators (all devices) so that a step's random numbers do not depend on earlier steps."""
    # Hashed by SeedSequence, so that neighboring steps and seeds do not give correlated streams; 63 bits, as torch's
    # seeds are signed.
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0] >> 1))


def share_buffers(module: nn.Module) -> None:
    """Broadcast the main process's buffers: batch statistics differ, since each process saw other images."""
    for buffer in module.buffers():
        torch.distributed.broadcast(buffer, src=0)


def to_device(targets: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Move the tensors of the targets to `device`; other values stay unchanged."""
    return [
        {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in t.items()}
        for t in targets
    ]


def sum_over_processes(value: float, accelerator: Accelerator) -> float:
    """Sum a number over all processes; every process has to call it."""
    if accelerator.num_processes == 1:
        return value
    mine = torch.tensor([value], dtype=torch.float64, device=accelerator.device)  # a number of one process stays exact
    return float(accelerator.reduce(mine, reduction="sum").item())


def from_main(value: float, accelerator: Accelerator) -> float:
    """Return the main process's number in every process; every process has to call it."""
    return sum_over_processes(value if accelerator.is_main_process else 0.0, accelerator)


def raise_together(mine: Interruption | None, accelerator: Accelerator) -> None:
    """Raise in every process if one was interrupted; every process calls this at the same point.

    Otherwise the processes that were not interrupted would wait for ever for the one that was.

    Args:
        mine: the interruption of this process, or None.
        accelerator: of the launch.

    Raises:
        Interruption: with the message and exit code of the interrupted process; of several, the highest exit code:
            a stop request (75) may itself cause the others, such as a loader worker that ends (71).
    """
    if accelerator.num_processes == 1:
        if mine is not None:
            raise mine
        return
    if sum_over_processes(0.0 if mine is None else float(mine.code), accelerator) == 0:
        return
    met = gather_object([(-1, 0, "") if mine is None else (accelerator.process_index, int(mine.code), str(mine))])
    process, worst, text = max(met, key=lambda entry: entry[1])
    raise Interruption(f"process {process}: {text}", ExitCode(worst)) from mine
