"""Checks of the losses' arguments, and the precision in which the losses are computed.

Shapes, types and settings are always checked. Values are checked on a CPU, where reading them costs nothing; on a GPU
reading one would make the host wait, so a device-side assertion ends the process there, as it does for a bad index.
Nothing is checked while a graph is being compiled.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def check_values(holds: Tensor, message: Callable[[], str]) -> None:
    """Raise unless a condition on tensor values holds, without waiting for a device.

    Args:
        holds: () bool.
        message: returns the error's text; called on a CPU only, and only if the condition is False.

    Raises:
        ValueError: on a CPU. On CUDA a device-side assertion fails instead.
    """
    if torch.compiler.is_compiling():
        return
    if holds.device.type == "cpu":
        if not holds:
            raise ValueError(message())
    elif holds.device.type == "cuda":
        torch._assert_async(holds, "brs_detr.losses: invalid labels or positives. Run on the CPU to see which.")


def check_number(name: str, value: float, minimum: float = 0.0, below: float = float("inf")) -> None:
    """Raise unless a setting is a number in [minimum, below).

    Raises:
        ValueError: naming the setting.
    """
    if not minimum <= value < below:  # a NaN compares as False
        limit = "finite" if below == float("inf") else f"below {below:g}"
        raise ValueError(f"{name}: {value} is out of range. Give a number that is at least {minimum:g} and {limit}.")


def check_indices(positives: Tensor, logits: Tensor) -> None:
    """Raise unless the positives can index one ranking (P,), or L of them (L, P), of logits (L, ...).

    Raises:
        ValueError: saying which shapes do.
    """
    if positives.ndim not in (1, 2) or positives.dtype != torch.int64:
        raise ValueError(
            f"positives: {positives.dtype} of shape {tuple(positives.shape)} cannot index the logits. Give (P,) "
            "torch.int64 indices into logits.flatten(), or (L, P) for L rankings."
        )
    if positives.ndim == 2 and (logits.ndim < 2 or len(logits) != len(positives) or len(logits) == 0):
        raise ValueError(
            f"positives: shape {tuple(positives.shape)} names the positives of {len(positives)} rankings for logits of "
            f"shape {tuple(logits.shape)}. Give both the same first dimension, of at least 1, or (P,) positives of one "
            "ranking."
        )


def check_positives(positives: Tensor, length: int, valid: Tensor | None) -> None:
    """Raise if an index is out of range, occurs twice in a ranking, or belongs to an ignored entry.

    Args:
        positives: (L, P) indices into the logits of each ranking.
        length: number of logits of a ranking.
        valid: (L, length) bool or None.

    Raises:
        ValueError: naming the first invalid index.
    """
    if positives.numel() == 0:
        return
    ordered = positives.sort()[0]
    if positives.device.type == "cpu":  # a GPU asserts this by itself, where the index is used
        low, high = ordered[:, 0].min(), ordered[:, -1].max()
        check_values(
            (low >= 0) & (high < length),
            lambda: (
                f"positives: index {int(low if low < 0 else high)} is out of range for {length} "
                "logits. Give indices into logits.flatten()."
            ),
        )
    repeated = ordered[:, 1:] == ordered[:, :-1]
    check_values(
        ~repeated.any(),
        lambda: f"positives: index {int(ordered[:, 1:][repeated][0])} occurs twice. Give every positive once.",
    )
    if valid is not None:
        counted = valid.gather(1, positives)
        check_values(
            counted.all(),
            lambda: (
                f"positives: index {int(positives[~counted][0])} is ignored by valid. "
                "Drop it from positives, or set valid there."
            ),
        )


def check_quality(quality: Tensor) -> None:
    """Raise if a quality is no fraction; on a CPU only, for the operations that it takes. A NaN makes the loss NaN.

    Args:
        quality: (P,) or (L, P).

    Raises:
        ValueError: naming the value that is farthest from 0.5.
    """
    if quality.device.type != "cpu" or quality.numel() == 0:
        return
    # An IoU may exceed 1 by the rounding of half precision.
    outside = ((quality.detach().float() - 0.5).abs() - 0.5).nan_to_num(nan=0.0)
    check_values(
        outside.max() <= 1e-2,
        lambda: f"quality: {quality.flatten()[outside.argmax()]:.4g} is not in [0, 1]. Give the IoU of each positive.",
    )


def check_set(
    logits: Tensor, labels: Tensor, valid: Tensor | None, rows: Tensor | None, ignored: Tensor | None = None
) -> None:
    """Raise if the shapes or types of a prediction set do not match.

    Args:
        logits: (N, columns). labels: (N,) int64. valid: (N,) bool or None. rows: (P,) int64 or None. ignored: (N,
            columns) bool or None. All of them may have a leading dimension L >= 1.

    Raises:
        ValueError: naming the argument.
    """
    if logits.ndim not in (2, 3) or (logits.ndim == 3 and len(logits) == 0):
        raise ValueError(
            f"logits: shape {tuple(logits.shape)} is not (N, C) or (L, N, C). Flatten images and levels into N rows."
        )
    shape = tuple(logits.shape[:-1])
    for name, value, dtype in (("labels", labels, torch.int64), ("valid", valid, torch.bool)):
        if value is not None and (value.shape != shape or value.dtype != dtype):
            raise ValueError(
                f"{name}: {value.dtype} of shape {tuple(value.shape)} does not match logits of shape "
                f"{tuple(logits.shape)}. Give {shape} {dtype}."
            )
    if ignored is not None and (ignored.shape != logits.shape or ignored.dtype != torch.bool):
        raise ValueError(
            f"ignored: {ignored.dtype} of shape {tuple(ignored.shape)} does not match logits of shape "
            f"{tuple(logits.shape)}. Give torch.bool of their shape."
        )
    if rows is not None and (rows.shape[:-1] != shape[:-1] or rows.ndim != len(shape) or rows.dtype != torch.int64):
        raise ValueError(
            f"rows: {rows.dtype} of shape {tuple(rows.shape)} cannot index rows of logits of shape "
            f"{tuple(logits.shape)}. Give {'(P,)' if len(shape) == 1 else f'({shape[0]}, P)'} torch.int64."
        )


def check_labels(labels: Tensor, classes: int, valid: Tensor | None, rows: Tensor) -> None:
    """Raise if a label is out of range, or a row listed as positive is background or ignored.

    Args:
        labels: (L, N) int64; `classes` is the background.
        classes: number of classes.
        valid: (L, N) bool or None; ignored rows may have any label.
        rows: (L, P) int64 rows of the positives.

    Raises:
        ValueError: naming the first such row and its label.
    """

    def name(layer: Tensor, row: Tensor) -> str:
        return f"row {int(row)}" if len(labels) == 1 else f"row {int(row)} of set {int(layer)}"

    known = labels.clamp(0, classes) == labels
    if valid is not None:
        known = known | ~valid

    def describe_unknown() -> str:
        layer, row = (~known).nonzero()[0]
        return (
            f"labels: {name(layer, row)} has label {int(labels[layer, row])}. Give 0 to {classes - 1} for {classes} "
            f"classes, {classes} for background, and mark ignored rows in valid."
        )

    check_values(known.all(), describe_unknown)
    own = labels.gather(1, rows)
    positive = own.clamp(0, classes - 1) == own
    if valid is not None:
        positive = positive & valid.gather(1, rows)

    def describe_negative() -> str:
        layer, place = (~positive).nonzero()[0]
        return (
            f"rows: {name(layer, rows[layer, place])} has label {int(own[layer, place])} and is background or ignored. "
            f"Name only rows with a label of 0 to {classes - 1} that valid does not ignore."
        )

    check_values(positive.all(), describe_negative)


def check_per_positive(name: str, values: Tensor, positives: Tensor) -> None:
    """Raise unless there is one value per positive.

    Raises:
        ValueError: naming the values.
    """
    if values.shape != positives.shape:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} for positives of shape {tuple(positives.shape)}. "
            "Give one value per positive."
        )


def check_subset(name: str, values: Tensor, chosen: Tensor, count: int) -> None:
    """Raise unless there is one value for each of some distinct positives.

    Args:
        name: of the values.
        values: (S,).
        chosen: (S,) int64, positions among the positives.
        count: number of positives.

    Raises:
        ValueError: naming the values.
    """
    if chosen.ndim != 1 or chosen.dtype != torch.int64 or values.shape != chosen.shape:
        raise ValueError(
            f"{name}: values of shape {tuple(values.shape)} and chosen positives of {chosen.dtype} and shape "
            f"{tuple(chosen.shape)} do not match. Give (S,) values and (S,) torch.int64."
        )
    if len(chosen) > count:
        raise ValueError(f"{name}: {len(chosen)} values are too many for {count} positives. Give at most one each.")
    if len(chosen) and chosen.device.type == "cpu":  # a GPU asserts by itself that an index is in range
        ordered = chosen.sort()[0]
        distinct = (ordered[0] >= 0) & (ordered[-1] < count) & (ordered[1:] > ordered[:-1]).all()
        check_values(
            distinct, lambda: f"{name}: chosen repeats a positive or has none of 0 to {count - 1}. Name each once."
        )


# Device types on which torch has no float64.
WITHOUT_FLOAT64 = ("mps",)


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the type that a ranking's sums are accumulated in: float64, or float32 on a device without it.

    Sums over a few logits are taken as differences of running sums over all of them, which leave few digits in float32.
    """
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def single_or_wider(logits: Tensor) -> Tensor:
    """Cast logits to float32, unless they are float64 already; differentiable.

    The gradient is cast back to the type of the input. For float16 logits many entries, about 1 / (P rank), are then
    smaller than any float16 number and become 0, unless the loss is scaled first, as a GradScaler does. Under autocast
    a scaler is expected; outside of it a warning is issued.
    """
    half = logits.dtype == torch.float16 and logits.requires_grad and not torch.compiler.is_compiling()
    if half and not torch.is_autocast_enabled(logits.device.type):
        warnings.warn(
            "logits: many gradients of a ranking loss are too small for float16 and become 0. Use bfloat16 or "
            "float32, or multiply the loss (torch.amp.GradScaler); logits.float() silences this warning.",
            stacklevel=4,
        )
    return logits if logits.dtype == torch.float64 else logits.float()
