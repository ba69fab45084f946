"""Two steps at the largest shape that a recipe can produce, before any time is spent on training."""

from __future__ import annotations

import contextlib
import resource
import time

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from brs_detr.engine.guard import Batch
from brs_detr.ops.images import ImageBatch


def largest_step(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    accelerator: Accelerator,
    *,
    pictures: int,
    accumulate: int,
    size: tuple[int, int],
    objects: int,
    num_classes: int,
) -> str:
    """Two optimiser steps on noise: the second one runs, as all later ones do, beside the optimiser's state.

    Args:
        model: prepared, in training mode and other weights afterwards.
        optimizer: returned by `accelerator.prepare`.
        accelerator: of the launch.
        pictures: a process holds at once.
        accumulate: batches of an optimiser step; from two on the gradients are kept during the forward pass.
        size: (height, width) in pixels.
        objects: true boxes a picture, as many as the fullest picture of the dataset has.
        num_classes: labels run from 0 to num_classes - 1.

    Returns:
        A sentence with the time of the second step, the number of parameters stepped and the peak memory.
    """
    device, batches = accelerator.device, min(accumulate, 2)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    images, targets = _noise(pictures, size, objects, num_classes, device)
    model.train()
    done = 0
    for _ in range(20):  # under fp16 the scaler skips steps until its scale fits
        start = time.perf_counter()
        for batch in range(batches):  # as the trainer does: before the last one sharded gradients stay whole
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
        f"dry run: {batches} batch(es) of {pictures} picture(s) of {size[1]}x{size[0]} with {objects} objects each, "
        f"then an optimiser step of {stepped:,} parameters, twice: loss {value:.4g}, {seconds:.2f} s the second time, "
        f"peak memory {peak_memory_gb(device):.2f} GB"
    )


def _noise(pictures: int, size: tuple[int, int], objects: int, num_classes: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (pictures, 3, *size), dtype=torch.uint8, generator=generator)
    images = ImageBatch(pixels, [size] * pictures, [size] * pictures).to(device)
    targets = []
    for index in range(pictures):
        corners = torch.rand(objects, 2, 2, generator=generator) * torch.tensor([size[1], size[0]], dtype=torch.float32)
        boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1).to(device)
        labels = torch.randint(0, num_classes, (objects,), generator=generator).to(device)
        targets.append({"boxes": boxes, "labels": labels, "image_id": index})
    return images, targets


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
