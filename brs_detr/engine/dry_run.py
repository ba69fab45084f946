"""One step at the largest shape that a recipe can produce, before any time is spent on training."""

from __future__ import annotations

import resource
import time

import torch
from accelerate import Accelerator
from torch import nn

from brs_detr.ops.images import ImageBatch


def largest_step(
    model: nn.Module, accelerator: Accelerator, *, pictures: int, size: tuple[int, int], objects: int, num_classes: int
) -> str:
    """Forward and backward on noise, without an optimiser step.

    Args:
        model: prepared, in training mode afterwards.
        accelerator: of the launch.
        pictures: a process holds at once.
        size: (height, width) in pixels.
        objects: true boxes a picture, as many as the fullest picture of the dataset has.
        num_classes: labels run from 0 to num_classes - 1.

    Returns:
        A sentence with the time and the peak memory.
    """
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (pictures, 3, *size), dtype=torch.uint8, generator=generator)
    images = ImageBatch(pixels, [size] * pictures, [size] * pictures).to(device)
    targets = []
    for index in range(pictures):
        corners = torch.rand(objects, 2, 2, generator=generator) * torch.tensor([size[1], size[0]], dtype=torch.float32)
        boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1).to(device)
        labels = torch.randint(0, num_classes, (objects,), generator=generator).to(device)
        targets.append({"boxes": boxes, "labels": labels, "image_id": index})
    model.train()
    start = time.perf_counter()
    loss = torch.stack(list(model(images, targets).values())).sum()
    accelerator.backward(loss)
    value = loss.item()  # waits for the device
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return (
        f"dry run: {pictures} picture(s) of {size[1]}x{size[0]} with {objects} objects each: loss {value:.4g}, "
        f"{seconds:.2f} s, peak memory {peak_memory_gb(device):.2f} GB"
    )


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
