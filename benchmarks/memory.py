"""What fits into a GPU: memory of a training step at full image size, computed on a CPU from steps at smaller ones.

    python benchmarks/memory.py configs/co_dino_r50_12e_coco.yaml --images 2
    python benchmarks/memory.py configs/co_dino_swin_l_lsj_12e_coco.yaml train.precision=bf16 --images 1

No GPU is needed, and none has confirmed the figures. Random weights; the step is that of `step.py`. Counted at each of
`--sizes` are the bytes of all tensors that operations create and keep, at their peak, gradients included. Attention is
that of fused kernels: deformable attention keeps its inputs, attention its inputs and its result. Products of matrices
and convolutions are not computed, since their sizes are all that matters: they give zeros.

Nearly all of these bytes grow with the number of pixels, the rest (decoder, regions, gradients) not at all, so the line
through the two largest sizes gives the peak at `--at`; the smallest size, through which it was not drawn, says how
straight it is. Where little is kept, as with activation checkpointing, small images have their peak in another part of
the step than large ones: there let the largest of `--sizes` be that of `--at`. Added are the parameters and the state
of the optimizer.

Not in it: the CUDA context, workspaces of its libraries, gaps of the allocator. A card therefore counts as large enough
if a tenth of it is left.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from counting import PeakMemory
from step import build, build_step, generated_batch

from brs_detr.commands.arguments import height_and_width, positive
from brs_detr.commands.benchmark import landscape
from brs_detr.config import Config, load_config
from brs_detr.models.transformer.attention import use_sampling
from brs_detr.ops.deform_attn_op import attention_operator
from brs_detr.ops.images import Size

CARDS = (24, 40, 80)  # GiB
SIZES = ((256, 384), (384, 384), (384, 768))  # the larger two of full windows of Swin Transformers at all strides
FREE = 0.1  # share of a card that is left to what is not counted
FIRST = (128, 128)  # of the step before those that are counted, in which the optimizer's state is made
PRODUCTS = {
    *("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"),
    *("deformable_attention", "deformable_attention_backward"),
}


class WithoutProducts(TorchDispatchMode):
    """Gives zeros in place of products, convolutions and deformable attention: only their sizes matter here."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or only work out what its results look like."""
        if operation._schema.name.split("::")[1] not in PRODUCTS:
            return operation(*args, **(kwargs or {}))
        shapes = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs or {}))
        results = operation(*shapes[0], **shapes[1])
        return tree_map(lambda x: torch.zeros_like(x, device="cpu") if isinstance(x, Tensor) else x, results)


class KeptByAttention(torch.autograd.Function):
    """Keeps what a fused kernel of attention keeps, and gives zeros."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:  # type: ignore[override]
        """Keep inputs and result."""
        out = torch.zeros_like(query)
        ctx.save_for_backward(query, key, value, mask, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Give each input that needs one a gradient."""
        inputs = ctx.saved_tensors[:4]
        return tuple(
            torch.zeros_like(x) if need else None for x, need in zip(inputs, ctx.needs_input_grad, strict=True)
        )


class WithFusedAttention(TorchFunctionMode):
    """Puts `KeptByAttention` in place of torch's attention, which on a CPU may keep the weights of all pairs."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs)
        return KeptByAttention.apply(*args[:3], args[3] if len(args) > 3 else kwargs.get("attn_mask"))


def peaks_of(config: Config, images: int, sizes: Sequence[Size], num_classes: int) -> tuple[list[int], int]:
    """Return the bytes that a training step creates at its peak, for each size, and those that are there before it."""
    accelerator = Accelerator(cpu=True, mixed_precision=config.train.precision)
    model = build(config, num_classes)
    use_sampling(model, attention_operator)
    peaks = []
    with WithoutProducts(), WithFusedAttention():
        first = generated_batch(images, FIRST, num_classes)
        step = cast("partial[object]", build_step(config, first, num_classes, accelerator, model))
        step()
        for size in sizes:
            batch = generated_batch(images, size, num_classes)
            with PeakMemory() as memory:
                step.func([batch])
            peaks.append(memory.peak)
    tensors = [*model.parameters(), *model.buffers()]
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    moments = 1 if config.optim.name == "sgd" else 2
    return peaks, sum(t.numel() * t.element_size() for t in tensors) + moments * trained


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the slope and the intercept of the line through the last two points."""
    (x1, y1), (x2, y2) = points[-2:]
    slope = (y2 - y1) / (x2 - x1)
    return slope, y2 - slope * x2


def cards_for(total: float) -> str:
    """Return the cards that hold so many bytes."""
    fitting = [f"{card} GB" for card in CARDS if total <= (1 - FREE) * card * 2**30]
    return ", ".join(fitting) or f"more than {CARDS[-1]} GB"


def settings(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of the recipe; those of the command line come last."""
    return ["model.backbone.pretrained=false", "data.workers=0", *overrides]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a recipe")
    parser.add_argument("overrides", nargs="*", help="settings, such as train.precision=bf16")
    parser.add_argument("--images", type=positive, default=2, help="of a batch on one GPU")
    parser.add_argument(
        "--sizes", type=height_and_width, nargs="+", default=list(SIZES), help="to count at, HxW pixels"
    )
    parser.add_argument(
        "--at", type=height_and_width, nargs="+", help="HxW pixels; default: of the recipe's validation"
    )
    parser.add_argument("--checkpointing", choices=["no", "yes"], help="only this one of activation checkpointing")
    parser.add_argument("--classes", type=positive, default=80)
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads")
    args = parser.parse_args()
    if len(args.sizes) < 2:
        parser.error("--sizes: a line needs two")
    return args


def full_size(config: Config) -> Size:
    """Return the size of the recipe's images."""
    if config.data.test_canvas is not None:
        return config.data.test_canvas, config.data.test_canvas
    return landscape(config.data.test_short_side, config.data.test_long_side)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    recipe, day = " ".join([str(args.config), *args.overrides]), time.strftime("%Y-%m-%d", time.gmtime())
    print(f"{recipe}; {args.images} image(s), torch {torch.__version__}; {day}")
    base = load_config(args.config, settings(args.overrides))
    at = args.at or [full_size(base)]
    columns = ["activation checkpointing", *(f"{h}x{w}" for h, w in at), "fits into", "off at the smallest"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for recompute in (False, True) if args.checkpointing is None else (args.checkpointing == "yes",):
        chosen = settings([*args.overrides, f"model.backbone.activation_checkpointing={recompute}".lower()])
        config = load_config(args.config, chosen)
        sizes = sorted(args.sizes, key=lambda size: size[0] * size[1])
        peaks, fixed = peaks_of(config, args.images, sizes, args.classes)
        points = [(h * w, peak) for (h, w), peak in zip(sizes, peaks, strict=True)]
        slope, rest = line_through(points)
        totals = [slope * h * w + rest + fixed for h, w in at]
        off = f"{100 * ((slope * points[0][0] + rest) / points[0][1] - 1):+.1f} %" if len(points) > 2 else "-"
        cells = [f"{total / 2**30:.1f} GB" for total in totals]
        line = ["yes" if recompute else "no", *cells, "; ".join(map(cards_for, totals)), off]
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
