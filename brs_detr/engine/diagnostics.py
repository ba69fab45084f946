"""Try a recipe before training: a dry run at the largest shape, and a profile of a few real steps."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import sys
import time
from itertools import chain, count, islice
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from brs_detr.engine.trainer import Trainer
from brs_detr.ops.images import Batch, ImageBatch


def largest_step(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    accelerator: Accelerator,
    *,
    batch_size: int,
    accumulate: int,
    size: tuple[int, int],
    num_objects: int,
    num_classes: int,
    masks: bool = False,
) -> str:
    """Take two optimizer steps on noise; the second one, like all later ones, with the optimizer's state in memory.

    Args:
        model: prepared; its weights are changed, and it is left in training mode.
        optimizer: returned by `accelerator.prepare`.
        accelerator: of the launch.
        batch_size: images that a process holds at once.
        accumulate: batches per optimizer step; from two on, gradients are in memory during the forward pass.
        size: (height, width) in pixels.
        num_objects: ground-truth boxes per image, as many as the fullest image of the dataset has.
        num_classes: labels run from 0 to num_classes - 1.
        masks: give every object a bitmap as large as the image.

    Returns:
        A sentence with the time of the second step, the number of parameters stepped and the peak memory.
    """
    # Two accumulated batches need as much memory as more do.
    device, batches = accelerator.device, min(accumulate, 2)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    images, targets = noise_batch(batch_size, size, num_objects, num_classes, device, masks)
    model.train()
    done = 0
    for _ in range(20):  # under fp16 the scaler skips steps until its scale fits
        start = time.perf_counter()
        for batch in range(batches):  # as the trainer does: gradients stay unsharded until the last batch
            with contextlib.nullcontext() if batch + 1 == batches else accelerator.no_sync(model):
                with accelerator.autocast():
                    terms = model(images, targets)
                loss = torch.stack(list(terms.values())).sum()
                accelerator.backward(loss / batches)
        optimizer.step()
        value = loss.item()  # waits for the device
        seconds = time.perf_counter() - start
        stepped = sum(p.numel() for p in model.parameters() if p.grad is not None)
        optimizer.zero_grad()
        done += not optimizer.step_was_skipped
        if done == 2:
            break
    return (
        f"dry run: {batches} batch(es) of {batch_size} image(s) of {size[1]}x{size[0]} with {num_objects} objects "
        f"each, then an optimizer step of {stepped:,} parameters, twice: loss {value:.4g}, {seconds:.2f} s the second "
        f"time, peak memory {peak_memory_gb(device):.2f} GB"
    )


def noise_batch(
    batch_size: int,
    size: tuple[int, int],
    num_objects: int,
    num_classes: int,
    device: torch.device,
    masks: bool = False,
) -> Batch:
    """Make a batch of random pixels with random boxes and labels, always the same ones; arguments as above."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch_size, 3, *size), dtype=torch.uint8, generator=generator)
    images = ImageBatch(pixels, [size] * batch_size, [size] * batch_size).to(device)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    targets = []
    for index in range(batch_size):
        corners = torch.rand(num_objects, 2, 2, generator=generator) * extent
        boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1).to(device)
        labels = torch.randint(0, num_classes, (num_objects,), generator=generator).to(device)
        targets.append({"boxes": boxes, "labels": labels, "image_id": index})
        if masks:
            targets[-1]["masks"] = filled_masks(boxes, size)
    return images, targets


def filled_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Draw (n, h, w) uint8 bitmaps of objects that fill their boxes (n, 4) xyxy pixels."""
    rows, columns = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    inside = ((rows > y1) & (rows < y2))[:, :, None] & ((columns > x1) & (columns < x2))[:, None]
    return inside.to(torch.uint8)


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory so far in GB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return float(memory.peak_wset) / 2**30
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


WARM_UP, RECORDED = 3, 5  # steps; the first ones compile kernels and fill caches


def profile_steps(trainer: Trainer, folder: Path, rows: int = 15) -> str:
    """Train a few steps and record the last five with torch's profiler.

    Args:
        trainer: fresh; its weights are changed.
        folder: receives `trace.json.gz` (for chrome://tracing or ui.perfetto.dev) and `profile.txt`, the full table.
        rows: number of operations in the returned text.

    Returns:
        Time per step, per part and of the most expensive operations; "" in all but the main process.
    """
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    # Over several epochs, since one may have fewer batches than needed here.
    batches = chain.from_iterable(map(trainer.batches.epoch, count()))
    trainer.model.train()
    for _ in range(WARM_UP):
        trainer.step(list(islice(batches, trainer.accumulate)))
        trainer.position.step += 1
    start = time.perf_counter()
    with profile(activities=activities) as profiler:
        for _ in range(RECORDED):
            with record_function("step: waiting for data"):
                group = list(islice(batches, trainer.accumulate))
            trainer.step(group)
            trainer.position.step += 1
    seconds = (time.perf_counter() - start) / RECORDED
    if not trainer.accelerator.is_main_process:
        return ""  # all processes would write to the same files
    folder.mkdir(parents=True, exist_ok=True)
    _write_trace(profiler, folder / "trace.json.gz")
    averages, order = profiler.key_averages(), "self_device_time_total" if cuda else "self_cpu_time_total"
    (folder / "profile.txt").write_text(averages.table(sort_by=order, row_limit=-1), encoding="utf-8")
    parts = [event for event in averages if event.key.startswith("step: ")]
    on_host = [event for event in parts if event.device_type == DeviceType.CPU]  # a GPU has events of the same names
    lines = [f"{seconds:.3f} s per step under the profiler (mean of {RECORDED} steps); on the host:"]
    lines += [
        f"  {event.key.removeprefix('step: '):<18} {event.cpu_time_total / RECORDED / 1e6:8.3f} s"
        for event in sorted(on_host, key=lambda event: -event.cpu_time_total)
    ]
    expensive = sorted((e for e in averages if e not in parts), key=lambda event: -getattr(event, order))[:rows]
    lines.append(f"most expensive operations on the {'GPU' if cuda else 'CPU'}, self time per step:")
    lines += [
        f"  {e.key[:60]:<60} {getattr(e, order) / RECORDED / 1e3:9.2f} ms {e.count // RECORDED:6} x" for e in expensive
    ]
    lines.append(f"trace and full table: {folder}")
    return "\n".join(lines)


def _write_trace(profiler: profile, path: Path) -> None:
    """Export the trace as compressed JSON, which the viewers open directly."""
    plain = path.with_suffix("")
    profiler.export_chrome_trace(str(plain))
    with open(plain, "rb") as source, gzip.open(path, "wb") as target:
        shutil.copyfileobj(source, target)
    plain.unlink()
