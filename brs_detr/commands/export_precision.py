"""The `--precision` of `export`: narrow a float32 file that has been checked, and compare what both find."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from brs_detr.config import Config, ConfigError
from brs_detr.data.annotations import read_images
from brs_detr.data.image_io import ImageError, is_image_name, read_image
from brs_detr.data.image_search import resolve_image_paths
from brs_detr.data.issues import IssueLog
from brs_detr.data.json_file import load_json
from brs_detr.engine.storage import publish
from brs_detr.export.graphs import ExportError
from brs_detr.export.onnx import PROPOSALS, RAW_SCORES
from brs_detr.export.parity import ExportedDetector, match_best
from brs_detr.export.precision import write_float16, write_int8
from brs_detr.ops.images import ImageBatch, Size, pad_to, resized_size
from brs_detr.user_files import printable

PIXELS = {"uint8": torch.uint8, "float32": torch.float32}
MAX_CALIBRATION_IMAGES = 100
COMPARED_IMAGES = 3  # of the calibration
COMPARED = 20
"""Best detections of an image that are compared; those below them are noise in most."""


def narrow(
    path: Path,
    options: argparse.Namespace,
    config: Config,
    canvas: Size | None,
    images: Mapping[str, ImageBatch],
    files: Sequence[Path],
) -> None:
    """Rewrite a float32 file in the precision of the options, and print how far its detections are from before.

    Args:
        path: of the file; replaced once the new one is complete.
        options: of the command.
        config: how images are resized.
        canvas: (H, W) of the input; None if it is free.
        images: batches to compare with, by name.
        files: images to measure ranges on, for int8.

    Raises:
        ExportError: the graph cannot be narrowed, or what the new file finds has nothing to do with what it found.
        ConfigError: no image to measure ranges on can be read.
    """
    target, images = path.with_name(f"{path.name}.narrow"), dict(images)
    try:
        if options.precision == "fp16":
            write_float16(path, target, [PROPOSALS, RAW_SCORES])
        else:
            shown = dict(islice(read_inputs(files, options, config, canvas), COMPARED_IMAGES))
            if not shown:
                raise ConfigError(f"--calibration-images: none of the {len(files)} images can be read. Give others.")
            place = options.calibration_images or Path(config.data.root, config.data.train_json)
            print(f"int8: ranges of activations measured on {len(files)} images of {printable(place)}")
            batches = (batch for _, batch in read_inputs(files, options, config, canvas))
            inputs = ({"pixels": b.pixels.numpy(), "sizes": torch.tensor(b.sizes).numpy()} for b in batches)
            level = logging.getLogger().level
            logging.getLogger().setLevel(logging.ERROR)  # onnxruntime advises what was done already
            try:
                write_int8(path, target, inputs)
            finally:
                logging.getLogger().setLevel(level)
            images |= shown
        compare_files(path, target, options.precision, images)
        publish(target, path)
    finally:
        target.unlink(missing_ok=True)


def compare_files(exact: Path, narrowed: Path, precision: str, images: Mapping[str, ImageBatch]) -> None:
    """Print how far the detections of a narrowed file are from those of the float32 one.

    Raises:
        ExportError: fewer than half of the best detections are found again.
    """
    before, after = ExportedDetector(exact), ExportedDetector(narrowed)
    print(f"{precision} against fp32, both in onnxruntime, best {COMPARED} detections of an image:")
    total = again = 0
    for name, batch in images.items():
        match = match_best(before(batch), after(batch), COMPARED)
        total, again = total + match.total, again + match.matched
        height, width = batch.sizes[0]
        print(
            f"  {printable(name)} ({height}x{width}): {match.matched} of {match.total} found, "
            f"boxes {match.boxes:.1g} pixels, scores {match.scores:.1g}"
        )
    if 2 * again < total:
        raise ExportError(
            f"--precision={precision}: only {again} of the {total} best detections are found again. Nothing was "
            "written. Use fp32, or for int8 other --calibration-images."
        )


def calibration_files(options: argparse.Namespace, config: Config) -> list[Path]:
    """List evenly spaced images: of `--calibration-images`, else of those that the training json lists.

    Not of the whole image folder: in many datasets the validation images lie there, too.

    Raises:
        ConfigError: there is none.
        DataError: the training json cannot be used.
    """
    folder = options.calibration_images
    if folder is None:
        files, place = training_files(config), f"of {Path(config.data.root, config.data.train_json)}"
    else:
        files, place = [path for path in folder.rglob("*") if is_image_name(path.name)], f"in {folder}"
    if not files:
        raise ConfigError(
            f"--precision=int8: measures the ranges of activations on images, and there is none {printable(place)}. "
            "Give --calibration-images FOLDER."
        )
    files = sorted(set(files))
    count = min(len(files), MAX_CALIBRATION_IMAGES)
    return [files[number * len(files) // count] for number in range(count)]


def training_files(config: Config) -> list[Path]:
    """List the files of the images in the training json; none where this machine has no such json.

    Raises:
        DataError: the json cannot be used.
    """
    path, folder = Path(config.data.root, config.data.train_json), Path(config.data.root, config.data.train_images)
    if not path.is_file():
        return []
    log = IssueLog()
    images = read_images(load_json(path, config.data.max_json_bytes), path, log)
    exists = resolve_image_paths(images, folder, log, config.data.allow_outside_images)
    return [folder / name for name in images.keep(exists).names]


def read_inputs(
    files: Iterable[Path], options: argparse.Namespace, config: Config, canvas: Size | None
) -> Iterator[tuple[str, ImageBatch]]:
    """Yield path and input of the file for every image that can be read, one at a time."""
    for path in files:
        try:
            image = read_image(path, limits=config.data)
        except ImageError as error:
            print(f"skipped: {error}")
            continue
        yield str(path), as_input(image, config, canvas, PIXELS[options.pixels])


def as_input(image: Tensor, config: Config, canvas: Size | None, pixels: torch.dtype) -> ImageBatch:
    """Resize and pad an image (3, h, w) to what a file takes."""
    data = config.data
    sides = data.test_canvas or data.test_short_side, data.test_canvas or data.test_long_side
    size = resized_size(image.shape[1], image.shape[2], *sides, canvas)
    resized = resize(image, list(size), InterpolationMode.BILINEAR, antialias=config.data.antialias)
    return padded(resized.to(pixels), canvas or size)


def padded(image: Tensor, canvas: Size) -> ImageBatch:
    """Make a batch of one (3, h, w) image in the top left corner of a (H, W) canvas."""
    height, width = image.shape[-2:]
    return ImageBatch(pad_to(image[None], canvas), [(height, width)], [(height, width)])
