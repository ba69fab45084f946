"""What happens when a loss or a gradient is not finite.

The guard asks the device once a step, together with the gradient norm that clipping needs anyway; only a step that has
failed is taken apart to name the term, the images and the parameter. A step that is left out leaves nothing behind:
the running statistics of batch normalization, which a forward pass changes, are set back too.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from brs_detr.engine.distributed import local, whole
from brs_detr.engine.storage import NonFiniteError, write_file
from brs_detr.ops.images import Batch

__all__ = ["Batch", "NonFiniteError", "RunningStatistics", "describe_reports", "finite", "inspect_step", "save_batch"]


class RunningStatistics:
    """The running statistics of a model's normalization layers, the only buffers that a forward pass changes.

    Frozen layers have none. All work stays on the device, in a handful of kernels; nothing waits for it.

    Args:
        model: in training mode or not; its layers are looked for once.
    """

    def __init__(self, model: nn.Module):
        layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]
        buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        self.numbers = [buffer for buffer in buffers if buffer.is_floating_point()]
        self.live = [*self.numbers, *(buffer for buffer in buffers if not buffer.is_floating_point())]
        self.kept = [buffer.clone() for buffer in self.live]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them as they are."""
        if self.live:
            torch._foreach_copy_(self.kept, self.live)

    @torch.no_grad()
    def restore(self) -> None:
        """Set them back to what was kept."""
        if self.live:
            torch._foreach_copy_(self.live, self.kept)

    def largest(self, like: Tensor) -> Tensor:
        """() the largest magnitude among them, NaN or infinite where one of them is; 0 where there are none."""
        if not self.numbers:
            return torch.zeros_like(like)
        norms = torch._foreach_norm(self.numbers, ord=float("inf"))
        return torch.stack([norm.to(like.device, like.dtype) for norm in norms]).sum()


def finite(total: Tensor, norm: Tensor) -> Tensor:
    """() bool on the device: is the step's loss and is its gradient norm finite."""
    return torch.isfinite(total.detach()) & torch.isfinite(norm.detach().to(total.device))


class NonFiniteReport(NamedTuple):
    """What one process sees of a failed step: sentences on its loss terms, first gradient and buffer, images' ids."""

    terms: str
    gradient: str
    buffer: str
    images: str


def inspect_step(terms: list[dict[str, Tensor]], batches: list[Batch], model: nn.Module) -> NonFiniteReport:
    """Look for what is not finite in a failed step.

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
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    bad = next((name for name, gradient in gradients if not torch.isfinite(local(gradient)).all().item()), "")
    buffers = ((name, b) for name, b in model.named_buffers() if b.is_floating_point())
    buffer = next((name for name, value in buffers if not torch.isfinite(local(value)).all().item()), "")
    return NonFiniteReport(
        "; ".join(parts), bad, buffer, _ids([target for _, targets in batches for target in targets])
    )


def describe_reports(findings: list[NonFiniteReport]) -> tuple[str, int]:
    """Name what is not finite, and the first rank with a non-finite loss.

    Gradients are averaged before they are looked at: they tell of no process, and only where all loss terms are finite.

    Args:
        findings: of each process.
    """
    bad_ranks = {process: found.terms for process, found in enumerate(findings) if found.terms}
    if bad_ranks:
        several = len(findings) > 1
        return "; ".join(f"process {p}: {text}" if several else text for p, text in bad_ranks.items()), min(bad_ranks)
    images = ", ".join(found.images for found in findings)
    name = next((found.gradient for found in findings if found.gradient), None)
    buffer = next((found.buffer for found in findings if found.buffer), None)
    if name is None and buffer is not None:
        return f"losses and gradients are finite, but the running statistics {buffer} are not (images {images})", 0
    if name is None:
        return f"losses and gradients are finite one by one, but too large to be summed (images {images})", 0
    return f"every loss term is finite, but the gradient of {name} is not (images {images})", 0


def save_batch(
    path: Path, *, seed: int, step: int, process: int, batches: list[Batch], model: nn.Module, facts: dict[str, Any]
) -> None:
    """Save what reproduces a failed step: images, targets, what the step's random numbers follow from, the run's
    facts (config, class names), and the weights it ran with. Every process calls it: sharded weights are gathered.

    `torch.load(path, weights_only=True)` reads it back: {"seed", "step", "process", "facts", "weights", "batches"},
    each batch with the fields of an `ImageBatch` and its "targets". `python -m brs_detr replay` runs it again.

    Raises:
        StorageError: it could not be written.
    """
    stored = [
        {"pixels": i.pixels.cpu(), "sizes": i.sizes, "original_sizes": i.original_sizes, "targets": targets}
        for i, targets in batches
    ]
    weights = {name: whole(tensor).cpu() for name, tensor in model.state_dict().items()}
    place = {"seed": seed, "step": step, "process": process, "facts": facts}
    content = io.BytesIO()  # written to a file, torch hides why the disk has refused
    torch.save({**place, "batches": stored, "weights": weights}, content)
    write_file(path, lambda file: file.write(content.getbuffer()))


def _ids(targets: list[dict[str, Any]]) -> str:
    return ", ".join(str(int(target["image_id"])) for target in targets)
