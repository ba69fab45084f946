"""In which precision the losses are computed, and what that means for the precision of their inputs."""

import warnings

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """What the sums of a ranking are accumulated in: float64, or float32 on a device that has no wider type."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def single_or_wider(logits: Tensor) -> Tensor:
    """Logits in float32, or as they are in float64; on their graph.

    The gradient goes back to the type that was given. For float16 logits many entries, about 1 / (P rank), then lie
    below the least float16 number and become 0, unless the loss is multiplied first, as a GradScaler does. Under
    autocast one is expected to be there; outside it a warning says so.
    """
    half = logits.dtype == torch.float16 and logits.requires_grad and not torch.compiler.is_compiling()
    if half and not torch.is_autocast_enabled(logits.device.type):
        warnings.warn(
            "logits: many gradients of a ranking loss are too small for float16 and become 0. Use bfloat16 or "
            "float32, or multiply the loss (torch.amp.GradScaler); logits.float() silences this warning.",
            stacklevel=4,
        )
    return logits if logits.dtype == torch.float64 else logits.float()
