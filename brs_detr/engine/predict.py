"""Running a detector over a dataset.

Every image is predicted once in some process; the main process gathers the detections by image id, drops duplicates
and refuses to score a set with an image missing. The detector computes in full float32 whatever it trains in: under
bf16 the rounding of an image depends on how many share its batch, and scores that round to one value are in any order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from brs_detr.engine.distributed import raise_together
from brs_detr.exit_codes import Interruption
from brs_detr.ops.images import Batch

Detections = dict[str, Any]


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    *,
    score_threshold: float = 0.0,
    max_detections: int = 100,
    progress: bool = False,
) -> list[Detections]:
    """Detections of every image, gathered over all processes.

    Args:
        model: the bare detector (not wrapped for DDP: processes may hold different numbers of batches).
        batches: of this process, with targets that carry "image_id" and, where the image is only a stand-in for
            one that cannot be read, "unreadable".
        accelerator: of the launch; gives device and gathering.
        score_threshold: detections at or below it are dropped, unless it is 0.
        max_detections: most detections an image, the best ones.
        progress: show a bar in the main process where there is a terminal.

    Returns:
        One dict an image, ascending by "image_id", in every process: "boxes" (n, 4) float32 xyxy pixels of the
        original image, "scores" (n,) float32 descending, "labels" (n,) int64, all numpy, and "unreadable" (bool):
        nothing is found on such an image.

    Raises:
        Interruption: in every process, where the batches of one were interrupted.
    """
    training = model.training
    model.eval()
    detect, found, interruption = without_autocast(model), [], None
    bar = tqdm(batches, desc="validation", leave=False, disable=None if progress else True)
    try:
        for images, targets in bar:
            with full_float32():
                outputs = detect(images.to(accelerator.device), None)
            for target, output in zip(targets, outputs, strict=True):
                unreadable = bool(target.get("unreadable"))
                kept = _to_host(output, score_threshold, 0 if unreadable else max_detections)
                found.append({"image_id": int(target["image_id"]), "unreadable": unreadable, **kept})
    except Interruption as error:
        interruption = error
    finally:
        model.train(training)
    raise_together(interruption, accelerator)
    if accelerator.num_processes > 1:
        found = gather_object(found)
    unique = {detections["image_id"]: detections for detections in found}
    return [unique[image_id] for image_id in sorted(unique)]


def without_autocast(model: nn.Module) -> Callable:
    """The detector's own forward pass: Accelerate puts one under autocast in its place, in the instance alone."""
    return partial(type(model).forward, model) if "forward" in vars(model) else model


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """On a GPU no product rounds its float32 inputs to TF32 inside."""
    libraries = (torch.backends.cuda.matmul, torch.backends.cudnn)
    allowed = [library.allow_tf32 for library in libraries]
    try:
        for library in libraries:
            library.allow_tf32 = False
        yield
    finally:
        for library, value in zip(libraries, allowed, strict=True):
            library.allow_tf32 = value


def _to_host(output: dict[str, torch.Tensor], threshold: float, max_detections: int) -> Detections:
    scores, order = output["scores"].float().sort(descending=True, stable=True)
    order = order[:max_detections]
    boxes, labels = output["boxes"].float()[order].cpu().numpy(), output["labels"][order].cpu().numpy()
    scores = scores[:max_detections].cpu().numpy()
    keep = scores > threshold if threshold > 0 else np.ones(len(scores), dtype=bool)
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


def require_all(detections: Sequence[Detections], image_ids: Iterable[int]) -> None:
    """Refuse an evaluation in which an image of the dataset was not predicted, or a foreign one was.

    Raises:
        RuntimeError: naming the first such images.
    """
    predicted, wanted = {found["image_id"] for found in detections}, set(image_ids)
    if predicted != wanted:
        missing, foreign = sorted(wanted - predicted)[:5], sorted(predicted - wanted)[:5]
        raise RuntimeError(
            f"{len(predicted)} images were predicted but the dataset has {len(wanted)}: "
            f"missing {missing or 'none'}, foreign {foreign or 'none'}"
        )
