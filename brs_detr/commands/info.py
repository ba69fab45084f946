"""The `info` command: print the model of a config, its size, and the implementations this machine would use.

It reads no weights and needs no network.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import tempfile
from pathlib import Path

import torch
from torch import nn

from brs_detr.config import Config, dump, load_config
from brs_detr.data.config import LSJConfig, SSDConfig
from brs_detr.data.dataset_source import open_source
from brs_detr.data.json_file import load_json
from brs_detr.engine.optim import count_parameters
from brs_detr.evaluation.coco_eval import fast_backend_installed
from brs_detr.evaluation.summary import text_table
from brs_detr.models.detector import Detector
from brs_detr.run.setup import build_detector, describe_detector

COCO_CLASSES = 80


def run(options: argparse.Namespace) -> int:
    """Print the report of a config and return the exit code."""
    config = load_config(options.config, options.overrides)
    if options.settings:
        print(dump(config), end="")
        return 0
    classes, source = count_classes(config, options.classes)
    model = build_detector(config, classes, initial_weights=False)
    print("\n\n".join([heading(config, classes, source), parts(model), inputs(config, model), machine(config)]))
    return 0


def count_classes(config: Config, num_classes: int | None) -> tuple[int, str]:
    """Return the number of classes and where it comes from."""
    if num_classes is not None:
        return num_classes, "from --classes"
    if config.data.source is not None:
        with tempfile.TemporaryDirectory(prefix="brs-detr-") as folder:
            opened = open_source(config.data, Path(folder), ("train",))
            data = load_json(opened.splits["train"].json, config.data.max_json_bytes)
        return len(data["categories"]), f"from {opened.layout.source}"
    path = Path(config.data.root, config.data.train_json)
    if path.is_file():
        return len(load_json(path, config.data.max_json_bytes)["categories"]), f"from {path}"
    return COCO_CLASSES, f"as in COCO; {path} does not exist"


def heading(config: Config, classes: int, source: str) -> str:
    """Format name, loss, backbone, classes and schedule."""
    train, backbone = config.train, config.model.backbone
    weights = backbone.checkpoint or ("downloaded once" if backbone.pretrained else "random")
    length = f"{train.epochs} epochs" if train.steps is None else f"{train.steps:,} steps"
    milestones = f" {list(train.lr_steps)}" if train.schedule == "step" else ""
    return (
        f"{describe_detector(config.model)}, {classes} classes ({source})\n"
        f"backbone {backbone.name}, weights: {weights}, norm {backbone.norm}, {backbone.frozen_stages} frozen stages\n"
        f"{length} of batch {train.total_batch_size}, {config.optim.name} lr {config.optim.lr:g}, "
        f"weight decay {config.optim.weight_decay:g}, {train.schedule} schedule{milestones}"
    )


def parts(model: nn.Module) -> str:
    """Format a table of parameters by part, with the total in the last line."""
    rows = [(name, *count_parameters(part)) for name, part in model.named_children()]
    own = sum(p.numel() for p in model.parameters(recurse=False))
    rows += [("itself", own, own)] if own else []
    rows.append(("all", *count_parameters(model)))
    shown = [[name, f"{total:,}", f"{trainable:,}"] for name, total, trainable in rows if total]
    return text_table(["class", "parameters", "trained"], shown).replace("class     ", "part      ", 1)


def inputs(config: Config, model: Detector) -> str:
    """Format the sizes of images and feature maps."""
    data, augment = config.data, config.data.augment
    strides = model.strides
    square = data.test_square or data.test_canvas
    short, long = (square or side for side in (data.test_short_side, data.test_long_side))
    maps = " ".join(f"{-(-short // s)}x{-(-long // s)}" for s in strides)
    tokens = sum(-(-short // s) * -(-long // s) for s in strides)
    if isinstance(augment, SSDConfig):
        training = f"{augment.size}x{augment.size}, by SSD's augmentation"
    elif isinstance(augment, LSJConfig):
        scales = f"{augment.min_scale:g} to {augment.max_scale:g} times the size that fits into it"
        training = f"on a canvas of {augment.size}x{augment.size}, {scales}"
    else:
        sides = augment.short_sides
        training = f"short side {min(sides)}-{max(sides)}, long side up to {augment.long_side}"
    tested = f"short side {short}, long side up to {long}"
    if data.test_canvas is not None:
        tested = f"on a canvas of {short}x{short}"
    return (
        f"training images: {training}\n"
        f"test images: {tested}\n"
        f"maps of the largest test image (strides {', '.join(map(str, strides))}): {maps}, {tokens:,} cells"
    )


def machine(config: Config) -> str:
    """Format versions, device, and the implementation of each expensive operation."""
    packages = ("torch", "torchvision", "timm", "accelerate", "pycocotools")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        device = ", ".join(f"cuda:{i} {gpu.name} {gpu.total_memory / 2**30:.0f} GB" for i, gpu in enumerate(gpus))
    else:
        device = f"CPU only ({os.cpu_count()} cores)"
    evaluation = "faster-coco-eval" if fast_backend_installed() else "pycocotools"
    matching = "Hungarian matching: SciPy on the CPU; " if hasattr(config.model, "matcher") else ""
    return (
        f"Python {platform.python_version()}, {versions}\n"
        f"device: {device}; precision {config.train.precision}\n"
        f"{matching}evaluation: {evaluation}"
    )
