"""Latency, images a second and memory of a detector at several sizes, in torch and in onnxruntime side by side.

    python benchmarks/inference.py configs/brs_detr_r50_12e_coco.yaml --sizes 480x640 800x1333
    python benchmarks/inference.py runs/demo --onnx demo.onnx --sizes 70x80 --batch 1 --runs 50
    python benchmarks/inference.py configs/brs_detr_r50_12e_coco.yaml --sizes 800x1333 --device cuda --no-onnx

A recipe has random weights; it and a run are exported for any size unless `--onnx` names their file. Where transformers
is installed, its two-stage Deformable DETR of the recipe's sizes is timed beside a recipe of BRS-DETR. All take turns,
batch by batch, so that what else the machine does meets them alike; times are those of `brs-detr benchmark`, from
pixels in memory to detections. Memory is measured in a process for each: on a CPU what it grows by beyond its size with
the model loaded, on a GPU what torch allocates beyond the model (of onnxruntime it knows nothing).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brs_detr.commands.arguments import height_and_width, positive
from brs_detr.commands.benchmark import Subject, exported, in_torch, is_recipe, noise, seconds_of
from brs_detr.commands.export import installed
from brs_detr.config import load_config
from brs_detr.export.onnx import write_onnx
from brs_detr.models.config import BRSDETRConfig
from brs_detr.models.detector import Detector
from brs_detr.ops.images import Size

Build = Callable[[], Subject]


def torch_subject(args: argparse.Namespace) -> Subject:
    """Build the detector in torch."""
    return in_torch(args)


def onnx_subject(args: argparse.Namespace, path: Path) -> Subject:
    """Open the exported file."""
    return exported(argparse.Namespace(target=path, overrides=[], device=args.device, size=None, threads=args.threads))


def transformers_subject(args: argparse.Namespace) -> Subject:
    """Build transformers' Deformable DETR in the recipe's sizes, with random weights."""
    from other_libraries import TransformersDetector

    config = load_config(args.target, [*args.overrides, "model.backbone.pretrained=false"])
    device = torch.device(args.device or "cpu")
    model = TransformersDetector(config, 80).eval().to(device)
    return Subject("transformers", model, args.size, device, [])


def export(args: argparse.Namespace, path: Path) -> None:
    """Write the detector for images of any size."""
    model = torch_subject(args).detect
    assert isinstance(model, Detector)
    facts: dict[str, Any] = {"classes": [], "category_ids": [], "head": model.predict_with, "size": None}
    facts |= {"antialias": True, "short_side": min(args.size), "long_side": max(args.size)}
    write_onnx(model.cpu(), path, args.size, any_size=True, metadata=facts)


def subjects(args: argparse.Namespace, folder: Path) -> dict[str, Build]:
    """Return how each detector that is to be timed is built."""
    found: dict[str, Build] = {"torch": partial(torch_subject, args)}
    if not args.no_onnx:
        path = args.onnx or folder / "exported.onnx"
        if args.onnx is None:
            export(args, path)
        found["onnxruntime"] = partial(onnx_subject, args, path)
    recipe = load_config(args.target, args.overrides) if is_recipe(args.target) else None
    if recipe is not None and isinstance(recipe.model, BRSDETRConfig) and installed("transformers"):
        found["transformers"] = partial(transformers_subject, args)
    return found


@torch.inference_mode()
def memory_of(build: Build, sizes: Sequence[Size], batch: int, threads: int | None) -> list[float]:
    """Return the megabytes that batches of each size need beyond the model; on a CPU in a process of its own."""
    torch.set_num_threads(threads or torch.get_num_threads())
    subject = build()
    if subject.device.type == "cuda":
        peaks: list[float] = []
        for size in sizes:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            subject.detect(noise(batch, size).to(subject.device))
            peaks.append((torch.cuda.max_memory_allocated() - held) / 2**20)
        return peaks
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    grown: list[float] = []
    before = resident("VmRSS")
    for size in sizes:  # ascending, since a peak stays
        subject.detect(noise(batch, size))
        grown.append(resident("VmHWM") - before)
        give_back()
    return grown


def give_back() -> None:
    """Give freed memory back to the system, where the C library would keep it."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def resident(field: str) -> float:
    """Return a size of this process in megabytes, as Linux names it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(lines[field].split()[0]) / 1024


@torch.inference_mode()
def latencies(builds: dict[str, Build], args: argparse.Namespace) -> dict[tuple[Size, str], list[float]]:
    """Return the seconds of every batch by size and detector, all detectors taking turns."""
    built = {name: build() for name, build in builds.items()}
    times: dict[tuple[Size, str], list[float]] = {(size, name): [] for size in args.sizes for name in built}
    for size in args.sizes:
        images = noise(args.batch, size)
        for turn in range(args.warmup + args.runs):
            for name, subject in built.items():
                taken = seconds_of(subject, images.to(subject.device))
                if turn >= args.warmup:
                    times[size, name].append(taken)
    return times


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="a recipe, a run's folder or a file of weights")
    parser.add_argument("overrides", nargs="*", default=[], help="settings to change")
    parser.add_argument("--sizes", type=height_and_width, nargs="+", required=True, metavar="HxW")
    parser.add_argument("--onnx", type=Path, help="the exported file; default: export one for any size")
    parser.add_argument("--no-onnx", action="store_true", help="only torch")
    parser.add_argument("--batch", type=positive, default=1, help="images at once")
    parser.add_argument("--runs", type=positive, default=20)
    parser.add_argument("--warmup", type=positive, default=2)
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    args.sizes.sort(key=lambda size: size[0] * size[1])
    args.size = args.sizes[0]  # with which `brs-detr benchmark` builds a detector
    return args


def versions(names: Sequence[str]) -> str:
    """Return the versions of Python and of what is timed."""
    found = [f"{name} {importlib.import_module(name).__version__}" for name in names]
    return ", ".join([f"Python {platform.python_version()}", *found])


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        builds = subjects(args, Path(folder))
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory = {
                name: pool.apply(memory_of, (build, args.sizes, args.batch, args.threads))
                for name, build in builds.items()
            }
        times = latencies(builds, args)
    device = f"{args.threads} CPU thread(s)" if args.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{' '.join([str(args.target), *args.overrides])}: batches of {args.batch} image(s), {args.runs} runs, "
        f"{device}, {versions(list(builds))}; {time.strftime('%Y-%m-%d', time.gmtime())}\n"
    )
    print("| height x width | in | ms an image: median | 90 % below | images/s | MB |\n|---|---|---|---|---|---|")
    for row, size in enumerate(args.sizes):
        for name in builds:
            each = 1000 * np.array(times[size, name]) / args.batch
            median = np.median(each)
            print(
                f"| {size[0]}x{size[1]} | {name} | {median:.1f} | {np.quantile(each, 0.9):.1f} | {1000 / median:.2f} "
                f"| {memory[name][row]:,.0f} |"
            )


if __name__ == "__main__":
    main()
