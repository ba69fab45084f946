"""Transfer of batches from the loader workers: through shared memory, or through a pipe if it is full.

A container has 64 MB of shared memory by default. Torch detects that it is full only in a background thread of the
worker, which drops the batch, so that training waits for it indefinitely. Here the worker itself detects it.
"""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brs_detr.exit_codes import ExitCode, Interruption
from brs_detr.ops.images import ImageBatch, ImageViews

SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2  # batches that each worker prepares in advance, torch's default
_ADVICE = "Start the container with --shm-size=8g (or --ipc=host), or lower data.workers."
_console = logging.getLogger(__name__)
_warned: set[str] = set()  # reasons already logged by this process, which may meet them in every batch


class SharedMemoryError(Interruption):
    """There is no room left in the shared memory that the run cannot do without."""

    code = ExitCode.STORAGE


class ThroughPipe:
    """A batch that is pickled by value, pixels included; unpickling returns the batch itself."""

    def __init__(self, batch: Any) -> None:
        self.content = pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL)

    def __reduce__(self) -> tuple:
        return pickle.loads, (self.content,)


def shared_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Allocate (count,) zeros in shared memory, for the loader workers and their parent.

    Raises:
        SharedMemoryError: the shared memory is full.
    """
    try:
        return torch.zeros(count, dtype=dtype).share_memory_()
    except RuntimeError as error:
        reason = str(error).rpartition(": ")[2]
        raise SharedMemoryError(f"{SHARED_MEMORY}: {reason}. {_ADVICE}") from error


def move_to_shared_memory(batch: tuple[ImageBatch | ImageViews, list[dict[str, Any]]]) -> Any:
    """Move a batch's tensors to shared memory; if it is full, return a `ThroughPipe` instead."""
    images, targets = batch
    scales = images.scales if isinstance(images, ImageViews) else [images]
    tensors = [*(scale.pixels for scale in scales)]
    tensors += [value for target in targets for value in target.values() if isinstance(value, Tensor)]
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:  # torch raises it for "no space left" and for "too many open files"
        reason = str(error).rpartition(">: ")[2]
        if reason not in _warned:
            _warned.add(reason)
            _console.warning("%s: %s. Batches go through a pipe, which is slower. %s", SHARED_MEMORY, reason, _ADVICE)
        return ThroughPipe(batch)
    return batch


def shortage(workers: int, batch_bytes: int, processes: int = 1) -> str | None:
    """Return a warning if the loaders of this machine may need more shared memory than is free, else None.

    Args:
        workers: loader workers of one process.
        batch_bytes: size of the largest batch of one process.
        processes: training processes on this machine.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return None
    needed = processes * (workers * PREFETCHED + 1) * batch_bytes  # + 1: the batch in use
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed <= free:
        return None
    return (
        f"warning: {SHARED_MEMORY} has {free / 2**20:,.0f} MB free, the loader workers may need "
        f"{needed / 2**20:,.0f} MB ({processes} process(es) x {workers} workers x {PREFETCHED} batches of "
        f"{batch_bytes / 2**20:,.0f} MB). Batches that do not fit go through a pipe, which is slower. {_ADVICE}"
    )
