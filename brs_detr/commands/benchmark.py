"""The `benchmark` command: how long an image takes, and what it costs, for a detector in torch or an exported file."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from brs_detr.commands.export import installed
from brs_detr.commands.info import count_classes
from brs_detr.config import ConfigError, load_config
from brs_detr.engine.optim import count_parameters
from brs_detr.export.runtime import ExportedFile
from brs_detr.hub.sources import require_source
from brs_detr.models.detector import Detector
from brs_detr.ops.images import ImageBatch, Size
from brs_detr.recipes import is_recipe
from brs_detr.run.launch import choose_device
from brs_detr.run.setup import build_detector, restore
from brs_detr.user_files import printable

COUNTED = "convolutions and products of matrices of one image; a multiplication with its addition as two"
NOT_COUNTED = (
    "sampling of deformable attention (grid_sample or its kernel), RoIAlign, suppression, elementwise operations"
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
        name: for the report.
        detect: called with a batch on its device.
        size: (H, W) of the images.
        device: of the batch.
        facts: further lines of the report.
    """

    name: str
    detect: Callable[[ImageBatch], object]
    size: Size
    device: torch.device
    facts: list[str]


@torch.inference_mode()
def run(options: argparse.Namespace) -> int:
    """Time a detector and print the report; returns the exit code."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    subject = exported(options) if options.target.suffix == ".onnx" else in_torch(options)
    height, width = subject.size
    images = noise(options.batch, subject.size).to(subject.device)
    print(f"{printable(subject.name)}: batches of {options.batch} image(s) of {height}x{width} (height x width), noise")
    for line in [*subject.facts, *timing(subject, images, options)]:
        print(line)
    return 0


def in_torch(options: argparse.Namespace) -> Subject:
    """Build the detector of a run, a weights file or a recipe (with random weights)."""
    if is_recipe(options.target):
        config = load_config(options.target, options.overrides)
        classes, source = count_classes(config, None)
        model: Detector = build_detector(config, classes, initial_weights=False).eval()
        name = f"{options.target}, random weights, {classes} classes ({source})"
    else:
        require_source(options.target)
        model, _, config, file = restore(options.target, options.overrides)
        name = str(file)
    if config.eval.test_scales:
        raise ConfigError("eval.test_scales: the time is that of one size of an image. Add eval.test_scales=[].")
    device = choose_device(options.device)
    size = options.size or landscape(config.data.test_short_side, config.data.test_long_side)
    square = config.data.test_square or config.data.test_canvas
    if square is not None and options.size is None:
        size = (square, square)
    model.to(device)
    total, _ = count_parameters(model)
    with FlopCounterMode(display=False) as counter:
        model(noise(1, size).to(device))
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} thread(s)"
    facts = [
        f"torch {torch.__version__} on {describe(device)}{threads}, float32, head {model.predict_with}",
        f"parameters: {total:,}",
        f"GFLOPs: {counter.get_total_flops() / 1e9:.2f} ({COUNTED})",
        f"not counted: {NOT_COUNTED}",
    ]
    return Subject(name, model, size, device, facts)


def exported(options: argparse.Namespace) -> Subject:
    """Open an exported file in onnxruntime, on its best device here unless the CPU is asked for."""
    if options.overrides:
        raise ConfigError(f"{options.overrides[0]}: an exported file has no settings to change. Leave it out.")
    file = ExportedFile(options.target, options.device, options.threads or 0)
    if options.size and file.size and options.size != file.size:
        height, width = file.size
        raise ConfigError(f"--size: this file takes {height}x{width} only. Leave it out, or export with --any-size.")
    size = options.size or file.size or landscape(file.short_side, file.long_side)
    used = file.session.get_providers()[0].removesuffix("ExecutionProvider")
    lines = [
        f"onnxruntime on {used}, {file.threads} thread(s), {file.precision}, head {file.head}",
        f"parameters: {stored_numbers(options.target)} in the file, {options.target.stat().st_size / 1e6:.1f} MB",
        "GFLOPs: not counted in a file; `brs-detr benchmark` counts those of the weights it was made from",
    ]
    return Subject(str(options.target), file.run, size, torch.device("cpu"), lines)


def stored_numbers(path: Path) -> str:
    """Count the weights of a file; those of 8 bits come with a scale for each channel. "?" without onnx."""
    if not installed("onnx"):
        return "? (pip install onnx)"
    import onnx

    kinds = onnx.TensorProto
    weights = (kinds.FLOAT, kinds.FLOAT16, kinds.INT8, kinds.INT32)
    tensors = onnx.load(path).graph.initializer
    return f"{sum(int(np.prod(tensor.dims)) for tensor in tensors if tensor.data_type in weights):,}"


def timing(subject: Subject, images: ImageBatch, options: argparse.Namespace) -> list[str]:
    """Time the batches one by one; return the lines of the report."""
    cuda = subject.device.type == "cuda"
    for _ in range(options.warmup):
        subject.detect(images)
    if cuda:
        torch.cuda.synchronize(subject.device)
        torch.cuda.reset_peak_memory_stats(subject.device)
    seconds = [seconds_of(subject, images) for _ in range(options.runs)]
    each = 1000 * np.array(seconds) / options.batch
    median, slow = np.median(each), np.quantile(each, 0.9)
    lines = [
        f"ms per image: median {median:.2f}, 90 % of the runs below {slow:.2f} "
        f"({options.runs} runs after {options.warmup} to warm up)",
        f"images/s: {1000 / median:.1f}",
    ]
    if cuda:
        peak = torch.cuda.max_memory_allocated(subject.device) / 2**30
        lines.append(f"peak memory: {peak:.2f} GB allocated by torch")
    lines.append("from pixels in memory to detections; reading and resizing images is not included")
    return lines


def seconds_of(subject: Subject, images: ImageBatch) -> float:
    """Return the seconds of one batch, until the device has finished it."""
    start = time.perf_counter()
    subject.detect(images)
    if subject.device.type == "cuda":
        torch.cuda.synchronize(subject.device)
    return time.perf_counter() - start


def noise(count: int, size: Size) -> ImageBatch:
    """Make a batch of random pixels, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)
    return ImageBatch(pixels, [size] * count, [size] * count)


def landscape(short: int, long: int) -> Size:
    """Return (H, W) of the largest image that the two limits of the resizing allow."""
    return short, max(short, long)


def describe(device: torch.device) -> str:
    """Return the name of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
