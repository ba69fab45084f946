"""What the losses refuse.

Shapes, types and settings are always checked. Values are checked where they can be read for nothing, on a CPU; on a GPU
reading one would make the host wait, so an assertion runs there instead and ends the process as a bad index does.
Nothing is checked while a graph is being compiled.

In which precision the losses are computed, and what that means for the precision of their inputs.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def demand(holds: Tensor, message: Callable[[], str]) -> None:
    """Refuse values without waiting for a device.

    Args:
        holds: () bool.
        message: called where it is False and can be read.

    Raises:
        ValueError: on a CPU, with the message. On CUDA the device asserts.
    """
    if torch.compiler.is_compiling():
        return
    if holds.device.type == "cpu":
        if not holds:
            raise ValueError(message())
    elif holds.device.type == "cuda":
        torch._assert_async(holds, "brs_detr.losses: labels or positives are wrong; a run on the CPU names the value")


def check_number(name: str, value: float, least: float = 0.0, below: float = float("inf")) -> None:
    """Refuse a setting that is not a number, or lies outside [least, below).

    Raises:
        ValueError: naming the setting.
    """
    if not least <= value < below:
        limit = "finite" if below == float("inf") else f"below {below:g}"
        raise ValueError(f"{name}: {value} is out of range. Give a number that is at least {least:g} and {limit}.")


def check_positives(positives: Tensor, length: int, valid: Tensor | None) -> None:
    """Refuse indices that are out of range, double, or of ignored entries.

    Args:
        positives: indices into the flat logits.
        length: number of logits.
        valid: (length,) bool or None.

    Raises:
        ValueError: naming the first wrong index.
    """
    if positives.ndim != 1 or positives.dtype != torch.int64:
        shape = tuple(positives.shape)
        raise ValueError(
            f"positives must be (P,) int64 indices into logits.flatten(), got {positives.dtype} of shape {shape}"
        )
    if len(positives) == 0:
        return
    ordered = positives.sort()[0]
    if positives.device.type == "cpu":  # a GPU asserts this by itself, where the index is used
        inside = (ordered[0] >= 0) & (ordered[-1] < length)
        demand(
            inside,
            lambda: (
                f"positives: index {int(ordered[0] if ordered[0] < 0 else ordered[-1])} is out of range for {length} "
                "logits. Give indices into logits.flatten()."
            ),
        )
    double = ordered[1:] == ordered[:-1]
    demand(
        ~double.any(),
        lambda: f"positives: index {int(ordered[1:][double][0])} occurs twice. Give every positive once.",
    )
    if valid is not None:
        counted = valid.index_select(0, positives)
        demand(
            counted.all(),
            lambda: (
                f"positives: index {int(positives[~counted][0])} is ignored by valid. "
                "Drop it from positives, or set valid there."
            ),
        )


def check_set(logits: Tensor, labels: Tensor, valid: Tensor | None, rows: Tensor | None) -> None:
    """Refuse the shapes and types of a prediction set that do not fit.

    Args:
        logits: (N, columns). labels: (N,) int64. valid: (N,) bool or None. rows: (P,) int64 or None.

    Raises:
        ValueError: naming the argument.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: shape {tuple(logits.shape)} is not (N, C). Flatten images and levels into N rows.")
    for name, value, kind in (("labels", labels, torch.int64), ("valid", valid, torch.bool)):
        if value is not None and (value.shape != logits.shape[:1] or value.dtype != kind):
            raise ValueError(
                f"{name}: {value.dtype} of shape {tuple(value.shape)} does not fit {len(logits)} rows of logits. "
                f"Give ({len(logits)},) {kind}."
            )
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64):
        raise ValueError(
            f"rows: {rows.dtype} of shape {tuple(rows.shape)} cannot index rows of logits. Give (P,) torch.int64."
        )


def check_labels(labels: Tensor, classes: int, valid: Tensor | None, rows: Tensor) -> None:
    """Refuse labels that no class, and not the background, has, and positive rows that are none.

    Args:
        labels: (N,) int64; `classes` is the background.
        classes: number of classes.
        valid: (N,) bool or None; the labels of ignored rows are free.
        rows: (P,) int64 rows of the positives.

    Raises:
        ValueError: naming the first wrong row and its label.
    """
    known = labels.clamp(0, classes) == labels
    if valid is not None:
        known = known | ~valid

    def unknown() -> str:
        row = int((~known).nonzero()[0])
        return (
            f"labels: row {row} has label {int(labels[row])}. Give 0 to {classes - 1} for {classes} classes, {classes} "
            "for background, and mark ignored rows in valid."
        )

    demand(known.all(), unknown)
    own = labels[rows]
    positive = own.clamp(0, classes - 1) == own
    if valid is not None:
        positive = positive & valid[rows]

    def negative() -> str:
        first = int((~positive).nonzero()[0])
        return (
            f"rows: row {int(rows[first])} has label {int(own[first])} and is background or ignored. "
            f"Name only rows with a label of 0 to {classes - 1} that valid does not ignore."
        )

    demand(positive.all(), negative)


def check_per_positive(name: str, values: Tensor, positives: Tensor) -> None:
    """Refuse per-positive values that do not fit the positives.

    Raises:
        ValueError: naming the values.
    """
    if values.shape != positives.shape:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} for {len(positives)} positives: give one value per positive"
        )


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
