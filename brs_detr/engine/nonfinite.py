"""Detection and diagnosis of losses and gradients that are not finite.

The trainer reads one flag per step, together with the gradient norm that clipping needs anyway; only a failed step is
inspected to name the loss term, the images and the parameter. A skipped step has no effect: the running statistics,
which a forward pass changes, are restored too.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from brs_detr.engine.distributed import full_tensor, local_tensor
from brs_detr.engine.storage import StorageError, write_file
from brs_detr.losses.balance import EpochBalance
from brs_detr.ops.images import Batch


class RunningStatistics:
    """A copy of a model's running statistics, the only buffers that a forward pass changes.

    They are those of normalization, and the sums with which aLRP balances its two parts. Frozen layers have no running
    statistics. Everything stays on the device, in a few kernels; the host does not wait.

    Args:
        model: in training mode or not; its layers are collected once, here.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = (nn.modules.batchnorm._NormBase, EpochBalance)
        layers = [layer for layer in model.modules() if isinstance(layer, kinds)]
        buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        self.numbers = [buffer for buffer in buffers if buffer.is_floating_point()]
        self.live = [*self.numbers, *(buffer for buffer in buffers if not buffer.is_floating_point())]
        self.kept = [buffer.clone() for buffer in self.live]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the current values."""
        if self.live:
            torch._foreach_copy_(self.kept, self.live)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the values of the last `keep`."""
        if self.live:
            torch._foreach_copy_(self.live, self.kept)

    def largest(self, like: Tensor) -> Tensor:
        """Return () a number that is NaN or infinite if any running statistic is; 0 for a model without them."""
        if not self.numbers:
            return torch.zeros_like(like)
        # Infinity norms, one kernel for all buffers; their sum keeps every NaN and infinity.
        norms = torch._foreach_norm(self.numbers, ord=float("inf"))
        return torch.stack([norm.to(like.device, like.dtype) for norm in norms]).sum()


def finite(total: Tensor, norm: Tensor) -> Tensor:
    """Return () bool on the device, True if both the step's loss and its gradient norm are finite."""
    return torch.isfinite(total.detach()) & torch.isfinite(norm.detach().to(total.device))


class NonFiniteReport(NamedTuple):
    """Diagnosis of a failed step in one process; empty strings where everything is finite.

    Attributes:
        terms: a sentence that names the non-finite loss terms and their images.
        gradient: name of the first parameter with a non-finite gradient.
        buffer: name of the first non-finite buffer.
        images: ids of all images of the step.
    """

    terms: str
    gradient: str
    buffer: str
    images: str


def inspect_step(terms: list[dict[str, Tensor]], batches: list[Batch], model: nn.Module) -> NonFiniteReport:
    """Find what is not finite in a failed step.

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
    bad_gradient = next(
        (name for name, gradient in gradients if not torch.isfinite(local_tensor(gradient)).all().item()), ""
    )
    buffers = ((name, b) for name, b in model.named_buffers() if b.is_floating_point())
    buffer = next((name for name, value in buffers if not torch.isfinite(local_tensor(value)).all().item()), "")
    return NonFiniteReport(
        "; ".join(parts), bad_gradient, buffer, _ids([target for _, targets in batches for target in targets])
    )


def describe_reports(reports: list[NonFiniteReport]) -> tuple[str, int]:
    """Name what is not finite, and the first rank with a non-finite loss.

    Gradients are averaged over processes before they are checked, so they do not identify a process, and they are named
    only if all loss terms are finite.

    Args:
        reports: of each process.
    """
    bad_ranks = {process: report.terms for process, report in enumerate(reports) if report.terms}
    if bad_ranks:
        several = len(reports) > 1
        return "; ".join(f"process {p}: {text}" if several else text for p, text in bad_ranks.items()), min(bad_ranks)
    images = ", ".join(report.images for report in reports)
    name = next((report.gradient for report in reports if report.gradient), None)
    buffer = next((report.buffer for report in reports if report.buffer), None)
    if name is None and buffer is not None:
        return f"losses and gradients are finite, but the running statistics {buffer} are not (images {images})", 0
    if name is None:
        return f"losses and gradients are finite, but their sum overflows (images {images})", 0
    return f"every loss term is finite, but the gradient of {name} is not (images {images})", 0


def handle_failed_step(
    terms: list[dict[str, Tensor]],
    batches: list[Batch],
    model: nn.Module,
    statistics: RunningStatistics,
    *,
    accelerator: Accelerator,
    step: int,
    folder: Path | None,
    seed: int,
    metadata: dict[str, Any],
) -> str:
    """Diagnose a failed step, restore the running statistics and save the step's batches; every process calls it.

    Args:
        terms: loss terms of each accumulated batch.
        batches: the batches, in the same order.
        model: the bare detector, which holds the gradients of the step.
        statistics: of the model, kept before the step.
        accelerator: of the launch.
        step: its number.
        folder: for the file of the batches; None saves nothing.
        seed: of the run.
        metadata: of the run, saved with the batches.

    Returns:
        What is not finite, and the command that runs the saved batches again.
    """
    what, process = describe_reports(gather_object([inspect_step(terms, batches, model)]))
    statistics.restore()
    if folder is None:
        return what
    several = accelerator.num_processes > 1
    own_path, bad_path = (
        folder / f"nonfinite-{step}{f'-process{rank}' if several else ''}.pt"
        for rank in (accelerator.process_index, process)
    )
    origin = {"process": accelerator.process_index, "facts": metadata, "seed": seed}
    try:
        save_batch(own_path, step=step, batches=batches, model=model, **origin)
    except StorageError as error:
        return f"{what}; the batch is not saved ({error})"
    return f"{what}; the batch is saved, see `python -m brs_detr replay {bad_path}`"


def save_batch(
    path: Path, *, seed: int, step: int, process: int, batches: list[Batch], model: nn.Module, facts: dict[str, Any]
) -> None:
    """Save what reproduces a failed step: images, targets, seed, the run's metadata and the weights before the step.

    Every process calls it, since sharded weights are gathered. `torch.load(path, weights_only=True)` reads it back as
    {"seed", "step", "process", "facts", "weights", "batches"}, each batch with the fields of an `ImageBatch` and its
    "targets". `python -m brs_detr replay` runs it again.

    Raises:
        StorageError: the file cannot be written.
    """
    stored = [
        {"pixels": i.pixels.cpu(), "sizes": i.sizes, "original_sizes": i.original_sizes, "targets": targets}
        for i, targets in batches
    ]
    weights = {name: full_tensor(tensor).cpu() for name, tensor in model.state_dict().items()}
    origin = {"seed": seed, "step": step, "process": process, "facts": facts}
    content = io.BytesIO()  # writing to a file itself, torch hides why the disk refuses
    torch.save({**origin, "batches": stored, "weights": weights}, content)
    write_file(path, lambda file: file.write(content.getbuffer()))


def _ids(targets: list[dict[str, Any]]) -> str:
    """List the image ids of targets."""
    return ", ".join(str(int(target["image_id"])) for target in targets)
