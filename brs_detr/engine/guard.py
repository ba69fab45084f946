"""What happens when a loss or a gradient is not finite.

The guard asks the device once a step, together with the gradient norm that clipping needs anyway; only a step that has
failed is taken apart to name the term, the pictures and the parameter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brs_detr.engine.sharding import local
from brs_detr.ops.images import ImageBatch

Batch = tuple[ImageBatch, list[dict[str, Any]]]


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite; the message says at which step, in which term, on which pictures."""


def finite(total: Tensor, norm: Tensor) -> Tensor:
    """() bool on the device: is the step's loss and is its gradient norm finite."""
    return torch.isfinite(total.detach()) & torch.isfinite(norm.detach().to(total.device))


def describe(terms: list[dict[str, Tensor]], batches: list[Batch], model: nn.Module) -> str:
    """Name what is not finite in a failed step.

    Args:
        terms: loss terms of each accumulated batch.
        batches: the batches, in the same order.
        model: holds the gradients of the step.
    """
    parts = []
    for named, (_, targets) in zip(terms, batches, strict=True):
        bad = [name for name, value in named.items() if not torch.isfinite(value).item()]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            plural = "terms" if len(bad) > 1 else "term"
            verb = "are" if len(bad) > 1 else "is"
            parts.append(f"loss {plural} {', '.join(bad[:3])}{more} {verb} not finite (images {_ids(targets)})")
    if parts:
        return "; ".join(parts)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all().item():
            ids = _ids([target for _, targets in batches for target in targets])
            return f"every loss term is finite, but the gradient of {name} is not (images {ids})"
    return "this process sees only finite values, another one does not"


def save_batch(
    path: Path, *, seed: int, step: int, process: int, batches: list[Batch], model: nn.Module, facts: dict[str, Any]
) -> None:
    """Save what reproduces a failed step: pictures, targets, what the step's random numbers follow from, the run's facts
    (config, class names), and the weights it ran with (this process's part of them where they are sharded).

    `torch.load(path, weights_only=True)` reads it back: {"seed", "step", "process", "facts", "weights", "batches"},
    each batch with the fields of an `ImageBatch` and its "targets". `python -m brs_detr replay` runs it again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = [
        {"pixels": i.pixels.cpu(), "sizes": i.sizes, "original_sizes": i.original_sizes, "targets": targets}
        for i, targets in batches
    ]
    weights = {name: local(tensor) for name, tensor in model.state_dict().items()}
    place = {"seed": seed, "step": step, "process": process, "facts": facts}
    torch.save({**place, "batches": stored, "weights": weights}, path)


def _ids(targets: list[dict[str, Any]]) -> str:
    return ", ".join(str(int(target["image_id"])) for target in targets)
