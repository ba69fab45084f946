"""Seconds of one training step of each CNN detector by each form of Rank & Sort and by its score-based loss.

    python benchmarks/cnn_step.py                      # 2 images of 192 x 256 pixels, 500 proposals, on a CPU
    python benchmarks/cnn_step.py --full --device cuda # 4 images of 800 x 1333 pixels, as one GPU has in the papers
    python benchmarks/cnn_step.py --detectors atss faster_rcnn --repeats 5

ResNet-50 with random weights, 80 classes, 7 objects an image (COCO's mean) in random places. All forms of a detector
begin with the same weights and run in turn in one process: forward, losses, backward and SGD. A time is that of the
fastest of several steps after one that warms up; on a CPU in seconds of its own time, so that other programs count as
little as may be. "x" compares with the score-based loss. The share is that of the objectives' forward pass, measured
in a step of its own; with a ranking loss this computes the gradient as well, whose backward pass is a multiplication.
The definition (`method="pairwise"`), one positive after another, is no rival but what the others are checked against.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cnn_overfit import SCORE_BASED

from brs_detr.config import Config, apply_overrides
from brs_detr.engine.optim import build_optimizer
from brs_detr.losses.objective import PredictionSet, RankingObjective, ScoreObjective
from brs_detr.models.build import build_model
from brs_detr.ops.images import ImageBatch

CLASSES, OBJECTS = 80, 7
FORMS = ("score", "brs", "rs", "pairwise")
TITLES = ("score-based", "BRS (bucketed)", "RS (exact)", "RS (definition)")


class Clock:
    """Times calls: by the CPU's time in all threads, or by the clock with a GPU waited for."""

    def __init__(self, device: str) -> None:
        self.device = device

    def now(self) -> float:
        """Seconds since some moment."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, function: Callable[[], object]) -> float:
        """Seconds of one call."""
        start = self.now()
        function()
        return self.now() - start


class Watch:
    """Adds up the time, the logits and the positives of a detector's objectives while it is switched on."""

    def __init__(self, model: nn.Module, clock: Clock) -> None:
        self.clock, self.on, self.start = clock, False, 0.0
        self.seconds, self.logits, self.positives = 0.0, 0, 0
        for module in model.modules():
            if isinstance(module, RankingObjective | ScoreObjective):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end)

    def _begin(self, _: nn.Module, arguments: tuple[PredictionSet]) -> None:
        if self.on:
            self.logits += arguments[0].logits.numel()
            self.positives += len(arguments[0].quality)
            self.start = self.clock.now()

    def _end(self, *_: object) -> None:
        if self.on:
            self.seconds += self.clock.now() - self.start

    def share(self, step: Callable[[], object]) -> float:
        """The objectives' part of one step."""
        self.on, self.seconds, self.logits, self.positives = True, 0.0, 0, 0
        total = self.clock.seconds(step)
        self.on = False
        return self.seconds / total


def settings(detector: str, form: str, options: argparse.Namespace) -> Config:
    """The detector's published settings with one form of loss."""
    chosen = [f"model.name={detector}", "model.backbone.pretrained=false", "optim.name=sgd", "optim.lr=1e-6"]
    chosen += SCORE_BASED[detector].split() if form == "score" else [f"model.loss={'brs' if form == 'brs' else 'rs'}"]
    if "rcnn" in detector and not options.full:
        chosen.append("model.rpn.proposals=500")
    return apply_overrides(Config(), chosen)


def random_batch(options: argparse.Namespace, masks: bool) -> tuple[ImageBatch, list[dict]]:
    """Images of noise with objects of a tenth to a half of their sides."""
    height, width = (800, 1333) if options.full else (192, 256)
    count = 4 if options.full else 2
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    targets = []
    for image in range(count):
        side = torch.tensor([width, height])
        size = side * (torch.rand(OBJECTS, 2, generator=generator) * 0.4 + 0.1)
        corner = torch.rand(OBJECTS, 2, generator=generator) * (side - size)
        labels = torch.randint(0, CLASSES, (OBJECTS,), generator=generator)
        target = {"boxes": torch.cat([corner, corner + size], 1), "labels": labels, "image_id": image}
        if masks:
            target["masks"] = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = 1
        targets.append({name: v.to(options.device) if torch.is_tensor(v) else v for name, v in target.items()})
    sizes = [(height, width)] * count
    return ImageBatch(pixels.to(options.device), sizes, sizes), targets


def prepare(detector: str, form: str, options: argparse.Namespace) -> tuple[Callable[[], None], Watch]:
    """One training step as a function, and the watch of its objectives."""
    config = settings(detector, form, options)
    torch.manual_seed(0)
    model = build_model(config.model, CLASSES).to(options.device).train()
    for module in model.modules():
        if isinstance(module, RankingObjective) and form == "pairwise":
            module.method = "pairwise"
    optimizer = build_optimizer(config.optim, model)
    images, targets = random_batch(options, config.model.has_masks)

    def step() -> None:
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        optimizer.step()

    return step, Watch(model, Clock(options.device))


def measure(detector: str, options: argparse.Namespace) -> str:
    """One row of the table."""
    clock = Clock(options.device)
    steps = {form: prepare(detector, form, options) for form in FORMS}
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(options.repeats + 1):
        for form, (step, _) in steps.items():
            times[form].append(clock.seconds(step))
    fastest = {form: min(values[1:]) for form, values in times.items()}
    shares = {form: watch.share(step) for form, (step, watch) in steps.items()}
    cells = [
        f"{fastest[form]:.3g} ({fastest[form] / fastest['score']:.2f}x, {100 * shares[form]:.2g} %)" for form in FORMS
    ]
    watch = steps["rs"][1]
    return f"| {detector} | {watch.logits:,} | {watch.positives:,} | {' | '.join(cells)} |"


def machine(options: argparse.Namespace) -> str:
    """Device, versions and sizes, for the line above the table."""
    device = "one CPU thread"
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    else:
        torch.set_num_threads(1)
    size = "4 images of 800 x 1333" if options.full else "2 images of 192 x 256"
    return (
        f"{size} pixels, {device}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}; {time.strftime('%Y-%m-%d', time.gmtime())}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", default=list(SCORE_BASED), choices=list(SCORE_BASED))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="the papers' image size and batch of one GPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    print(machine(options))
    print(f"\n| detector | logits | positives | {' | '.join(TITLES)} |\n|---|---|---|{'---|' * len(FORMS)}")
    for detector in options.detectors:
        print(measure(detector, options), flush=True)


if __name__ == "__main__":
    main()
