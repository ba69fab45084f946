"""What one training step costs: seconds, memory, operations that start kernels on a GPU, and waits for it, by section.

    python benchmarks/step.py configs/brs_detr_r50_12e_coco.yaml --images 2 --size 480x640
    python benchmarks/step.py configs/brs_detr_r50_12e_coco.yaml --images 2 8 --count --fused
    python benchmarks/step.py configs/cnn/atss_r50_focal_12e_coco.yaml --images 2 --size 480x640
    python benchmarks/step.py configs/brs_detr_r50_12e_coco.yaml --images 2 --size 480x640 --beside transformers
    python benchmarks/step.py configs/brs_detr_r50_12e_coco.yaml train.precision=bf16 --device cuda --fused

The step is that of `engine/trainer.py`: copies to the device, forward, backward, clipping, the check for numbers that
are not finite, optimizer. Random weights, images of noise, about 7 objects an image (COCO's mean) in random places, all
from fixed seeds; with `--data` the first batch of a dataset, augmented as the recipe says. On a CPU seconds are its own
time in all threads, the fastest of several steps, and memory is what operations create beyond model, optimizer and
batch. The shares are those of the time inside operations, measured in a step of its own.

Operations and waits are those of a GPU, which need not be there: see `counting.py`. `--fused` counts the kernels of
`model.deformable_attention=triton`: one operation forward, and backward one besides the zeros that it adds to.
`--count` leaves the times out. Two numbers of images also give what each further image adds. Counts do not depend on
the widths of the layers, so `model.dim=64 model.ffn_dim=32 model.roi.fc_dim=32` counts large images in less time.

With `--device cuda` seconds are those between two events, memory is the allocator's, kernels are the profiler's, and
waits those that CUDA reports: see `real_gpu.py`.

`--beside transformers` compares the recipe without auxiliary heads with that library's two-stage Deformable DETR of the
same sizes, both with the recipe's backbone, optimizer and batch, taking turns: forward, backward, optimizer.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchvision
from accelerate import Accelerator
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import real_gpu
from counting import DEVICE, PeakMemory, StepCounter, on_device
from sections import Wait

from brs_detr.commands.arguments import height_and_width, positive
from brs_detr.commands.benchmark import landscape
from brs_detr.config import Config, load_config
from brs_detr.data.build import open_train_set
from brs_detr.data.loader import EpochBatches, build_train_loader
from brs_detr.engine.batch_plan import TrainingLength
from brs_detr.engine.diagnostics import filled_masks
from brs_detr.engine.distributed import to_device
from brs_detr.engine.optim import Schedule, build_optimizer
from brs_detr.engine.trainer import Trainer
from brs_detr.models.build import build_model
from brs_detr.models.transformer.attention import DeformableAttention, Sampling
from brs_detr.ops.images import Batch, ImageBatch, Size
from brs_detr.ops.targets import check_targets
from brs_detr.run.setup import freeze

OBJECTS = (7, 4, 11, 6, 9, 2, 8, 9)  # of successive images; COCO's mean is 7.3
Step = Callable[[], object]


class ImaginedGPU(Accelerator):
    """An accelerator whose device is the imagined GPU."""

    @property
    def device(self) -> torch.device:
        """Say where the trainer sends its batches."""
        return DEVICE


def generated_batch(count: int, size: Size, num_classes: int, masks: bool = False) -> Batch:
    """Make images of noise with objects of a twentieth to a half of their sides, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    side = torch.tensor([width, height])
    pixels = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    targets: list[dict[str, Any]] = []
    for image in range(count):
        objects = OBJECTS[image % len(OBJECTS)]
        extent = side * 10 ** -(0.3 + torch.rand(objects, 2, generator=generator))
        corner = torch.rand(objects, 2, generator=generator) * (side - extent)
        boxes = torch.cat([corner, corner + extent], dim=1)
        labels = torch.randint(0, num_classes, (objects,), generator=generator)
        targets.append({"boxes": boxes, "labels": labels, "image_id": image})
        if masks:
            targets[-1]["masks"] = filled_masks(boxes, size)
    return ImageBatch(pixels, [size] * count, [size] * count), targets


def first_batch(config: Config, count: int) -> tuple[Batch, int, float]:
    """Read the first batch of the recipe's training data; return it, the number of classes and the seconds it took."""
    train_set = open_train_set(config.data, config.seed, config.model.has_masks)
    loader = build_train_loader(train_set, count, seed=config.seed)
    start = time.process_time()
    batch = next(EpochBatches(loader).epoch(0))
    return batch, train_set.num_classes, time.process_time() - start


def build_step(config: Config, batch: Batch, num_classes: int, accelerator: Accelerator, model: nn.Module) -> Step:
    """Return the trainer's step of one batch.

    Args:
        config: of the recipe.
        batch: on the host.
        num_classes: of the labels.
        accelerator: whose device the step runs on.
        model: on that device.
    """
    optimizer = build_optimizer(config.optim, model)
    placement = [False, False]  # the model lies where it should
    model, prepared = accelerator.prepare(model.train(), optimizer, device_placement=placement)
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=prepared,
        schedule=Schedule("cosine", 1000),
        batches=(),  # type: ignore[arg-type]
        folder=Path("."),
        log=SimpleNamespace(),  # type: ignore[arg-type]
        config=config.train,
        length=TrainingLength(1, 1000, 1),
        accumulate=1,
        seed=config.seed,
        clip_norm=config.optim.clip_norm,
        metadata={},
        validate=None,
        save=lambda *_: None,
        check_targets=partial(check_targets, num_classes=num_classes),
    )
    return partial(trainer.step, [batch])


def build(config: Config, num_classes: int) -> nn.Module:
    """Build the recipe's detector with random weights, its frozen parts frozen."""
    torch.manual_seed(0)
    model = build_model(config.model, num_classes)
    freeze(model, config)
    return model


class FusedStandIn(torch.autograd.Function):
    """Computes the readable attention and counts the operations of the fused one."""

    @staticmethod
    def forward(ctx: Any, counter: StepCounter, readable: Sampling, *args: Any) -> Tensor:  # type: ignore[override]
        """Count the kernel."""
        with counter.stand_in("fused attention"), torch.enable_grad():
            ctx.counter, ctx.where = counter, [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
            own: list[Any] = [
                x.detach().requires_grad_(i in ctx.where) if isinstance(x, Tensor) else x for i, x in enumerate(args)
            ]
            ctx.inputs, ctx.out, ctx.count = [own[i] for i in ctx.where], readable(*own), len(args)
            return counter.put(ctx.out.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Count the kernel, and the zeros that its atomic additions begin with."""
        with ctx.counter.stand_in("fused attention, backward", operations=2):
            found = torch.autograd.grad(ctx.out, ctx.inputs, gradient)
            gradients = dict(zip(ctx.where, (ctx.counter.put(x.detach()) for x in found), strict=True))
        return None, None, *(gradients.get(i) for i in range(ctx.count))


def count_fused(model: nn.Module, counter: StepCounter) -> None:
    """Make all deformable attention of a model count as fused kernels do."""
    for module in model.modules():
        if isinstance(module, DeformableAttention):
            readable = module.sampling
            module.sampling = partial(FusedStandIn.apply, counter, readable)


def count_step(config: Config, batch: Batch, num_classes: int, fused: bool = False) -> StepCounter:
    """Count the second step of a detector, with the optimizer's state in memory, on the imagined GPU."""
    model, counter = on_device(build(config, num_classes)), StepCounter()
    if fused:
        count_fused(model, counter)
    with counter:
        step = build_step(config, batch, num_classes, ImaginedGPU(cpu=True), model)
        step()
        counter.reset()
        step()
    return counter


def section_lines(counter: StepCounter | real_gpu.Kernels, timed: bool) -> list[str]:
    """Return the table of sections."""
    names = sorted(
        {*counter.forward, *counter.backward}, key=lambda name: -counter.forward[name] - counter.backward[name]
    )
    total = sum(counter.seconds.values())
    more = " share of time | of which backward |" if timed else ""
    lines = [f"| section | forward | backward |{more}", f"|---|---|---|{'---|---|' if timed else ''}"]
    for name in names:
        line = f"| {name} | {counter.forward[name]:,} | {counter.backward[name]:,} |"
        if timed:
            both, backward = counter.seconds[name], counter.backward_seconds[name]
            line += f" {100 * both / total:.1f} % | {100 * backward / total:.1f} % |"
        lines.append(line)
    return [*lines, f"| all {counter.total:,} | {counter.forward.total():,} | {counter.backward.total():,} |"]


def wait_lines(title: str, waits: Counter[Wait]) -> list[str]:
    """Return the number of waits and their places."""
    return [f"{title}: {waits.total()}", *(f"    {number} x {wait}" for wait, number in sorted(waits.items()))]


def time_on_cpu(steps: Sequence[Step], repeats: int) -> list[tuple[float, int]]:
    """Return the least CPU seconds of each step, all taking turns, and the bytes that one creates."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats + 1):
        for own, step in zip(seconds, steps, strict=True):
            start = time.process_time()
            step()
            own.append(time.process_time() - start)
    peaks = []
    for step in steps:
        with PeakMemory() as memory:
            step()
        peaks.append(memory.peak)
    return [(min(own[1:]), peak) for own, peak in zip(seconds, peaks, strict=True)]


def time_on_gpu(steps: Sequence[Step], repeats: int) -> list[tuple[float, int]]:
    """Return the median seconds of each step, all taking turns, and the bytes that one allocates."""
    for step in [*steps] * 3:
        step()
    turns = [[real_gpu.seconds_of(step, 1) for step in steps] for _ in range(repeats)]
    return [(statistics.median(own), real_gpu.bytes_of(step)) for own, step in zip(zip(*turns), steps, strict=True)]


def measure(config: Config, batch: Batch, num_classes: int, args: argparse.Namespace) -> int:
    """Print what a step of one batch costs; return its operations, or its kernels on a GPU."""
    if args.device == "cuda" or not args.count:
        accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=config.train.precision)
        model = build(config, num_classes).to(accelerator.device)
        step = build_step(config, batch, num_classes, accelerator, model)
        timed = time_on_cpu if args.device == "cpu" else time_on_gpu
        ((seconds, memory),) = timed([step], args.repeats)
        unit = "CPU seconds" if args.device == "cpu" else "seconds"
        print(f"a step takes {seconds:.3g} {unit}, at its peak {memory / 2**20:,.0f} MB")
    if args.device == "cuda":
        kernels, waits = real_gpu.kernels_of(step), real_gpu.waits_of(step)
        print("\n".join([*section_lines(kernels, timed=True), *wait_lines("waits", waits)]))
        print(f"kernels run in {100 * sum(kernels.seconds.values()) / seconds:.0f} % of the step's time", flush=True)
        return kernels.total
    counter = count_step(config, batch, num_classes, args.fused)
    print("\n".join(section_lines(counter, timed=not args.count)))
    print("\n".join(wait_lines("waits for a result", counter.waits)))
    print("\n".join(wait_lines("copies to the device that wait until they are made", counter.copies)), flush=True)
    return counter.total


def plain_step(config: Config, model: nn.Module, batch: Batch) -> Step:
    """Return forward, backward and optimizer step of any model that takes batches of this project."""
    optimizer = build_optimizer(config.optim, model.train())

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(model(*batch).values())).sum().backward()
        optimizer.step()

    return step


def compare(config: Config, batch: Batch, num_classes: int, args: argparse.Namespace) -> None:
    """Print the recipe without auxiliary heads beside transformers' Deformable DETR."""
    from other_libraries import TransformersDetector

    batch = batch[0].to(args.device), to_device(batch[1], torch.device(args.device))
    torch.manual_seed(0)
    models = {"transformers": TransformersDetector(config, num_classes), "brs_detr": build(config, num_classes)}
    steps = [plain_step(config, model.to(args.device), batch) for model in models.values()]
    timed = time_on_cpu if args.device == "cpu" else time_on_gpu
    (first, most), *_ = results = timed(steps, args.repeats)
    print("| model | parameters | seconds a step | peak MB |\n|---|---|---|---|")
    for (name, model), (seconds, memory) in zip(models.items(), results, strict=True):
        size = f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f} M"
        ratios = f"{seconds / first:.2f}x", f"{memory / most:.2f}x"
        print(f"| {name} | {size} | {seconds:.3g} ({ratios[0]}) | {memory / 2**20:,.0f} ({ratios[1]}) |", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a recipe")
    parser.add_argument("overrides", nargs="*", help="settings, such as model.loss=focal")
    parser.add_argument("--images", type=positive, nargs="+", default=[2], help="of a batch; one number or several")
    parser.add_argument("--size", type=height_and_width, help="HxW pixels; default: that of the recipe's validation")
    parser.add_argument("--count", action="store_true", help="on a CPU: only count, take no times")
    parser.add_argument("--fused", action="store_true", help="fused kernels of deformable attention")
    parser.add_argument("--beside", choices=["transformers"], help="compare with another library instead")
    parser.add_argument("--data", type=Path, help="folder of a dataset (data.root) instead of generated images")
    parser.add_argument("--classes", type=positive, default=80, help="of the generated objects")
    parser.add_argument("--repeats", type=positive, default=2)
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser.parse_args()


def settings(args: argparse.Namespace) -> list[str]:
    """Return the overrides of the recipe; those of the command line come last."""
    chosen = ["model.backbone.pretrained=false", "data.workers=0"]
    if args.device == "cpu":
        chosen.append("train.precision=no")
    if args.fused and args.device == "cuda":
        chosen.append("model.deformable_attention=triton")
    if args.beside:
        chosen.append("model.aux_heads=[]")
    if args.data is not None:
        chosen.append(f"data.root={args.data}")
    return [*chosen, *args.overrides]


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    config = load_config(args.config, settings(args))
    size = args.size or landscape(config.data.test_short_side, config.data.test_long_side)
    device = f"{args.threads} CPU thread(s)" if args.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{' '.join([str(args.config), *args.overrides])}; {'fused' if args.fused else 'readable'} sampling; {device}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}; "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}"
    )
    totals: dict[int, int] = {}
    for images in args.images:
        classes, loading = args.classes, ""
        if args.data is None:
            batch = generated_batch(images, size, classes, config.model.has_masks)
        else:
            batch, classes, seconds = first_batch(config, images)
            loading = f", read and augmented in {seconds:.2f} CPU seconds"
        height, width = batch[0].padded_size
        objects = sum(len(target["boxes"]) for target in batch[1])
        print(f"\n{images} image(s) of {height}x{width} (height x width) with {objects} objects{loading}", flush=True)
        if args.beside:
            compare(config, batch, classes, args)
        else:
            totals[images] = measure(config, batch, classes, args)
    if len(totals) > 1:
        (few, least), *_, (many, most) = sorted(totals.items())
        print(f"\neach further image adds {(most - least) / (many - few):.0f}")


if __name__ == "__main__":
    main()
