"""Prediction over a dataset.

Every image is predicted in one of the processes; the detections are gathered by image id without duplicates, and the
evaluation refuses a set with an image missing. The detector computes in full float32 whatever it trains in: under bf16
the rounding of an image depends on the size of its batch, and scores that round to one value have no order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from brs_detr.engine.compilation import uncompiled
from brs_detr.engine.distributed import raise_together
from brs_detr.exit_codes import Interruption
from brs_detr.models.detector import Detector
from brs_detr.models.ensemble import Ensemble
from brs_detr.ops.images import Batch, ImageBatch
from brs_detr.ops.masks import as_rles
from brs_detr.threads import shared_by_threads

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
    """Detect objects in every image, and gather the detections over all processes.

    Args:
        model: the detector, not wrapped in DDP: processes may have different numbers of batches. Its masks are
            compressed run lengths of the original image, as `ops.masks.paste_and_encode` makes them, or (n, h, w) bool.
        batches: of this process, with targets that have "image_id" and, if the image is a placeholder for one that
            cannot be read, "unreadable".
        accelerator: of the launch.
        score_threshold: detections at or below it are dropped, unless it is 0.
        max_detections: largest number of detections per image, the best ones.
        progress: show a bar in the main process if there is a terminal.

    Returns:
        One dict per image, ascending by "image_id", in every process: "boxes" (n, 4) float32 xyxy pixels of the
        original image, "scores" (n,) float32 descending, "labels" (n,) int64, all numpy, "masks" if the detector
        returns them, n compressed run lengths, and "unreadable" (bool): such an image has no detections.

    Raises:
        Interruption: in every process, if the batches of one were interrupted.
    """
    detect = without_autocast(model)
    outputs = _predict(
        lambda images: {"": detect(images, None)},
        model,
        batches,
        accelerator,
        score_threshold=score_threshold,
        max_detections=max_detections,
        progress=progress,
    )
    return outputs.get("", [])


@torch.no_grad()
def predict_with_all_heads(
    model: Detector,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    *,
    score_threshold: float = 0.0,
    max_detections: int | None = 100,
    progress: bool = False,
) -> dict[str, list[Detections]]:
    """Detect objects with every head of a detector, which share its features; arguments and lists as for `predict`.

    With `max_detections` None, all that a head returns is kept.
    """
    return _predict(
        model.detect_with_all_heads,
        model,
        batches,
        accelerator,
        score_threshold=score_threshold,
        max_detections=max_detections,
        progress=progress,
    )


def _predict(
    detect: Callable[[ImageBatch], dict[str, list[dict[str, Any]]]],
    model: nn.Module,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    *,
    score_threshold: float,
    max_detections: int | None,
    progress: bool,
) -> dict[str, list[Detections]]:
    training = model.training
    model.eval()
    detections: dict[str, list[Detections]] = {}
    interruption: Interruption | None = None
    bar = tqdm(batches, desc="validation", leave=False, disable=None if progress else True)
    try:
        for images, targets in bar:
            with full_float32(), uncompiled(model):
                by_head = detect(images.to(accelerator.device))
            for head, outputs in by_head.items():
                for target, output in zip(targets, outputs, strict=True):
                    unreadable = bool(target.get("unreadable"))
                    kept = _to_host(output, score_threshold, 0 if unreadable else max_detections)
                    entry = {"image_id": int(target["image_id"]), "unreadable": unreadable, **kept}
                    detections.setdefault(head, []).append(entry)
    except Interruption as error:
        interruption = error
    finally:
        model.train(training)
    raise_together(interruption, accelerator)
    if accelerator.num_processes > 1:
        parts = gather_object([detections])  # at once: a process without a batch has no heads to name
        heads = dict.fromkeys(head for part in parts for head in part)
        detections = {head: [entry for part in parts for entry in part.get(head, [])] for head in heads}
    # Once per image, even if two processes predicted it.
    unique = {head: {entry["image_id"]: entry for entry in entries} for head, entries in detections.items()}
    return {head: [entries[image_id] for image_id in sorted(entries)] for head, entries in unique.items()}


def join_heads(by_head: Mapping[str, Sequence[Detections]], ensemble: Ensemble, nms_iou: float) -> list[Detections]:
    """Join the detections of all heads, lists as `predict` returns them, as the detector itself does with each image.

    Args:
        by_head: the detections, all that the heads return.
        ensemble: what a validation has learned of the heads.
        nms_iou: as for `Ensemble.join`.
    """
    joined = []
    for images in zip(*by_head.values(), strict=True):
        tensors = {
            head: {key: torch.from_numpy(own[key]) for key in ("boxes", "scores", "labels")}
            for head, own in zip(by_head, images, strict=True)
        }
        kept = _to_host(ensemble.join(tensors, nms_iou), 0.0, None)
        joined.append({"image_id": images[0]["image_id"], "unreadable": images[0]["unreadable"], **kept})
    return joined


def limited(detections: Sequence[Detections], score_threshold: float, max_detections: int) -> list[Detections]:
    """Return the best `max_detections` of each image, without those at or below a threshold, unless it is 0."""
    kept = []
    for own in detections:
        keep = _above(own["scores"][:max_detections], score_threshold)
        cut = {key: own[key][:max_detections][keep] for key in ("boxes", "scores", "labels")}
        kept.append({**own, **cut})
    return kept


def without_autocast(model: nn.Module) -> Callable[..., Any]:
    """Return the class's forward pass, without the autocast with which Accelerate wraps that of the instance."""
    return partial(type(model).forward, model) if "forward" in vars(model) else model


@shared_by_threads
@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 inside: on a GPU, products then do not round their float32 inputs."""
    libraries: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    allowed = [library.allow_tf32 for library in libraries]
    try:
        for library in libraries:
            library.allow_tf32 = False
        yield
    finally:
        for library, value in zip(libraries, allowed, strict=True):
            library.allow_tf32 = value


def _to_host(output: dict[str, Any], threshold: float, max_detections: int | None) -> Detections:
    """Sort, limit and threshold the detections of one image, as numpy arrays."""
    # Stable, so that detections of equal score keep the model's order in every run.
    sorted_scores, order = output["scores"].float().sort(descending=True, stable=True)
    order = order[:max_detections]
    boxes, labels = output["boxes"].float()[order].cpu().numpy(), output["labels"][order].cpu().numpy()
    scores = sorted_scores[:max_detections].cpu().numpy()
    keep = _above(scores, threshold)
    detections = {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}
    if "masks" in output:
        kept, masks = order[torch.from_numpy(keep).to(order.device)], output["masks"]
        detections["masks"] = as_rles(masks[kept] if isinstance(masks, Tensor) else [masks[i] for i in kept.tolist()])
    return detections


def _above(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Return (n,) bool, True for scores above a threshold, or for all if it is 0."""
    return scores > threshold if threshold > 0 else np.ones(len(scores), dtype=bool)


def require_all(detections: Sequence[Detections], image_ids: Iterable[int]) -> None:
    """Raise if an image of the dataset was not predicted, or one that is not of the dataset was.

    Raises:
        RuntimeError: naming the first such images.
    """
    predicted, expected = {entry["image_id"] for entry in detections}, set(image_ids)
    if predicted != expected:
        missing, unknown = sorted(expected - predicted)[:5], sorted(predicted - expected)[:5]
        raise RuntimeError(
            f"{len(predicted)} images were predicted but the dataset has {len(expected)}: "
            f"missing {missing or 'none'}, not in the dataset {unknown or 'none'}"
        )
