"""Time and memory of deformable attention: Triton's kernels beside plain torch, forward and backward. Needs a GPU.

    python benchmarks/deform_attn.py                              # the whole table
    python benchmarks/deform_attn.py --images 2 --dtypes bfloat16
    python benchmarks/deform_attn.py --tiles                      # which tile of a kernel is fastest on this GPU

Sizes are those of an 800 x 1333 image with eight heads of 32 channels and four points: the encoder's layer (every cell
is a query) on four and on five levels, and the decoder's (900 queries around boxes). Each begins from offsets and
logits, as the layer does. The implementations run in turn in one process; times are medians, measured by the GPU, of a
forward pass and of a forward and backward pass; memory is the most that is alive beyond the inputs. `kept` is what a
layer stores for the backward pass. `difference` is the largest to plain torch relative to its largest value, of the
result and the three gradients. `deformops` (PyPI) is measured where it is installed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brs_detr.ops.deform_attn import deformable_attention
from brs_detr.ops.deform_attn_op import attention_operator
from brs_detr.ops.images import level_sizes

FOUR = [(100, 167), (50, 84), (25, 42), (13, 21)]
CASES = {  # level shapes, queries or None for every cell
    "encoder, 4 levels": (FOUR, None),
    "encoder, 5 levels": ([(200, 334), *FOUR], None),
    "decoder, 4 levels": (FOUR, 900),
}
HEADS, DIM, POINTS = 8, 32, 4


class Problem(NamedTuple):
    """Arguments of `deformable_attention` and the gradient that arrives."""

    value: Tensor
    shapes: list
    references: Tensor
    offsets: Tensor
    logits: Tensor
    gradient: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.value, self.offsets, self.logits


def make_problem(shapes: list, queries: int | None, images: int, dtype: torch.dtype, device: str) -> Problem:
    """Offsets of about two cells around the queries' own cells, as a trained encoder samples; else around boxes."""
    tokens, samples = sum(h * w for h, w in shapes), HEADS * len(shapes) * POINTS
    if queries is None:
        references = torch.cat([centers(h, w) for h, w in shapes])[None, :, None].expand(images, -1, len(shapes), -1)
    else:
        references = torch.rand(images, queries, 1, 4).expand(-1, -1, len(shapes), -1) * torch.tensor([1, 1, 0.3, 0.3])
    queries = references.shape[1]
    value = torch.randn(images, tokens, HEADS, DIM, device=device, dtype=dtype)
    offsets = 2 * torch.randn(images, queries, samples * 2, device=device, dtype=dtype)
    logits, gradient = (torch.randn(images, queries, n, device=device, dtype=dtype) for n in (samples, HEADS * DIM))
    leaves = (t.requires_grad_() for t in (value, offsets, logits))
    value, offsets, logits = leaves
    return Problem(value, shapes, references.contiguous().to(device), offsets, logits, gradient)


def centers(height: int, width: int) -> Tensor:
    """(height * width, 2) centers of cells as (x, y) in [0, 1]."""
    ys, xs = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([xs, ys], -1).flatten(0, 1)


def implementations() -> dict[str, Callable[..., Tensor]]:
    """Plain torch, ours, and `deformops` where it is installed, all with the same arguments."""
    found = {"torch": deformable_attention, "triton": attention_operator}
    try:
        from deformops.registry import msda
    except ImportError:
        return found

    tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def theirs(value: Tensor, shapes: list, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        if tuple(shapes) not in tables:  # kept, as its users keep them
            sizes = torch.tensor(shapes)
            starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
            tables[tuple(shapes)] = sizes.to(value.device), starts.to(value.device)
        offsets = offsets.float().view(*offsets.shape[:2], HEADS, len(shapes), POINTS, 2)
        locations = references[:, :, None, :, None, :2] + offsets / level_sizes(shapes, offsets)[:, None]
        if references.shape[-1] == 4:
            boxes = references[:, :, None, :, None]
            locations = boxes[..., :2] + offsets * boxes[..., 2:] * (0.5 / POINTS)
        weights = logits.view(*logits.shape[:2], HEADS, -1)
        return msda(value, *tables[tuple(shapes)], locations, weights, method="softmax").flatten(2)

    return found | {"deformops": theirs}


def step(attention: Callable[..., Tensor], problem: Problem) -> list[Tensor]:
    """Result and gradients."""
    result = attention(*problem[:5])
    return [result.detach(), *torch.autograd.grad(result, problem.inputs, problem.gradient)]


def milliseconds(function: Callable[[], object]) -> float:
    """Time of one call by the GPU's clock; what was asked of it before is done, and the host is ahead of it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # about 1 ms in which the host starts all kernels of the call
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def kept_bytes(attention: Callable[..., Tensor], problem: Problem) -> int:
    """Bytes of the storages that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = attention(*problem[:5])
    del result
    return sum(kept.values())


def measure(case: str, images: int, dtype: torch.dtype, repeats: int, device: str = "cuda") -> Iterator[str]:
    """Rows of the table, one for each implementation."""
    problem = make_problem(*CASES[case], images, dtype, device)
    running, peaks, outcomes, kept, times = {}, {}, {}, {}, {}
    for name, attention in implementations().items():
        try:
            step(attention, problem)  # compiles
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            outcomes[name] = [t.float().cpu() for t in step(attention, problem)]
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            kept[name] = kept_bytes(attention, problem) / 2**20
            running[name], times[name] = attention, ([], [])
        except Exception as error:  # out of memory, or a package that cannot do this
            yield f"| {case} | {images} | {str(dtype)[6:]} | {name} | {type(error).__name__} | | | | | |"
    for _ in range(repeats):
        for name, attention in running.items():
            with torch.no_grad():
                times[name][0].append(milliseconds(lambda attention=attention: attention(*problem[:5])))
            times[name][1].append(milliseconds(lambda attention=attention: step(attention, problem)))
    base = next(iter(running))
    for name in running:
        forward, both = (statistics.median(t) for t in times[name])
        faster = statistics.median(times[base][1]) / both
        pairs = zip(outcomes[name], outcomes[base], strict=True)
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        yield (
            f"| {case} | {images} | {str(dtype)[6:]} | {name} | {forward:.2f} | {both:.2f} | {faster:.1f}x "
            f"| {peaks[name]:.0f} ({peaks[base] / peaks[name]:.1f}x less) | {kept[name]:.0f} | {error:.0e} |"
        )


def compare_tiles(repeats: int, device: str = "cuda") -> Iterator[str]:
    """Rows: a kernel's time with each tile, in an encoder layer of four levels and two images."""
    import brs_detr.ops.deform_attn_triton as module

    for dtype, kernel in product((torch.bfloat16, torch.float32), ("forward", "backward")):
        problem = make_problem(*CASES["encoder, 4 levels"], 2, dtype, device)
        arguments = [t.detach() if isinstance(t, Tensor) else t for t in problem[:5]]
        launch = module.launch_forward
        if kernel == "backward":
            arguments, launch = [problem.gradient, *arguments], module.launch_backward
        for numbers, warps in product((128, 256, 512), (1, 2, 4, 8)):
            tiles = {dtype.itemsize: module.Tile(numbers, warps)}
            module.TUNED[torch.cuda.get_device_capability()] = module.DEFAULT._replace(**{kernel: tiles})
            launch(*arguments)
            taken = statistics.median(milliseconds(lambda: launch(*arguments)) for _ in range(repeats))  # noqa: B023
            chosen = " (chosen)" if getattr(module.DEFAULT, kernel)[dtype.itemsize] == (numbers, warps) else ""
            yield f"| {kernel} | {str(dtype)[6:]} | Tile({numbers}, {warps}){chosen} | {taken:.3f} |"
        module.TUNED.clear()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiles", action="store_true", help="time the kernels with each tile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this benchmark needs a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, medians of {options.repeats} turns\n")
    if options.tiles:
        print("| kernel | dtype | tile | ms |\n|---|---|---|---|")
        for row in compare_tiles(options.repeats):
            print(row, flush=True)
        return 0
    print("| case | images | dtype | by | forward ms | with backward ms | faster | peak MB | kept MB | difference |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case, dtype, images in product(options.cases, options.dtypes, options.images):
        for row in measure(case, images, getattr(torch, dtype), options.repeats):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
