"""The `export` command: write a trained detector as an ONNX file, and compare it with torch in onnxruntime."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from brs_detr.config import Config, ConfigError
from brs_detr.data.image_io import read_image
from brs_detr.data.transforms import resized_size
from brs_detr.engine.checkpoint import Weights, publish
from brs_detr.evaluation.calibration import NEVER, Calibration
from brs_detr.export.graphs import ExportError, require_exportable
from brs_detr.export.onnx import write_onnx
from brs_detr.export.parity import MAX_BOX_DIFFERENCE, MAX_SCORE_DIFFERENCE, ExportedDetector, compare
from brs_detr.models.detector import Detector
from brs_detr.ops.images import ImageBatch, Size
from brs_detr.run.output_dir import require_writable
from brs_detr.run.setup import calibration_of, restore
from brs_detr.run.weights import score_thresholds
from brs_detr.user_files import printable

PIXELS = {"uint8": torch.uint8, "float32": torch.float32}


def run(options: argparse.Namespace) -> int:
    """Export a detector, check the file, rename it to --out only then, and return the exit code."""
    require_packages("onnx", "onnxscript")
    if options.out.suffix != ".onnx":
        raise ConfigError(f"--out={options.out}: the file name must end in .onnx")
    if options.any_size and (options.height or options.width):
        raise ConfigError("--any-size: height and width are dynamic. Leave out --height and --width, or --any-size.")
    require_writable(options.out.parent, "--out")
    model, weights, config, file = restore(options.weights, options.overrides)
    try:
        require_exportable(model)
    except ExportError as error:
        raise ExportError(f"{file}: {error}") from None
    calibration, uncalibrated = calibration_of(model, weights, config, file)
    if uncalibrated:
        print(printable(f"{uncalibrated}."))
    size = input_size(config, options)
    images = {str(path): read_image(path, limits=config.data) for path in options.image}
    shape = "any size" if options.any_size else f"{size[0]}x{size[1]} (height x width)"
    print(f"{printable(file)}: exporting head {model.predict_with} for {shape}")
    partial = options.out.with_name(f".{options.out.name}.partial")
    try:
        write_onnx(
            model,
            partial,
            size,
            any_size=options.any_size,
            opset=options.opset,
            pixels=PIXELS[options.pixels],
            metadata=metadata(model, weights, config, None if options.any_size else size, calibration),
            calibration=calibration,
        )
        check(model, partial, config, options, size, images, calibration)
        publish(partial, options.out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{printable(options.out)}: {options.out.stat().st_size / 1e6:.1f} MB, opset {options.opset}")
    return 0


def require_packages(*names: str) -> None:
    """Refuse to start without the packages that torch's exporter needs.

    Raises:
        ExportError: a package is missing; the message has the command that installs it.
    """
    if missing := [name for name in names if not installed(name)]:
        raise ExportError(f"export needs {' and '.join(missing)}. Install with: pip install {' '.join(missing)}")


def installed(name: str) -> bool:
    """Return True if a package can be imported."""
    return importlib.util.find_spec(name) is not None


def input_size(config: Config, options: argparse.Namespace) -> Size:
    """Return (H, W) of the input: as given by the options, else a square in which every image fits at its test size.

    With `--any-size`, the size of the example that is traced: landscape, and as large as a test image can be.

    Raises:
        ConfigError: a side is too small for the coarsest feature map to have two cells.
    """
    # each level beyond the backbone's halves the resolution once more
    min_side = 2 * max(config.model.backbone.levels) * 2 ** (config.model.levels - len(config.model.backbone.levels))
    for name, side in (("--height", options.height), ("--width", options.width)):
        if side is not None and side < min_side:
            raise ConfigError(
                f"{name}={side}: the coarsest feature map of this detector needs at least {min_side} pixels"
            )
    short, long = max(config.data.test_short_side, min_side), max(config.data.test_long_side, min_side)
    return (short, long) if options.any_size else (options.height or long, options.width or long)


def metadata(
    model: Detector, weights: Weights, config: Config, size: Size | None, calibration: Calibration | None
) -> dict[str, Any]:
    """Return what the file's user needs to know: the meaning of the labels, and how to resize an image."""
    thresholds = score_thresholds(model, weights, None)
    if calibration is not None:  # slightly lower, as the graph maps scores in float32
        thresholds = [value if value >= NEVER else value * (1 - 1e-6) for value in calibration.thresholds]
    return {
        "classes": weights.classes,
        "category_ids": weights.category_ids,
        "head": model.predict_with,
        "thresholds": thresholds,
        "calibration": calibration.as_dict() if calibration else None,
        "size": size,
        "short_side": config.data.test_short_side,
        "long_side": config.data.test_long_side,
        "antialias": config.data.antialias,
    }


def check(
    model: Detector,
    path: Path,
    config: Config,
    options: argparse.Namespace,
    size: Size,
    samples: dict[str, Tensor],
    calibration: Calibration | None = None,
) -> None:
    """Compare the file in onnxruntime with the detector in torch, on noise and on (3, h, w) images by name.

    Raises:
        ExportError: the outputs differ by more than rounding.
    """
    if not installed("onnxruntime"):
        print("not checked: onnxruntime is not installed (pip install onnxruntime)")
        return
    exported = ExportedDetector(path)
    # images smaller than the input, in both orientations, so that padding is checked at the bottom and at the right
    (height, width), part = size, 0.75
    portrait = (width, math.ceil(height * part)) if options.any_size else (height, math.ceil(width * part))
    shapes = {"noise": (math.ceil(height * part), width), "noise, upright": portrait}
    cases = {name: torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for name, shape in shapes.items()}
    for name, sample in samples.items():
        fitted = list(fitted_size((sample.shape[1], sample.shape[2]), config, None if options.any_size else size))
        cases[name] = resize(sample, fitted, InterpolationMode.BILINEAR, antialias=config.data.antialias)
    version = importlib.metadata.version("onnxruntime")
    print(f"onnxruntime {version} against torch {torch.__version__}, largest differences:")
    for name, image in cases.items():
        canvas = (image.shape[1], image.shape[2]) if options.any_size else size
        images = padded(image.to(PIXELS[options.pixels]), canvas)
        differences = compare(model, exported, images, calibration)
        shape = f"{image.shape[-2]}x{image.shape[-1]}"
        print(f"  {printable(name)} ({shape}): boxes {differences.boxes:.1g} pixels, scores {differences.scores:.1g}")
        if not differences.small:
            raise ExportError(
                f"{options.out} was not written: onnxruntime differs from torch by {differences.boxes:.2g} pixels and "
                f"{differences.scores:.2g} in scores; at most {MAX_BOX_DIFFERENCE} and {MAX_SCORE_DIFFERENCE} are "
                "rounding"
            )


def fitted_size(size: Size, config: Config, max_size: Size | None) -> Size:
    """Return (h, w) of an image at its test size, or smaller if it does not fit into the input."""
    short_side: float = config.data.test_short_side
    if max_size is not None:
        short_side = min(short_side, min(size) * min(max_size[0] / size[0], max_size[1] / size[1]))
    return resized_size(*size, short_side, config.data.test_long_side)


def padded(image: Tensor, canvas: Size) -> ImageBatch:
    """Make a batch of one (3, h, w) image in the top left corner of a (H, W) canvas."""
    height, width = image.shape[-2:]
    pixels = image.new_zeros(1, 3, *canvas)
    pixels[0, :, :height, :width] = image
    return ImageBatch(pixels, [(height, width)], [(height, width)])
