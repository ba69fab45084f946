"""The user's own augmentation: `data.augment.custom=package.module:name`.

The name is of a torchvision v2 transform, or of any function called like one:

    name(image, target) -> (image, target)

`image` is a `tv_tensors.Image` (3, H, W) uint8; `target` a dict of "boxes", `tv_tensors.BoundingBoxes` (n, 4) XYXY
pixels, "labels" (n,) int64 and, for detectors with masks and for copy-paste, "masks", a `tv_tensors.Mask` (n, H, W)
uint8. It is applied first, to the image as it is stored, and may change its size and drop objects.

The random numbers of torch, NumPy and `random` are seeded for each image from the loader's generator, and put back
afterwards: what they give depends on seed, epoch and image alone. Other generators must be seeded from one of these.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from brs_detr.data.coco import Target
from brs_detr.exit_codes import Failure

_SETTING = "data.augment.custom"
_ROUNDING = 0.5  # pixels that a box may stick out: it is clipped then; more is a box that did not follow its image


class CustomAugmentError(Failure, ValueError):
    """A custom augmentation that cannot be imported or returns what cannot be trained on.

    A data loader passes on a worker's error as its traceback with the message at the end: only the message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class CustomTransform:
    """Call the user's transform with tv_tensors, and check what it returns.

    Args:
        name: `package.module:name`, which is imported: of the installed packages or of the working directory.

    Raises:
        CustomAugmentError: it cannot be imported.
    """

    def __init__(self, name: str) -> None:
        self.name, self.transform = name, _import(name)

    def __reduce__(self) -> tuple[Any, ...]:
        # a started worker imports it again: what users write need not be picklable
        return CustomTransform, (self.name,)

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """Augment one image; arguments and result as of `TrainTransforms`.

        Raises:
            CustomAugmentError: the transform failed, or what it returned cannot be trained on.
        """
        image = image.contiguous()  # what users write may call `view`
        given = _as_tv_tensors(image, target)
        seed = int(torch.randint(2**31, (), generator=generator))
        with _seeded(seed):
            try:
                returned = self.transform(tv_tensors.Image(image), given)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise self._failure(target, f"failed with {type(error).__name__}: {reason}") from error
        try:
            pixels, objects = _checked(returned, "masks" in target)
        except ValueError as error:
            raise self._failure(target, str(error)) from None
        return pixels, {**target, **objects}

    def _failure(self, target: Target, fact: str) -> CustomAugmentError:
        return CustomAugmentError(f"{_SETTING}={self.name}: on image {target.get('image_id', '?')} it {fact}.")


def _import(name: str) -> Callable[..., Any]:
    """Import the user's transform.

    Raises:
        CustomAugmentError: there is no such module or name, or it is not callable.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    added = here not in sys.path  # installed programs do not look into the working directory
    if added:
        sys.path.append(here)
    try:
        value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except Exception as error:  # the module's own code may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CustomAugmentError(
            f"{_SETTING}={name}: cannot be imported ({reason}). Write package.module:name of a module that is "
            f"installed or lies in {here}."
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    if isinstance(value, type) or not callable(value):
        kind = "a class; name an instance or a function" if isinstance(value, type) else f"a {type(value).__name__}"
        raise CustomAugmentError(f"{_SETTING}={name}: this is {kind}, not a transform that can be called.")
    return value


def _as_tv_tensors(image: Tensor, target: Target) -> dict[str, Any]:
    size = (image.shape[-2], image.shape[-1])
    boxes = tv_tensors.BoundingBoxes(target["boxes"].clone(), format="XYXY", canvas_size=size)
    objects: dict[str, Any] = {"boxes": boxes, "labels": target["labels"].clone()}
    if "masks" in target:
        objects["masks"] = tv_tensors.Mask(target["masks"].clone())
    return objects


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random numbers that transforms draw, and restore them: the training draws from them too."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)  # of the CPU alone: torch.manual_seed would seed the GPU too
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _checked(returned: Any, masks: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Check what a transform returned, and convert it to plain tensors.

    Raises:
        ValueError: the end of a sentence about the fault.
    """
    if not isinstance(returned, (tuple, list)) or len(returned) != 2 or not isinstance(returned[1], dict):
        raise ValueError("did not return (image, target). Return both, the target with boxes and labels")
    image, objects = returned
    wanted = ("boxes", "labels", *(["masks"] if masks else []))
    for name, value in (("image", image), *((name, objects.get(name)) for name in wanted)):
        if name == "masks" and value is None:
            raise ValueError(
                "returned no masks. Return target['masks'] of the objects that stay, or, if only the copy-paste of "
                "large-scale jitter uses them, set data.augment.max_pasted=0"
            )
        if not isinstance(value, Tensor):
            raise ValueError(f"returned {type(value).__name__} as {name}. Return a tensor")
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8 or 0 in image.shape:
        raise ValueError(
            f"returned an image of {tuple(image.shape)} {image.dtype}. Return (3, H, W) uint8; it is normalized later"
        )
    boxes, labels = objects["boxes"], objects["labels"]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != (len(boxes),):
        raise ValueError(
            f"returned boxes of {tuple(boxes.shape)} and labels of {tuple(labels.shape)}. Return (n, 4) and (n,)"
        )
    if masks and objects["masks"].shape != (len(boxes), *image.shape[1:]):
        raise ValueError(
            f"returned masks of {tuple(objects['masks'].shape)} for {len(boxes)} boxes and an image of "
            f"{tuple(image.shape[1:])}. Return (n, H, W)"
        )
    result = {"boxes": _checked_boxes(boxes, image), "labels": _checked_labels(labels)}
    if masks:
        result["masks"] = objects["masks"].as_subclass(Tensor).to(torch.uint8).contiguous()
    return image.as_subclass(Tensor).contiguous(), result


def _checked_boxes(boxes: Tensor, image: Tensor) -> Tensor:
    if (kind := getattr(boxes, "format", None)) is not None and kind != tv_tensors.BoundingBoxFormat.XYXY:
        raise ValueError(f"returned boxes in the format {kind.value}. Return XYXY")
    plain = boxes.as_subclass(Tensor).float()
    if not plain.isfinite().all():
        raise ValueError("returned a box that is not finite")
    limits = torch.tensor([image.shape[2], image.shape[1]] * 2, dtype=torch.float32)
    clipped = torch.minimum(plain.clamp(min=0), limits)
    hint = "End with v2.ClampBoundingBoxes() and v2.SanitizeBoundingBoxes()"
    if len(plain) and float((plain - clipped).abs().max()) > _ROUNDING:
        raise ValueError(f"returned a box outside the image. {hint}")
    if not (clipped[:, 2:] > clipped[:, :2]).all():
        raise ValueError(f"returned a box without width or height. {hint}")
    return clipped


def _checked_labels(labels: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"returned labels of {labels.dtype}. Return integers")
    return labels.as_subclass(Tensor).long()
