"""Settings of section `data`: where the images are and how they are resized and augmented."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from brs_detr.config_fields import Count, Counts, FilePath, Fraction, Null, OnlyWith, Positive, Range, one_of

Preset = Literal["none", "light", "strong", "aerial", "industrial"]
_CUSTOM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

_CROPPED = OnlyWith("crop_policy", True)


@dataclass(frozen=True)
class AugmentConfig:
    """DETR's augmentation: one of two policies an image; sides in pixels."""

    name: Literal["detr"] = "detr"
    short_sides: Counts = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    long_side: Count = 1333
    crop_policy: bool = True  # half of the images: resize, crop, resize again
    crop_short_sides: Annotated[Counts, _CROPPED] = (400, 500, 600)
    crop_long_side: Annotated[Count, _CROPPED] = 4200
    crop_min: Annotated[Count, _CROPPED] = 384
    crop_max: Annotated[Count, _CROPPED] = 600
    flip: Fraction = 0.5
    preset: Preset = "none"  # colors, blur, noise and turns on top; what and why: docs/data.md
    # package.module:name of a transform of one's own, applied first; from a recipe only if the command line repeats it
    custom: Annotated[str | None, Null("none")] = None

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        if self.crop_min > self.crop_max:
            yield f"{name}.crop_min={self.crop_min} is above {name}.crop_max={self.crop_max}"
        yield from _custom_problems(self.custom, name)


def _custom_problems(custom: str | None, name: str) -> Iterator[str]:
    if custom is not None and not _CUSTOM.fullmatch(custom):
        yield f"{name}.custom={custom} is not of the form package.module:name, e.g. my_augment:transform"


@dataclass(frozen=True)
class SSDConfig:
    """The augmentation of SSD: colors, zooming out and in, and one size whatever the aspect ratio."""

    name: Literal["ssd"] = "ssd"
    size: Count = 512  # side in pixels of the square result
    max_expand: Annotated[float, Range(min=1)] = 4.0  # largest factor of the canvas's sides, 1: no zooming out
    crop_ious: tuple[Fraction, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # minimum IoUs of crops; []: no crops
    flip: Fraction = 0.5
    preset: Preset = "none"  # as of `AugmentConfig`
    custom: Annotated[str | None, Null("none")] = None

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong with the settings; `name` is that of the section."""
        yield from _custom_problems(self.custom, name)


@dataclass(frozen=True)
class LSJConfig:
    """Large-scale jitter: resized by a random factor, cropped, and laid on a gray square; with copy-paste."""

    name: Literal["lsj"] = "lsj"
    size: Count = 1024  # side in pixels of the square; data.test_canvas is that of validation
    min_scale: Positive = 0.1  # smallest and
    max_scale: Positive = 2.0  # largest factor; at 1 the image just fits into the square
    max_pasted: int = 99  # most objects pasted from another image, where the annotations have masks; 0: none
    flip: Fraction = 0.5
    preset: Preset = "none"  # as of `AugmentConfig`
    custom: Annotated[str | None, Null("none")] = None

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        if self.min_scale > self.max_scale:
            yield f"{name}.min_scale={self.min_scale:g} is above {name}.max_scale={self.max_scale:g}"
        yield from _custom_problems(self.custom, name)


@dataclass(frozen=True)
class Limits:
    """Limits on the files of a dataset."""

    max_image_pixels: Count = 120_000_000  # an image with more is left out; decoding takes 7 bytes a pixel
    max_image_bytes: Count = 2**29  # and so is an image file with more
    max_json_bytes: Count = 2**33  # an annotation file that unpacks to more is refused
    allow_outside_images: bool = False  # follow file names of the json that lead out of the image folder


@dataclass(frozen=True)
class DataConfig(Limits):
    """Where images and annotations are; the four paths are relative to `root`.

    `data=PATH` is short for `data.source=PATH`: a folder or file that is recognized (`layouts.py`) and stands for all.
    """

    # folder in COCO's, Roboflow's, YOLO's or VOC's layout, a data.yaml or a COCO json, instead of the paths below
    source: Annotated[FilePath | None, Null("the paths")] = None
    # of the images of a source without a validation split, held out for validation
    val_fraction: Annotated[float | None, Range(above=0, below=1), Null("it has such a split")] = None
    root: FilePath = "datasets/coco"
    train_json: FilePath = "annotations/instances_train2017.json"
    train_images: FilePath = "train2017"
    val_json: FilePath = "annotations/instances_val2017.json"
    val_images: FilePath = "val2017"
    workers: int = 4
    timeout: Positive | None = 300.0  # seconds to wait for a batch before the run ends, saved; null: for ever
    retry_seconds: float = 60.0  # for how long a file is tried again where the storage fails
    keep_empty: bool = True  # images without objects are trained on
    min_side: int = 32  # smaller images are not trained on
    antialias: bool = True  # low-pass filter when shrinking; the released code had none
    augment: AugmentConfig | SSDConfig | LSJConfig = one_of(AugmentConfig(), SSDConfig(), LSJConfig())
    test_short_side: Annotated[Count, OnlyWith("test_canvas", None), OnlyWith("test_square", None)] = 800
    test_long_side: Annotated[Count, OnlyWith("test_canvas", None), OnlyWith("test_square", None)] = 1333
    # side in pixels of a square to resize to whatever the aspect ratio; null: keep it
    test_square: Annotated[Count | None, Null("keep the aspect ratio")] = None
    # side in pixels of a gray square to fit the image into, which the detector sees as a part of it; null: none
    test_canvas: Annotated[Count | None, Null("no canvas")] = None
    # images of classes that are in a smaller share of the images are shown more often; LVIS: 0.001
    repeat_threshold: Annotated[Fraction | None, Null("every image once an epoch")] = None

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        if self.val_fraction is not None and self.source is None:
            yield (
                f"{name}.val_fraction={self.val_fraction:g} divides the dataset of the argument data=. Write "
                f"{name}=FOLDER_OR_JSON {name}.val_fraction={self.val_fraction:g}, without the paths"
            )
        if self.test_square is not None and self.test_canvas is not None:
            yield (
                f"{name}.test_square={self.test_square} and {name}.test_canvas={self.test_canvas} are two ways to make "
                "images square. Set one of them to null"
            )
        if isinstance(self.augment, LSJConfig) and self.test_canvas is None:
            # Boxes are relative to the canvas, and objects smaller on it: without one it would find less, silently.
            yield (
                f"{name}.augment.name=lsj trains with a canvas around images, {name}.test_canvas=null tests without. "
                f"Set {name}.test_canvas={self.augment.size}"
            )
        if (self.timeout or math.inf) <= self.retry_seconds:
            # Else a storage that recovers in time would still end the run.
            yield f"{name}.timeout={self.timeout} must be above {name}.retry_seconds={self.retry_seconds}"
