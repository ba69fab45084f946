"""Time and memory of deformable sampling: the Triton kernels beside plain torch, forward and backward. Needs a GPU.

    python benchmarks/deform_attn.py
    python benchmarks/deform_attn.py --images 2 --dtype bfloat16

Sizes are those of an 800 x 1333 image with eight heads of 32 channels and four points: the encoder's layer (every
cell is a query) on four and on five levels, and the decoder's (300 queries). Both run in turn in one process; times are
medians, memory is the most that is alive beyond the inputs. The last column is the largest difference relative to the
largest value, of the result and the three gradients.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brs_detr.ops.deform_attn import deformable_sampling

FOUR = [(100, 167), (50, 84), (25, 42), (13, 21)]
FIVE = [(200, 334), *FOUR]
CASES = {"encoder, 4 levels": (FOUR, None), "encoder, 5 levels": (FIVE, None), "decoder, 4 levels": (FOUR, 300)}
HEADS, DIM, POINTS = 8, 32, 4


def problem(shapes: list, queries: int | None, images: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Inputs near the queries' own cells, as a trained encoder samples, and the gradient that arrives."""
    tokens = sum(h * w for h, w in shapes)
    centers = torch.cat([grid(h, w) for h, w in shapes]) if queries is None else torch.rand(queries, 2)
    spread = torch.randn(images, len(centers), HEADS, len(shapes), POINTS, 2)
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)
    locations = centers[:, None, None, None] + 2 * spread / sizes[:, None]
    weights = torch.rand(images, len(centers), HEADS, len(shapes) * POINTS).softmax(-1)
    inputs = [
        torch.randn(images, tokens, HEADS, DIM, dtype=dtype),
        locations,
        weights.unflatten(-1, (len(shapes), POINTS)),
    ]
    gradient = torch.randn(images, len(centers), HEADS * DIM, dtype=dtype)
    return [tensor.cuda().requires_grad_() for tensor in inputs], gradient.cuda()


def grid(height: int, width: int) -> Tensor:
    """(height * width, 2) centers of cells as (x, y) in [0, 1]."""
    ys, xs = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([xs, ys], -1).flatten(0, 1)


def measure(case: str, images: int, dtype: torch.dtype, repeats: int) -> str:
    """One line of the table."""
    from brs_detr.ops.deform_attn_triton import triton_sampling

    shapes, queries = CASES[case]
    inputs, gradient = problem(shapes, queries, images, dtype)

    def step(sampling) -> list[Tensor]:
        result = sampling(inputs[0], shapes, *inputs[1:])
        return [result.detach(), *torch.autograd.grad(result, inputs, gradient)]

    both = {"torch": deformable_sampling, "triton": triton_sampling}
    times: dict[str, list[float]] = {name: [] for name in both}
    peaks, outcomes = {}, {}
    for name, sampling in both.items():
        step(sampling)  # compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcomes[name] = step(sampling)
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    for _ in range(repeats):
        for name, sampling in both.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            step(sampling)
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*reversed(outcomes.values()), strict=True))
    slow, fast = (statistics.median(times[name]) for name in both)
    return (
        f"| {case} | {slow:.2f} | {fast:.2f} | {peaks['torch']:.0f} | {peaks['triton']:.0f} "
        f"| {slow / fast:.1f}x | {peaks['torch'] / peaks['triton']:.1f}x | {error:.0e} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this benchmark needs a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {device}, {options.images} image(s), {options.dtype}, {options.repeats} turns")
    print("| | torch ms | Triton ms | torch MB | Triton MB | faster | less memory | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        print(measure(case, options.images, getattr(torch, options.dtype), options.repeats), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
