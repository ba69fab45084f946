"""A detector and everything that its detections need: resizing, calibrated scores, thresholds and class names.

    predictor = Predictor.load("runs/demo")
    found = predictor.predict("image.jpg")

The command `predict` and `brs_detr.load` use it, so they find the same.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeAlias, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brs_detr.config import Config, ConfigError
from brs_detr.data.build import build_eval_transforms
from brs_detr.data.config import Limits
from brs_detr.data.image_io import ImageError, image_pixels, read_image
from brs_detr.data.loader import to_batch
from brs_detr.data.transforms import EvalTransforms, MultiScaleTransforms
from brs_detr.detections import Detections
from brs_detr.engine.predict import full_float32
from brs_detr.engine.tiled import join_outputs
from brs_detr.evaluation.calibration import Calibration
from brs_detr.export.runtime import ExportedFile
from brs_detr.models.detector import Detector
from brs_detr.ops.images import ImageBatch, ImageViews, Size
from brs_detr.ops.masks import as_rles, decode_masks
from brs_detr.ops.tiles import Tile, tile_grid
from brs_detr.run.launch import choose_device
from brs_detr.run.setup import calibration_of, restore, unused_nms
from brs_detr.run.weights import score_thresholds
from brs_detr.viz.boxes import draw_detections

ImageInput: TypeAlias = "str | PathLike[str] | Image.Image | np.ndarray | Tensor"
WINDOW = 8  # batches


def images_at_once(batch_size: int) -> int:
    """Return how many images are held at once, to find some of one size among them for a batch.

    Raises:
        ValueError: the batch size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1.")
    return batch_size * WINDOW


def require_threshold(threshold: float | None) -> None:
    """Refuse a minimum score that is no score: one in percent, or one for each class.

    Raises:
        ValueError: it is neither None nor a number in [0, 1].
    """
    try:
        usable = threshold is None or 0 <= float(threshold) <= 1  # a NaN compares as False
    except (TypeError, ValueError):
        usable = False
    if not usable:
        shown = " ".join(str(threshold).split())[:40]
        raise ValueError(f"threshold={shown}: scores lie between 0 and 1. Give one number for all classes, as 0.5.")


class Engine(Protocol):
    """What runs a detector: torch, or onnxruntime on an exported file."""

    def resize(self, image: Tensor) -> list[Tensor]:
        """Resize a (3, h, w) uint8 image to its test size, or to each of them."""

    def content_sizes(self, size: Size) -> tuple[Size, ...] | None:
        """Return (h, w) of an image of (h, w) = `size` inside the canvas of each of them; None without a canvas."""

    def thresholds(self, raw_scores: bool = False) -> np.ndarray:
        """Return the minimum score (K,) of each class."""

    def __call__(self, batch: ImageBatch | ImageViews, raw_scores: bool = False) -> list[dict[str, Any]]:
        """Detect objects: of each image `boxes` (n, 4) in the stored image's pixels, `scores`, `labels`, `masks`."""


class Predictor:
    """A detector that takes images as they are and returns `Detections`.

    Args:
        engine: runs the detector.
        classes: name of each label.
        category_ids: the dataset's id of each label.
        limits: on files that are read.
        source: file that it was loaded from.
        note: why scores are not calibrated; "" if they are.
        remark: which setting of these weights has no effect on the head that predicts; "" if none.
        config: of the weights; None for an exported file, whose settings are fixed.
    """

    def __init__(
        self,
        engine: Engine,
        classes: Sequence[str],
        category_ids: Sequence[int],
        limits: Limits,
        source: Path,
        note: str = "",
        config: Config | None = None,
        remark: str = "",
    ) -> None:
        self.engine, self.limits, self.source, self.note, self.config = engine, limits, source, note, config
        self.remark = remark
        self.classes, self.category_ids = list(classes), list(category_ids)

    @classmethod
    def load(
        cls, source: str | PathLike[str], *, device: str | None = None, overrides: Sequence[str] = ()
    ) -> Predictor:
        """Load a run folder, a weights file, an official Co-DETR checkpoint or an exported file.

        Args:
            source: run folder (its best weights, else its last), `.safetensors`, official `.pth`, or `.onnx`.
            device: such as "cpu" or "cuda:1"; None: a GPU if there is one.
            overrides: `a.b=value` applied to the stored settings, e.g. "eval.predict_with=roi".

        Raises:
            CheckpointError: there is no usable file.
            ConfigError: a setting cannot be used, or this machine has no such device.
            ExportError: the exported file cannot be used here.
        """
        path = Path(source)
        if path.suffix.lower() == ".onnx":
            if overrides:
                raise ConfigError(f"{path}: settings of an exported file are fixed. Change them when exporting.")
            return cls._of_exported(path, device)
        model, weights, config, file = restore(path, overrides)
        calibration, note = calibration_of(model, weights, config, file)
        thresholds = score_thresholds(model, weights, None)
        transforms = build_eval_transforms(config.data, config.eval.test_scales)
        engine = TorchEngine(model, choose_device(device), transforms, calibration, thresholds)
        remark = unused_nms(model, config)
        return cls(engine, weights.classes, weights.category_ids, config.data, file, note, config, remark)

    @classmethod
    def _of_exported(cls, path: Path, device: str | None) -> Predictor:
        file = ExportedFile(path, device)
        note = "" if file.calibration else f"scores are not calibrated: {path} holds no map"
        return cls(OnnxEngine(file), file.classes, file.category_ids, Limits(), path, note)

    def __repr__(self) -> str:
        names = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
        return f"Predictor of {self.source}: {len(self.classes)} classes ({names})"

    @property
    def calibrated(self) -> bool:
        """Whether scores are precisions; `note` says why not."""
        return not self.note

    def thresholds(self, raw_scores: bool = False) -> np.ndarray:
        """Return the minimum score (K,) float64 of each class: that of its best F1 in the last validation."""
        return self.engine.thresholds(raw_scores)

    @overload
    def predict(  # type: ignore[overload-overlap] # a str is a sequence of str, but the first case comes first
        self, images: ImageInput, *, threshold: float | None = None, batch_size: int = 1, raw_scores: bool = False
    ) -> Detections: ...

    @overload
    def predict(
        self,
        images: Sequence[ImageInput],
        *,
        threshold: float | None = None,
        batch_size: int = 1,
        raw_scores: bool = False,
    ) -> list[Detections]: ...

    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        threshold: float | None = None,
        batch_size: int = 1,
        raw_scores: bool = False,
    ) -> Detections | list[Detections]:
        """Detect objects in an image or in a list of images.

        Args:
            images: path, PIL image, (h, w, 3) or (h, w) uint8 RGB array, or (3, h, w) uint8 RGB tensor; or a list or
                tuple of them. Files are read as those of a dataset: an EXIF rotation is not applied.
            threshold: minimum score, in [0, 1]; None: of each class the score of its best F1 in validation.
            batch_size: images that are computed at once; it does not change what is found. Only images of one size
                after resizing share a batch, since padding would change their features.
            raw_scores: scores as the detector's, not calibrated.

        Returns:
            The detections of the image; for a list, a list.

        Raises:
            ImageError: an image cannot be read or used.
            ValueError: the batch size is not positive, or the threshold not in [0, 1].
        """
        options: dict[str, Any] = {"threshold": threshold, "batch_size": batch_size, "raw_scores": raw_scores}
        if isinstance(images, (list, tuple)):
            return list(self.stream(images, **options))
        [found] = self.stream([images], **options)  # type: ignore[list-item] # no list, so one image
        return found

    def stream(
        self,
        images: Iterable[ImageInput],
        *,
        threshold: float | None = None,
        batch_size: int = 1,
        raw_scores: bool = False,
    ) -> Iterator[Detections]:
        """Iterate over the detections of images that need not fit into memory, in their order; as for `predict`.

        Raises:
            TypeError: `images` is the path of one image.
        """
        require_threshold(threshold)
        if isinstance(images, (str, PathLike)):
            raise TypeError(f"{images}: stream takes several images. Give a list, or use predict for one.")
        count, remaining = images_at_once(batch_size), iter(images)
        while window := [self.pixels(image) for image in islice(remaining, count)]:
            for image, output in zip(window, self._detect(window, batch_size, raw_scores), strict=True):
                yield self._select(output, (image.shape[1], image.shape[2]), threshold, raw_scores)

    def predict_tiles(
        self,
        image: ImageInput,
        tile: int | tuple[int, int],
        *,
        overlap: float = 0.2,
        whole_image: bool = False,
        threshold: float | None = None,
        batch_size: int = 1,
        raw_scores: bool = False,
    ) -> Detections:
        """Detect objects in the tiles of a large image, and join them; an image smaller than a tile is predicted as is.

        Args:
            image: as for `predict`.
            tile: (width, height) of a tile in pixels of the image, or one number for both.
            overlap: share of a tile's side that neighbors have in common; objects of that size are seen completely.
            whole_image: also look at the image as a whole, for objects larger than a tile.
            threshold, batch_size, raw_scores: as for `predict`; the batches are of tiles.

        Raises:
            ImageError: the image cannot be read or used.
            ValueError: the tile is too small, the overlap too large, or the threshold not in [0, 1].
            TypeError: the tile is no whole number, nor two.
        """
        require_threshold(threshold)
        count, pixels = images_at_once(batch_size), self.pixels(image)
        size = (pixels.shape[1], pixels.shape[2])
        width, height = (operator.index(side) for side in (tile if isinstance(tile, Sequence) else (tile, tile)))
        grid = tile_grid(size, (height, width), overlap)
        if whole_image and len(grid) > 1:
            grid.append(Tile(0, 0, size[1], size[0]))
        found: list[dict[str, Any]] = []
        for start in range(0, len(grid), count):
            chunk = grid[start : start + count]
            views = [pixels[:, one.y1 : one.y2, one.x1 : one.x2] for one in chunk]
            found += self._detect(views, batch_size, raw_scores)
        output = found[0] if len(grid) == 1 else join_outputs(found, grid, size, self._least(threshold, raw_scores))
        return self._select(output, size, threshold, raw_scores)

    def _least(self, threshold: float | None, raw_scores: bool) -> np.ndarray:
        """Return the minimum score (K,) of each class: `threshold`, or that of the best F1 in validation."""
        return self.thresholds(raw_scores) if threshold is None else np.full(len(self.classes), float(threshold))

    def draw(self, image: ImageInput, found: Detections) -> Image.Image:
        """Draw the detections of an image into a copy of it; small images are enlarged.

        Raises:
            ImageError: the image cannot be read or used.
        """
        return draw_detections(self.pixels(image), found.as_tensors(), None, self.classes, threshold=0.0)

    def pixels(self, image: ImageInput) -> Tensor:
        """Return the (3, h, w) uint8 RGB pixels of an image of any kind that `predict` takes.

        Raises:
            ImageError: it cannot be read, or is no image of 8 bits.
        """
        if isinstance(image, str) and re.match(r"[a-z]+://", image, re.IGNORECASE):  # a path would lose a slash of it
            raise ImageError("image: this is a URL, which only the command `predict` reads. Open it with PIL first.")
        if isinstance(image, (str, PathLike)):
            return read_image(Path(image), limits=self.limits)
        if isinstance(image, Image.Image):
            return image_pixels(image, getattr(image, "filename", "") or "image")
        if isinstance(image, np.ndarray):
            return _pixels_of_array(image)
        if isinstance(image, Tensor):
            if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
                shape = f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
                raise ImageError(f"image: a tensor must be uint8 (3, height, width), RGB, but this is {shape}.")
            return image.cpu()
        raise ImageError(
            f"image: {type(image).__name__} is no image. Give a path, a PIL image, a uint8 array (height, width, 3) or "
            "a uint8 tensor (3, height, width), or a list of them."
        )

    def _detect(self, images: Sequence[Tensor], batch_size: int, raw_scores: bool) -> list[dict[str, Any]]:
        """Run the detector on images, in batches of one resized size."""
        resized = [self.engine.resize(image) for image in images]
        groups: dict[tuple[torch.Size, ...], list[int]] = {}
        for index, views in enumerate(resized):
            groups.setdefault(tuple(view.shape for view in views), []).append(index)
        outputs: dict[int, dict[str, Any]] = {}
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                part = group[start : start + batch_size]
                stored = [(images[index].shape[1], images[index].shape[2]) for index in part]
                contents = [sizes for size in stored if (sizes := self.engine.content_sizes(size)) is not None]
                batch = to_batch([resized[index] for index in part], stored, contents or None)
                outputs.update(zip(part, self.engine(batch, raw_scores), strict=True))
        return [outputs[index] for index in range(len(images))]

    def _select(
        self, output: dict[str, Any], size: Size, threshold: float | None, raw_scores: bool = False
    ) -> Detections:
        """Select the detections from the threshold of their class on, the best first."""
        thresholds = self._least(threshold, raw_scores)
        # float64 as the map and the thresholds: a detection at the threshold is selected
        scores, labels = output["scores"].cpu().double().numpy(), output["labels"].cpu().numpy()
        order = np.argsort(-scores, kind="stable")
        chosen = order[scores[order] >= thresholds[labels[order]]]
        masks = None
        if "masks" in output:
            runs = as_rles(output["masks"])
            masks = decode_masks([runs[index] for index in chosen], size).numpy().astype(bool)
        return Detections(
            output["boxes"].cpu().float().numpy()[chosen],
            scores[chosen],
            labels[chosen],
            np.array(self.category_ids, np.int64)[labels[chosen]],
            [self.classes[label] for label in labels[chosen]],
            (size[1], size[0]),
            masks,
            "" if len(chosen) else self._best(scores, labels, order, thresholds),
        )

    def _best(self, scores: np.ndarray, labels: np.ndarray, order: np.ndarray, thresholds: np.ndarray) -> str:
        """Say what the best score was where none reaches its threshold."""
        if not len(order):
            return "the detector returned none"
        label = labels[order[0]]
        return (
            f"the best score is {scores[order[0]]:.3g}, of {self.classes[label]}, below its threshold "
            f"{thresholds[label]:.3g}"
        )


class TorchEngine:
    """A detector in torch.

    Args:
        model: in eval mode.
        device: to run on.
        transforms: of the test images.
        calibration: maps of the scores; None keeps them raw.
        raw_thresholds: minimum raw score of each class.
    """

    def __init__(
        self,
        model: Detector,
        device: torch.device,
        transforms: EvalTransforms | MultiScaleTransforms,
        calibration: Calibration | None,
        raw_thresholds: Sequence[float],
    ) -> None:
        self.model, self.device, self.transforms = model.to(device), device, transforms
        self.calibration, self.raw_thresholds = calibration, np.array(raw_thresholds)

    def resize(self, image: Tensor) -> list[Tensor]:
        """Resize a (3, h, w) uint8 image to its test size, or to each of them."""
        return self.transforms.views(image)

    def content_sizes(self, size: Size) -> tuple[Size, ...] | None:
        """Return (h, w) of an image of (h, w) = `size` inside the canvas of each of them; None without a canvas."""
        return self.transforms.content_sizes(*size)

    def thresholds(self, raw_scores: bool = False) -> np.ndarray:
        """Return the minimum score (K,) of each class."""
        is_raw = raw_scores or self.calibration is None
        return self.raw_thresholds if is_raw else np.array(self.calibration.thresholds)  # type: ignore[union-attr]

    @torch.inference_mode()
    def __call__(self, batch: ImageBatch | ImageViews, raw_scores: bool = False) -> list[dict[str, Any]]:
        """Detect objects in a batch of resized images."""
        with full_float32():
            outputs: Any = self.model(batch.to(self.device), None)
        if raw_scores or self.calibration is None:
            return list(outputs)
        return [
            {
                **output,
                "scores": torch.from_numpy(
                    self.calibration.apply(output["scores"].cpu().double().numpy(), output["labels"].cpu().numpy())
                ),
            }
            for output in outputs
        ]


class OnnxEngine:
    """An exported file in onnxruntime."""

    def __init__(self, file: ExportedFile) -> None:
        self.file, self.thresholds = file, file.thresholds
        self.resize = EvalTransforms(file.short_side, file.long_side, file.antialias, within=file.size).views

    def content_sizes(self, size: Size) -> None:
        """Return None: the file lays the image on its canvas itself, where it has one."""

    def __call__(self, batch: ImageBatch | ImageViews, raw_scores: bool = False) -> list[dict[str, Any]]:
        """Detect objects in a batch of resized images."""
        assert isinstance(batch, ImageBatch)  # `resize` makes one size
        return self.file(batch, raw_scores)


def _pixels_of_array(image: np.ndarray) -> Tensor:
    """Return the (3, h, w) pixels of a (h, w, 3) or gray (h, w) uint8 array.

    Raises:
        ImageError: it is of another shape or type.
    """
    gray = image.ndim == 2
    if image.dtype != np.uint8 or not (gray or (image.ndim == 3 and image.shape[2] == 3)) or 0 in image.shape:
        raise ImageError(
            f"image: an array must be uint8 (height, width, 3), RGB, or (height, width), but this is {image.dtype} "
            f"{image.shape}."
        )
    pixels = np.repeat(image[..., None], 3, axis=2) if gray else image
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # a copy: torch takes neither reversed nor locked arrays
