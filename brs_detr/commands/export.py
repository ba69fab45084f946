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

from brs_detr.commands.export_precision import PIXELS, as_input, calibration_files, narrow, padded
from brs_detr.config import Config, ConfigError, differences, from_dict, to_dict
from brs_detr.data.image_io import read_image
from brs_detr.engine.checkpoint import Weights
from brs_detr.engine.storage import publish
from brs_detr.evaluation.calibration import NEVER, Calibration
from brs_detr.export.graphs import ExportError, require_exportable
from brs_detr.export.onnx import soft_nms_of, write_onnx
from brs_detr.export.parity import MAX_BOX_DIFFERENCE, MAX_SCORE_DIFFERENCE, ExportedDetector, compare
from brs_detr.export.torch_file import TorchFile, inner_outputs, write_torch
from brs_detr.models.detector import Detector
from brs_detr.ops.images import ImageBatch, Size
from brs_detr.run.output_dir import require_writable
from brs_detr.run.setup import calibration_of, changes_figures, restore
from brs_detr.run.weights import score_thresholds
from brs_detr.user_files import printable

OPSET = 18


def run(options: argparse.Namespace) -> int:
    """Export a detector, check the file, rename it to --out only then, and return the exit code."""
    to_torch = check_options(options)
    require_writable(options.out.parent, "--out")
    model, weights, config, file = restore(options.weights, options.overrides)
    try:
        require_exportable(model)
    except ExportError as error:
        raise ExportError(f"{file}: {error}") from None
    calibration, uncalibrated = calibration_of(model, weights, config, file)
    if uncalibrated:
        print(printable(f"{uncalibrated}."))
    files = calibration_files(options, config) if options.precision == "int8" else []  # before a minute of exporting
    size = input_size(config, options)
    canvas = None if options.any_size else size
    images = {str(path): read_image(path, limits=config.data) for path in options.image}
    shape = "any size" if options.any_size else f"{size[0]}x{size[1]} (height x width)"
    print(f"{printable(file)}: exporting head {model.predict_with} for {shape}")
    if soft_nms_of(model):
        print("eval.nms.kind=soft: is not in the file, as runtimes lack it. Its description says what is left to do.")
    partial = options.out.with_name(f".{options.out.name}.partial")
    written: dict[str, Any] = {
        "any_size": options.any_size,
        "pixels": PIXELS[options.pixels],
        "metadata": metadata(model, weights, config, canvas, calibration),
        "calibration": calibration,
    }
    try:
        if to_torch:
            write_torch(model, partial, size, **written)
        else:
            write_onnx(model, partial, size, opset=options.opset, **written)
        cases = sample_inputs(images, config, options, size)
        check(model, partial, options, cases, calibration)
        if options.precision != "fp32":
            narrow(partial, options, config, canvas, cases, files)
        publish(partial, options.out)
    finally:
        partial.unlink(missing_ok=True)
    kind = f"torch.export of torch {torch.__version__}" if to_torch else f"opset {options.opset}, {options.precision}"
    print(f"{printable(options.out)}: {options.out.stat().st_size / 1e6:.1f} MB, {kind}")
    return 0


def check_options(options: argparse.Namespace) -> bool:
    """Refuse options that do not fit each other or lack a package; return True for a file of torch.export.

    Raises:
        ConfigError: naming the options.
        ExportError: naming the packages.
    """
    ending = {None: options.out.suffix, "onnx": ".onnx", "torch": ".pt2"}[options.format]
    to_torch = ending == ".pt2"
    if not to_torch:
        require_packages("onnx", "onnxscript")
    if options.precision != "fp32":
        if to_torch:
            raise ConfigError(
                f"--precision={options.precision}: is for ONNX files. Leave it out, or use --format onnx."
            )
        require_packages("onnxruntime")
    if options.out.suffix != ending or ending not in (".onnx", ".pt2"):
        wanted = ".pt2" if options.format == "torch" else ".onnx" if options.format else ".onnx, or in .pt2 for torch"
        raise ConfigError(f"--out={options.out}: the file name must end in {wanted}")
    if options.calibration_images is not None and options.precision != "int8":
        raise ConfigError("--calibration-images: is for --precision int8. Add it, or leave this out.")
    if options.opset is not None and to_torch:
        raise ConfigError(f"--opset={options.opset}: is for ONNX files. Leave it out, or use --format onnx.")
    if options.opset is None:
        options.opset = OPSET
    if options.any_size and (options.height or options.width):
        raise ConfigError("--any-size: height and width are dynamic. Leave out --height and --width, or --any-size.")
    return to_torch


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
    if config.data.test_canvas is not None:
        side = config.data.test_canvas
        if options.any_size or (options.height or side, options.width or side) != (side, side):
            raise ConfigError(
                f"data.test_canvas={side}: this detector sees images on a canvas of {side}x{side}. Leave out "
                "--any-size, --height and --width."
            )
        return side, side
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
        "short_side": config.data.test_canvas or config.data.test_short_side,
        "long_side": config.data.test_canvas or config.data.test_long_side,
        "canvas": config.data.test_canvas,
        "antialias": config.data.antialias,
        "soft_nms": soft_nms_of(model),
        "precision": "fp32",
        "validation": validation(model, weights, config),
        "config": portable_settings(config),
    }


def validation(model: Detector, weights: Weights, config: Config) -> dict[str, Any] | None:
    """Return the figures of the head in the validation of the weights, and the fingerprint of the images.

    None where there was no validation, a setting that they depend on has changed since, or they are those of Soft-NMS.
    """
    if soft_nms_of(model):
        return None
    metrics, stored = weights.extra.get("metrics"), from_dict(weights.config, "the weights file")
    changed = [change for change in differences(stored, config) if changes_figures(change)]
    if not isinstance(metrics, dict) or any(not change.startswith("eval.predict_with") for change in changed):
        return None
    own = stored.eval.predict_with
    best = weights.extra.get("predict_with", model.heads[0] if own == "auto" else own)
    figures = {name: value for name, value in metrics.items() if name.startswith(("AP", "AR"))}
    if model.predict_with != best:
        figures = {"AP": metrics[name]} if (name := f"{model.predict_with}_AP") in metrics else {}
    if not figures:
        return None
    return {"figures": figures, "epoch": weights.extra.get("epoch"), "images": weights.extra.get("validated_on")}


def portable_settings(config: Config) -> dict[str, Any]:
    """Return the settings that an evaluation of the file needs, without absolute paths of this machine."""
    names = ("root", "val_json", "val_images", "test_short_side", "test_long_side", "antialias")
    data = {name: value for name, value in to_dict(config.data).items() if name in names}
    data = {name: value for name, value in data.items() if not Path(str(value)).is_absolute()}
    limits = {"score_threshold": config.eval.score_threshold, "max_detections": config.eval.max_detections}
    return {"data": data, "model": {"name": config.model.name}, "eval": limits}


def sample_inputs(
    images: dict[str, Tensor], config: Config, options: argparse.Namespace, size: Size
) -> dict[str, ImageBatch]:
    """Return inputs of the file to check it with, by name: noise, and (3, h, w) images by name."""
    # images smaller than the input, in both orientations, so that padding is checked at the bottom and at the right
    (height, width), part = size, 0.75
    portrait = (width, math.ceil(height * part)) if options.any_size else (height, math.ceil(width * part))
    shapes = {"noise": (math.ceil(height * part), width), "noise, upright": portrait}
    canvas, pixels = None if options.any_size else size, PIXELS[options.pixels]
    cases = {}
    for name, shape in shapes.items():
        noise = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
        cases[name] = padded(noise.to(pixels), canvas or shape)
    return cases | {name: as_input(image, config, canvas, pixels) for name, image in images.items()}


def check(
    model: Detector,
    path: Path,
    options: argparse.Namespace,
    cases: dict[str, ImageBatch],
    calibration: Calibration | None = None,
) -> None:
    """Compare the file, in onnxruntime or loaded by torch, with the detector in torch.

    Raises:
        ExportError: the outputs differ by more than rounding.
    """
    exported: ExportedDetector | TorchFile
    if options.out.suffix == ".pt2":
        exported, runtime = TorchFile(path, inner_outputs(model, calibration)), "the file loaded again"
    elif not installed("onnxruntime"):
        print("not checked: onnxruntime is not installed (pip install onnxruntime)")
        return
    else:
        exported, runtime = ExportedDetector(path), f"onnxruntime {importlib.metadata.version('onnxruntime')}"
    print(f"{runtime} against torch {torch.__version__}, largest differences:")
    for name, images in cases.items():
        apart = compare(model, exported, images, calibration)
        shape = "x".join(map(str, images.sizes[0]))
        print(f"  {printable(name)} ({shape}): boxes {apart.boxes:.1g} pixels, scores {apart.scores:.1g}")
        if not apart.small:
            raise ExportError(
                f"{options.out} was not written: {runtime} differs from torch by {apart.boxes:.2g} pixels and "
                f"{apart.scores:.2g} in scores; at most {MAX_BOX_DIFFERENCE} and {MAX_SCORE_DIFFERENCE} are "
                "rounding"
            )
