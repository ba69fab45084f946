"""`train.per_device_batch_size=auto`: the most images that a process can hold at once, found by trying.

Only the split of the total batch is chosen; what does not fit at once is accumulated. A ranking loss ranks what is held
at once, so its numbers depend on the choice, which is therefore logged and stored for `--resume`. The trials use a
detector of their own, the largest shape that the data can have and the most objects, with forward and backward pass,
the optimizer's state and what a training keeps besides.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from brs_detr.engine.diagnostics import noise_batch
from brs_detr.losses.distributed import without_other_processes
from brs_detr.ops.images import Batch

HEADROOM = 0.9
"""Part of a GPU's memory that the largest step may take: batches of other shapes fragment it."""
CPU_SHARE = 0.5
"""Part of the available memory that is used without a GPU, where too much ends the process, not only the trial."""
TEMPORARY = 2.0
"""Peak memory of a step on a CPU as a multiple of what the forward pass saves; 1.4 on the demo with 16 images."""
_EXHAUSTED = ("out of memory", "alloc_failed")  # MPS and libraries of CUDA raise plain RuntimeErrors


def divisors(share: int) -> list[int]:
    """Return the batch sizes into which a process's share of the total batch splits evenly, ascending."""
    return [size for size in range(1, share + 1) if share % size == 0]


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Find the largest size that fits by bisection; every size below one that fits does too.

    Args:
        sizes: ascending.
        fits: tries a size.

    Returns:
        The size; 0 if not even the first one fits.
    """
    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else 0


def agreed(fits: Callable[[int], bool], accelerator: Accelerator) -> Callable[[int], bool]:
    """Return a trial that fits only if it does in every process, so that all go on with the same size."""

    def everywhere(size: int) -> bool:
        own = fits(size)
        return all(gather_object([own])) if accelerator.num_processes > 1 else own

    return everywhere


def trial_step(
    model: nn.Module, optimizer: Optimizer, accelerator: Accelerator, batch: Batch, *, accumulate: bool, kept: int = 0
) -> None:
    """Take a step on a batch as the training does, on its own.

    Args:
        model: in training mode; its weights are changed.
        optimizer: of the model, plain.
        accelerator: its precision is used.
        batch: images and targets on the device.
        accumulate: gradients of a batch before are in memory during the forward pass.
        kept: bytes that a training holds besides, on the same device: averaged weights, buckets of gradients.
    """
    images, targets = batch
    ballast = torch.empty(kept, dtype=torch.uint8, device=accelerator.device)
    with without_other_processes():  # one of them may run out of memory before it answers
        for _ in range(2 if accumulate else 1):
            with accelerator.autocast():
                terms = model(images, targets)
            torch.stack(list(terms.values())).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    del ballast


def fits_on_device(step: Callable[[], object], device: torch.device) -> bool:
    """Check that a step ends within `HEADROOM` of the memory of an accelerator, and free what it leaves behind."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step()
        if not cuda:
            return True
        torch.cuda.synchronize(device)
        usable = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return torch.cuda.max_memory_allocated(device) <= HEADROOM * usable
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error).lower() for text in _EXHAUSTED):
            raise
        return False


def free_memory(device: torch.device) -> None:
    """Give what a failed trial left behind back to the device, and forget its peak, which a training's would not reach.

    Called outside the handler of its error.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def saved_bytes(step: Callable[[], object], model: nn.Module) -> int:
    """Return the bytes that the forward pass of a step saves for the backward pass, its weights not included."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


def available_memory(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes that may still be taken: the machine's, or those of a control group if they are fewer.

    Args:
        cgroups: version 2 of Linux's control groups; elsewhere there is no such folder.
        own: names this process's group, in a line `0::/path`.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    group = cgroups / next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    above = [folder for folder in group.parents if folder.is_relative_to(cgroups)]  # their limits hold too
    return int(min(psutil.virtual_memory().available, *map(_room, (group, *above, cgroups))))


def _room(group: Path) -> float:
    """Return the bytes that a control group may still take; infinite without a limit."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # "max": no limit
        return math.inf
    try:  # what was read of files counts as used, but gives way
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        pass
    return max(0, limit - used)


def fits_on_cpu(bytes_per_image: float, fixed: int) -> Callable[[int], bool]:
    """Return the trial of a size by calculation: without a GPU, memory that runs out ends the process.

    Args:
        bytes_per_image: that a step saves.
        fixed: bytes of gradients, optimizer and averaged weights.
    """
    budget = CPU_SHARE * available_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return lambda size: fixed + TEMPORARY * bytes_per_image * size <= budget


def search_batch_size(
    build: Callable[[], tuple[nn.Module, Optimizer]],
    shape: Callable[[int], dict[str, Any]],
    accelerator: Accelerator,
    share: int,
    *,
    averaged: bool = False,
) -> int:
    """Find the largest batch that every process can hold, of those into which its share splits evenly.

    Args:
        build: makes a detector in training mode on the device, and its optimizer; they are thrown away.
        shape: returns what `noise_batch` needs for a batch size, the largest that the data can have.
        accelerator: of the launch; its processes agree.
        share: images of a process in an optimizer step.
        averaged: the training keeps averaged weights.

    Returns:
        The size; 0 if not even one image fits.
    """
    device, sizes = accelerator.device, divisors(share)
    model, optimizer = build()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    kept = weights * (int(averaged) + int(accelerator.num_processes > 1))

    def step(size: int, accumulate: bool) -> None:
        batch = noise_batch(device=device, **shape(size))
        trial_step(model, optimizer, accelerator, batch, accumulate=accumulate, kept=kept)

    def tried(size: int) -> bool:
        fits = fits_on_device(lambda: step(size, size < share), device)
        optimizer.zero_grad()
        free_memory(device)
        return fits

    fits: Callable[[int], bool] = tried
    if device.type == "cpu":
        count = min(2, share)
        per_image = saved_bytes(lambda: step(count, False), model) / count
        fits = fits_on_cpu(per_image, 3 * weights + kept)  # gradients and the optimizer's two averages
    return largest_that_fits(sizes, agreed(fits, accelerator))
