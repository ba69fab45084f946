"""Time to decode and augment large images, beside the plain way: the whole image through Pillow's own export.

    python benchmarks/images.py                      # an image of 4000 x 3000 pixels, drawn and noisy
    python benchmarks/images.py photo.jpg other.png
    python benchmarks/images.py photo.jpg --out benchmarks/results/images_cpu.md

Both ways run in turn in one process and on one thread; figures are medians of the thread's CPU time in milliseconds.
The pixels and the augmented images of both are compared, and have to be equal.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brs_detr.data.image_io import decode_image
from brs_detr.data.transforms import EvalTransforms, TrainTransforms

HEADER = "| | plain ms | here ms | faster |\n|---|---|---|---|"


def drawn_jpeg(width: int = 4000, height: int = 3000) -> bytes:
    """A JPEG of smooth colors, edges and sensor noise, about as large as a camera's."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    scene = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    scene = scene + random.normal(0, 6, scene.shape).astype(np.int16)
    stream = io.BytesIO()
    Image.fromarray(scene.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def plainly_decoded(content: bytes) -> Tensor:
    """The pixels (3, h, w) as three planes, each step over the whole image."""
    with Image.open(io.BytesIO(content)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def in_turn(ways: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median milliseconds of CPU time of each way, and what each returned."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    results = {name: way() for name, way in ways.items()}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.thread_time()
            way()
            times[name].append((time.thread_time() - start) * 1e3)
    return {name: statistics.median(taken) for name, taken in times.items()}, results


def row(title: str, ways: dict[str, Callable[[], Any]], repeats: int) -> tuple[str, dict[str, Any]]:
    """One line of the table: the plain way first, the other second."""
    medians, results = in_turn(ways, repeats)
    slow, fast = medians.values()
    return f"| {title} | {slow:.0f} | {fast:.0f} | {slow / fast:.1f}x |", results


def measure(name: str, content: bytes, repeats: int) -> list[str]:
    """The lines of one image: decoding, both policies of the COCO recipes, the resizing of a validation."""
    ways: dict[str, Callable[[], Any]] = {
        "plain": partial(plainly_decoded, content),
        "here": partial(decode_image, content, name),
    }
    line, pixels = row(f"{name}: decode", ways, repeats)
    lines = [line]
    target = {"boxes": torch.tensor([[10.0, 10, 300, 200]]), "labels": torch.tensor([0])}
    policies: dict[str, Callable[[Tensor], Tensor]] = {
        "flip, resize": lambda image: TrainTransforms(flip=1, crop=0)(image, target, torch.Generator())[0],
        "resize, crop, resize": lambda image: TrainTransforms(flip=0, crop=1)(image, target, torch.Generator())[0],
        "resize to 800": lambda image: EvalTransforms()(image, target)[0].contiguous(),
    }
    for title, policy in policies.items():
        ways = {way: partial(policy, image) for way, image in pixels.items()}
        line, results = row(f"{name}: {title}", ways, repeats)
        if not torch.equal(*results.values()):
            raise SystemExit(f"error: {name}: {title} gives other pixels")
        lines.append(line)
    if not torch.equal(*pixels.values()):
        raise SystemExit(f"error: {name}: decodes to other pixels")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, help="files of 8 bits a channel; without any, one is drawn")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the table into this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    contents = {path.name: path.read_bytes() for path in options.images} or {"4000x3000": drawn_jpeg()}
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    lines = [f"One thread, {options.repeats} turns, {versions}, {torch.backends.cpu.get_cpu_capability()}.", "", HEADER]
    for name, content in contents.items():
        lines += measure(name, content, options.repeats)
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(["# Large images", "", *lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
