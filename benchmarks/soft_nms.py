"""Time of Soft-NMS on the candidates of Co-DINO's images, beside torchvision's class-wise NMS of the same boxes.

    python benchmarks/soft_nms.py --out benchmarks/results/soft_nms_cpu.md
    python benchmarks/soft_nms.py --device cuda

Candidates are the best pairs of query and class: drawn objects, each found by several boxes around it with scores that
fall as these move away, as a detector leaves them. Medians of alternating calls, in CPU time of one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import batched_nms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cnn_overfit import machine
from cnn_step import Clock

from brs_detr.ops.soft_nms import decay, survives

IOU, MIN_SCORE, KEPT = 0.8, 0.001, 300  # Co-DINO's
CASES = {  # candidates, classes, images
    "Co-DINO R50 (900 candidates, 80 classes)": (900, 80, 1),
    "the same, one class": (900, 1, 1),
    "LVIS (900 candidates, 1,203 classes)": (900, 1203, 1),
    "small data (100 candidates, 3 classes)": (100, 3, 1),
    "four images at once (900 candidates, 80 classes)": (900, 80, 4),
}


def candidates(count: int, classes: int, images: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw boxes (B, n, 4) xyxy pixels, scores (B, n) best first, and labels (B, n); six boxes for each object."""
    generator = torch.Generator().manual_seed(seed)
    objects = torch.rand(images, -(-count // 6), 4, generator=generator)
    sides = 20 + 200 * objects[..., 2:]
    centers = objects[..., :2] * torch.tensor([1333.0, 800.0])
    parent = torch.arange(count).remainder(objects.shape[1]).expand(images, count)
    moved = torch.randn(images, count, 4, generator=generator) * 0.08
    rows = torch.arange(images)[:, None]
    own = sides[rows, parent]
    middle, size = centers[rows, parent] + moved[..., :2] * own, own * moved[..., 2:].exp()
    scores = torch.rand(objects.shape[:2], generator=generator)[rows, parent] * (-4 * moved.abs().sum(-1)).exp()
    labels = torch.randint(classes, objects.shape[:2], generator=generator)[rows, parent]
    scores, order = scores.sort(dim=1, descending=True)
    return torch.cat([middle - size / 2, middle + size / 2], dim=2)[rows, order], scores, labels[rows, order]


def soft(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Run Soft-NMS as Co-DINO does; returns the rows (B, m)."""
    rows, decayed = decay(boxes, scores, labels, iou=IOU, max_detections=KEPT)
    return rows[survives(decayed, MIN_SCORE)]


def hard(boxes: Tensor, scores: Tensor, labels: Tensor) -> list[Tensor]:
    """Run class-wise NMS on each image."""
    return [batched_nms(*image, IOU)[:KEPT] for image in zip(boxes, scores, labels, strict=True)]


def medians(functions: list[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """Time the functions in turn; returns the median milliseconds of each."""
    clock = Clock(device.type)
    times = [[1000 * clock.seconds(function) for function in functions] for _ in range(rounds + 2)]
    return [statistics.median(own) for own in zip(*times[2:], strict=True)]  # after a warm-up


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="write the table there, too")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    where = machine() if args.device.type == "cpu" else torch.cuda.get_device_name(args.device)
    lines = ["# `python benchmarks/soft_nms.py`", "", where, ""]
    lines += [f"IoU {IOU}, {KEPT} boxes kept, median ms of {args.rounds} calls.", ""]
    lines += ["| candidates of a batch | Soft-NMS | class-wise NMS | ratio |", "|---|---|---|---|"]
    for name, sizes in CASES.items():
        drawn = [part.to(args.device) for part in candidates(*sizes)]
        soft_ms, hard_ms = medians([lambda d=drawn: soft(*d), lambda d=drawn: hard(*d)], args.device, args.rounds)
        lines.append(f"| {name} | {soft_ms:.1f} | {hard_ms:.1f} | {soft_ms / hard_ms:.1f} |")
    text = "\n".join([*lines, ""])
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
