"""What the framework does for speed: one decoder pass, folded norms, `channels_last`, `train.compile=layers`.

    python benchmarks/framework.py brs_detr_r50_12e_coco --size 192 256
    python benchmarks/framework.py brs_detr_r50_12e_coco --only norms channels_last --size 800 1333 --images 2
    python benchmarks/framework.py demo --size 80 80 --images 8 --only compile

Both ways run in turn in one process on the same input; figures are medians, and in brackets those of the fastest run:
on a GPU of the time on the clock, elsewhere of the process's CPU time. `decoder` is a forward and backward pass of all
query sets of a training step, on random tokens; `norms` and `channels_last` are those of the backbone, `compile` a step
of the detector without the optimizer, after the step that compiles.
"""

import argparse
import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from counting import starts_kernel

from brs_detr.config import load_config
from brs_detr.engine.compilation import compile_layers, uncompiled
from brs_detr.models.backbones.norms import FrozenBatchNorm
from brs_detr.models.backbones.timm_backbone import build_backbone
from brs_detr.models.build import build_model
from brs_detr.models.config import BRSDETRConfig
from brs_detr.models.model_config import ModelConfig
from brs_detr.models.transformer.decoder import Predictions, QueryDecoder
from brs_detr.models.transformer.encoder import Memory
from brs_detr.ops.images import ImageBatch

Way = Callable[[], object]
HEADER = "| | operations | ms | operations | ms | faster |\n|---|---|---|---|---|---|"


class Operations(TorchDispatchMode):
    """Counts the operations that start a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += starts_kernel(function)
        return function(*args, **(kwargs or {}))


def milliseconds(way: Way, device: torch.device) -> float:
    """Time of one call."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) * 1e3


def compare(title: str, before: Way, after: Way, device: torch.device, repeats: int, *, counted: bool = True) -> str:
    """One line of the table; `counted` is false where a compiled graph hides its operations."""
    ways, counts = (before, after), []
    for way in ways:  # compiles, folds and fills caches
        way()
        with Operations() if counted else contextlib.nullcontext() as operations:
            way()
        counts.append("" if operations is None else f"{operations.count:,}")
    turns = [[milliseconds(way, device) for way in ways] for _ in range(repeats)]
    slow, fast = (list(column) for column in zip(*turns, strict=True))
    ratio = statistics.median(slow) / statistics.median(fast)
    shown = [f"{statistics.median(times):,.0f} ({min(times):,.0f})" for times in (slow, fast)]
    return f"| {title} | {counts[0]} | {shown[0]} | {counts[1]} | {shown[1]} | {ratio:.2f}x |"


@contextlib.contextmanager
def folding_each_pass() -> Iterator[None]:
    """Make frozen norms compute their scale and shift in every pass, as in the plain formula."""
    kept = FrozenBatchNorm._scale_and_shift
    try:
        FrozenBatchNorm._scale_and_shift = FrozenBatchNorm._fold  # type: ignore[method-assign]
        yield
    finally:
        FrozenBatchNorm._scale_and_shift = kept  # type: ignore[method-assign]


def backward_of(backbone: nn.Module, x: Tensor, inside: AbstractContextManager[None] | None = None) -> None:
    """Forward and backward pass of a backbone."""
    with inside or contextlib.nullcontext():
        maps: list[Tensor] = backbone(x)
        torch.stack([level.float().square().mean() for level in maps]).sum().backward()


def norms(model: ModelConfig, x: Tensor, repeats: int) -> str:
    """The backbone with frozen norms, folded in each pass and kept."""
    backbone = build_backbone(dataclasses.replace(model.backbone, norm="frozen")).to(x.device)
    ways = (lambda: backward_of(backbone, x, folding_each_pass())), (lambda: backward_of(backbone, x))
    return compare("frozen norms: folded in each pass, kept", *ways, x.device, repeats)


def channels_last(model: ModelConfig, x: Tensor, repeats: int) -> str:
    """The backbone in both layouts."""
    settings = [dataclasses.replace(model.backbone, channels_last=last) for last in (False, True)]
    plain, last = (build_backbone(setting).to(x.device) for setting in settings)
    ways = (lambda: backward_of(plain, x)), (lambda: backward_of(last, x))
    return compare("`model.backbone.channels_last`: false, true", *ways, x.device, repeats)


def decoder(model: ModelConfig, x: Tensor, repeats: int) -> str:
    """The main and auxiliary query sets in a decoder pass each, and in one pass together."""
    if not isinstance(model, BRSDETRConfig):
        raise SystemExit("decoder: this recipe's detector has none. Name another recipe or other parts with --only.")
    sizes = {"layers": model.decoder_layers, "heads": model.heads, "levels": model.levels, "points": model.points}
    layers = QueryDecoder(model.dim, 80, hidden=model.ffn_dim, **sizes).to(x.device)
    strides = [model.backbone.levels[0] * 2**level for level in range(model.levels)]
    shapes = [(math.ceil(x.shape[2] / stride), math.ceil(x.shape[3] / stride)) for stride in strides]
    tokens = torch.randn(len(x), sum(h * w for h, w in shapes), model.dim, device=x.device, requires_grad=True)
    whole = torch.ones(len(x), model.levels, 2, device=x.device)
    cells = torch.tensor([[w, h] for h, w in shapes], device=x.device).float().expand(len(x), -1, -1)
    memory = Memory(tokens, torch.zeros(tokens.shape[:2], dtype=torch.bool, device=x.device), shapes, cells, whole)
    counts = [model.queries, *[model.max_aux_queries] * len(model.aux_heads)]
    content, position = torch.randn(2, len(x), sum(counts), model.dim, device=x.device).unbind()
    references = torch.rand(len(x), sum(counts), 4, device=x.device) * 0.8 + 0.1
    sets = list(zip(*(part.split(counts, 1) for part in (content, position, references)), strict=True))

    def backward(predictions: Sequence[Predictions]) -> None:
        torch.stack([(one.logits.float().mean() + one.boxes.mean()) for one in predictions]).sum().backward()

    def apart() -> None:
        backward([layers(*one, memory) for one in sets])

    def together() -> None:
        backward(layers(content, position, references, memory, counts).split(counts))

    title = f"decoder, sets of {', '.join(map(str, counts))} queries: a pass each, one pass"
    return compare(title, apart, together, x.device, repeats)


def compiled(model: ModelConfig, x: Tensor, repeats: int) -> str:
    """A step of the detector with its layers as they are written and compiled."""
    torch.manual_seed(0)
    detector = build_model(model, 80).to(x.device).train()
    corners = torch.rand(len(x), 8, 2, 2) * torch.tensor([x.shape[3], x.shape[2]])
    boxes = torch.cat([corners.amin(2), corners.amax(2) + 1], -1)
    targets = [{"boxes": own.to(x.device), "labels": torch.arange(8, device=x.device)} for own in boxes]
    size = (x.shape[2], x.shape[3])
    batch = ImageBatch((x * 50 + 128).clamp(0, 255), [size] * len(x), [size] * len(x))

    def step() -> None:
        torch.stack(list(detector(batch, targets).values())).sum().backward()

    def plain_step() -> None:
        with uncompiled(detector):
            step()

    count = compile_layers(detector)
    begun = time.perf_counter()
    step()
    print(f"first step with {count} layers compiled: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return compare("`train.compile`: none, layers", plain_step, step, x.device, repeats, counted=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--only", nargs="+", choices=["decoder", "norms", "channels_last", "compile"])
    parser.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    recipe = Path(__file__).resolve().parents[1] / "configs" / f"{options.recipe}.yaml"
    model = load_config(recipe if recipe.is_file() else options.recipe, ["model.backbone.pretrained=false"]).model
    torch.manual_seed(0)
    x = torch.randn(options.images, 3, *options.size, device=device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    images = f"{options.images} x {options.size[0]}x{options.size[1]}"
    versions = f"torch {torch.__version__}, {options.repeats} turns"
    print(f"{options.recipe}, {images}, {options.precision}, {name}, {versions}\n\n{HEADER}", flush=True)
    parts = {"decoder": decoder, "norms": norms, "channels_last": channels_last, "compile": compiled}
    with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
        for part in options.only or parts:
            print(parts[part](model, x, options.repeats), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
