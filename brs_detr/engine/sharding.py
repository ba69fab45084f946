"""Sharded weights (FSDP 2): each process keeps a part of every weight, gradient and optimiser state.

Accelerate shards the detector; here is what a detector needs besides. Weights stay float32 and autocast rounds, as
without sharding: a policy that casts a module's inputs and outputs would round boxes in pixels to bf16.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, compare_versions
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor


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
