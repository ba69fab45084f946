"""What a step needs of its device and process: random numbers, targets in place, buffers alike everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed torch's generators (all devices) so that a step's random draws depend on nothing that went before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0] >> 1))


def share_buffers(module: nn.Module) -> None:
    """Give every process the main one's buffers: batch statistics differ, since each process saw other pictures."""
    for buffer in module.buffers():
        torch.distributed.broadcast(buffer, src=0)


def to_device(targets: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Targets with their tensors on `device`; other values as they are."""
    return [
        {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in t.items()}
        for t in targets
    ]
