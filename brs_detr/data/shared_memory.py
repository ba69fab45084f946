"""Batches on their way from the loader's workers: through shared memory, or a pipe where there is too little of it.

A container has 64 MB of shared memory unless told otherwise. Torch notices a full one only in a thread of the worker,
which drops the batch, and the training would wait for it for ever. Here the worker itself notices.
"""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brs_detr.data.storage import StorageError
from brs_detr.ops.images import ImageBatch

SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2  # batches that each worker prepares ahead, torch's default
_console = logging.getLogger(__name__)
_told: set[str] = set()  # of this process


class ThroughPipe:
    """A batch that is pickled by value, pixels included; unpickling gives the batch itself."""

    def __init__(self, batch: Any) -> None:
        self.content = pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL)

    def __reduce__(self) -> tuple:
        return pickle.loads, (self.content,)


def shared_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """(count,) zeros that the loader's workers and their parent both see.

    Raises:
        StorageError: there is no room at all in the shared memory.
    """
    try:
        return torch.zeros(count, dtype=dtype).share_memory_()
    except RuntimeError as error:
        reason = str(error).rpartition(": ")[2]
        raise StorageError(f"{SHARED_MEMORY}: {reason}. {_mend()}") from error


def move_to_shared_memory(batch: tuple[ImageBatch, list[dict[str, Any]]]) -> Any:
    """The batch with its tensors in shared memory or, where there is no room, as what goes through the pipe."""
    images, targets = batch
    tensors = [images.pixels, *(value for target in targets for value in target.values() if isinstance(value, Tensor))]
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:  # torch's word for "no space left" and for "too many open files"
        reason = str(error).rpartition(">: ")[2]
        if reason not in _told:
            _told.add(reason)
            _console.warning("%s: %s. Batches go through a pipe, which is slower. %s", SHARED_MEMORY, reason, _mend())
        return ThroughPipe(batch)
    return batch


def shortage(workers: int, batch_bytes: int, processes: int = 1) -> str | None:
    """A warning where the loaders of this machine may need more shared memory than is free, else None.

    Args:
        workers: loader workers of one process.
        batch_bytes: of the largest batch of one process.
        processes: training processes on this machine.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return None
    needed = processes * (workers * PREFETCHED + 1) * batch_bytes  # one is in use
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed <= free:
        return None
    return (
        f"warning: {SHARED_MEMORY} has {free / 2**20:,.0f} MB free, the loader's workers may need "
        f"{needed / 2**20:,.0f} MB ({processes} process(es) x {workers} workers x {PREFETCHED} batches of "
        f"{batch_bytes / 2**20:,.0f} MB); batches without room go through a pipe, which is slower. {_mend()}"
    )


def _mend() -> str:
    return "Start the container with --shm-size=8g (or --ipc=host), or lower data.workers."
