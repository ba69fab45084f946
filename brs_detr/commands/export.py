"""`export`: a trained detector as an ONNX file, checked against torch in onnxruntime."""

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

from brs_detr.commands.predict import score_thresholds
from brs_detr.config import Config, ConfigError
from brs_detr.data.image_io import read_image
from brs_detr.data.transforms import resized_size
from brs_detr.engine.checkpoint import Weights, publish
from brs_detr.export.onnx import OLDEST_OPSET, ExportError, write_onnx
from brs_detr.export.parity import MAX_BOX_DIFFERENCE, MAX_SCORE_DIFFERENCE, ExportedDetector, compare
from brs_detr.models.brs_detr import BRSDETR
from brs_detr.ops.images import ImageBatch, Size
from brs_detr.run.output_dir import require_writable
from brs_detr.run.setup import limits_of, restore
from brs_detr.user_files import printable

PIXELS = {"uint8": torch.uint8, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `export`."""
    parser.add_argument("weights", type=Path, help="run folder (its best weights) or .safetensors file")
    parser.add_argument(
        "overrides", nargs="*", default=[], help="settings to change, e.g. model.detections_per_image=50"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.onnx", help="file to write")
    parser.add_argument("--height", type=int, help="of the input, in pixels (default: data.test_long_side)")
    parser.add_argument("--width", type=int, help="of the input, in pixels (default: data.test_long_side)")
    parser.add_argument("--any-size", action="store_true", help="leave height and width of the input free")
    parser.add_argument("--pixels", choices=PIXELS, default="uint8", help="type of the input, 0..255 in either case")
    parser.add_argument("--opset", type=int, default=OLDEST_OPSET, help="version of ONNX's operators (default: 18)")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="check with this image too; may be repeated"
    )


def run(options: argparse.Namespace) -> int:
    """Export, check, and only then give the file its name; returns the exit code."""
    require_packages("onnx", "onnxscript")
    if options.out.suffix != ".onnx":
        raise ConfigError(f"--out={options.out}: the name of the file must end in .onnx")
    if options.any_size and (options.height or options.width):
        raise ConfigError("--any-size leaves height and width free; leave out --height and --width, or it")
    require_writable(options.out.parent, "--out")
    model, weights, config, file = restore(options.weights, options.overrides)
    if config.eval.predict_with != "decoder":
        raise ConfigError(
            f"eval.predict_with={config.eval.predict_with}: only the decoder's detections can be exported; "
            "add eval.predict_with=decoder"
        )
    size = input_size(config, options)
    images = {str(path): read_image(path, limits=limits_of(config)) for path in options.image}
    shape = "any size" if options.any_size else f"{size[0]}x{size[1]} (height x width)"
    print(f"{printable(file)}: exporting for {shape}")
    partial = options.out.with_name(f".{options.out.name}.partial")
    try:
        write_onnx(
            model,
            partial,
            size,
            any_size=options.any_size,
            opset=options.opset,
            pixels=PIXELS[options.pixels],
            metadata=metadata(weights, config, None if options.any_size else size),
        )
        check(model, partial, config, options, size, images)
        publish(partial, options.out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{printable(options.out)}: {options.out.stat().st_size / 1e6:.1f} MB, opset {options.opset}")
    return 0


def require_packages(*names: str) -> None:
    """Refuse to begin without the packages that torch's exporter needs.

    Raises:
        ExportError: with the line that installs them.
    """
    if missing := [name for name in names if not installed(name)]:
        raise ExportError(f"export needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def installed(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def input_size(config: Config, options: argparse.Namespace) -> Size:
    """(H, W) of the graph: as asked, else a square in which every image fits at its test size.

    Under `--any-size` that of the image with which the graph is traced, wide and as large as a test image can be.

    Raises:
        ConfigError: a side is too small for the maps to have two cells.
    """
    min_side = 2 * max(config.model.backbone.levels) * 2 ** (config.model.levels - len(config.model.backbone.levels))
    for name, side in (("--height", options.height), ("--width", options.width)):
        if side is not None and side < min_side:
            raise ConfigError(f"{name}={side}: the coarsest of this detector's maps needs at least {min_side} pixels")
    short, long = max(config.data.test_short_side, min_side), max(config.data.test_long_side, min_side)
    return (short, long) if options.any_size else (options.height or long, options.width or long)


def metadata(weights: Weights, config: Config, size: Size | None) -> dict[str, Any]:
    """What the file's user has to know: what the labels mean, and how an image is to be resized."""
    return {
        "classes": weights.classes,
        "category_ids": weights.category_ids,
        "thresholds": score_thresholds(weights, None),
        "size": size,
        "short_side": config.data.test_short_side,
        "long_side": config.data.test_long_side,
        "antialias": config.data.antialias,
    }


def check(
    model: BRSDETR, path: Path, config: Config, options: argparse.Namespace, size: Size, samples: dict[str, Tensor]
) -> None:
    """Compare the file in onnxruntime with the detector in torch, on noise and on (3, h, w) images by name.

    Raises:
        ExportError: they differ by more than rounding.
    """
    if not installed("onnxruntime"):
        print("not checked: onnxruntime is not installed (pip install onnxruntime)")
        return
    exported = ExportedDetector(path)
    (height, width), part = size, 0.75
    upright = (width, math.ceil(height * part)) if options.any_size else (height, math.ceil(width * part))
    shapes = {"noise": (math.ceil(height * part), width), "noise, upright": upright}
    cases = {name: torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for name, shape in shapes.items()}
    for name, sample in samples.items():
        fitted = list(fitted_size(sample.shape[-2:], config, None if options.any_size else size))
        cases[name] = resize(sample, fitted, InterpolationMode.BILINEAR, antialias=config.data.antialias)
    version = importlib.metadata.version("onnxruntime")
    print(f"onnxruntime {version} against torch {torch.__version__}, largest differences:")
    for name, image in cases.items():
        canvas = tuple(image.shape[-2:]) if options.any_size else size
        images = padded(image.to(PIXELS[options.pixels]), canvas)
        found = compare(model, exported, images)
        shape = f"{image.shape[-2]}x{image.shape[-1]}"
        print(f"  {printable(name)} ({shape}): boxes {found.boxes:.1g} pixels, scores {found.scores:.1g}")
        if not found.small:
            raise ExportError(
                f"{options.out} was not written: onnxruntime differs from torch by {found.boxes:.2g} pixels and "
                f"{found.scores:.2g} in scores, where {MAX_BOX_DIFFERENCE} and {MAX_SCORE_DIFFERENCE} would be rounding"
            )


def fitted_size(size: Size, config: Config, max_size: Size | None) -> Size:
    """(h, w) of an image as `data.test_short_side` and `data.test_long_side` say, smaller where the graph's is."""
    short_side: float = config.data.test_short_side
    if max_size is not None:
        short_side = min(short_side, min(size) * min(max_size[0] / size[0], max_size[1] / size[1]))
    return resized_size(*size, short_side, config.data.test_long_side)


def padded(image: Tensor, canvas: Size) -> ImageBatch:
    """A batch of one (3, h, w) image in the top left corner of a (H, W) canvas."""
    height, width = image.shape[-2:]
    pixels = image.new_zeros(1, 3, *canvas)
    pixels[0, :, :height, :width] = image
    return ImageBatch(pixels, [(height, width)], [(height, width)])
