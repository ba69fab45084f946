"""The `check-data` command: list every issue of a dataset, what training does about it, and draw a contact sheet.

It opens the dataset as training does, then decodes every image and reports conversions and suspicious content.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from brs_detr.data.annotations import categories_differ, image_name
from brs_detr.data.coco import CocoDetection, Transform
from brs_detr.data.config import DataConfig, Limits
from brs_detr.data.image_io import IMAGE_ENDINGS, ImageError, has_zeroed_part, read_image_info
from brs_detr.data.image_search import usual_folder
from brs_detr.data.issues import DROPPED, KEPT, POLICY, REPAIRED, WARNED, DataError, IssueLog
from brs_detr.data.json_file import load_json
from brs_detr.data.transforms import TrainTransforms
from brs_detr.user_files import printable
from brs_detr.viz.boxes import write_samples

EXIT_TRAINABLE, EXIT_UNTRAINABLE = 0, 1


@dataclass(frozen=True)
class Source:
    """A dataset to check.

    Attributes:
        json_path, image_dir: annotation file and folder of its images.
        transforms: applied to the images of the contact sheet.
        train: True if it is trained on, False if it is evaluated on.
        options: further arguments of `CocoDetection`.
        content: of the json, if it has been read; who opens the dataset takes it out, so that it is freed in time.
    """

    json_path: str
    image_dir: str
    transforms: Transform
    train: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    content: list[dict[str, Any]] = field(default_factory=list)


def check_dataset(source: Source, log: IssueLog, listed: Collection[str] | None = None) -> CocoDetection:
    """Open a dataset as training or evaluation does, and inspect every image.

    Args:
        source: the dataset.
        log: every issue is added to it.
        listed: absolute paths of images that any of the jsons lists; by default those of this json.

    Returns:
        the dataset as it will be used.

    Raises:
        DataError: it cannot be used.
    """
    options = {
        "transforms": source.transforms,
        "train": source.train,
        "inspect": True,
        "draw_all": True,
        **source.options,
    }
    if listed is None:
        listed = listed_files(source)
    if source.content:
        options["read"] = source.content.pop
    dataset = CocoDetection(source.json_path, source.image_dir, log=log, **options)
    readable = [inspect_image(dataset, index, log) for index in range(len(dataset))]
    if not any(readable):
        raise DataError(f"{source.json_path}: none of its images can be read: {'; '.join(log.lines((DROPPED,)))}.")
    if not dataset.report["objects"]:
        reasons = "; ".join(log.lines((WARNED, DROPPED))) or "the list is empty"
        raise DataError(f"{source.json_path}: none of its annotations can be evaluated: {reasons}.")
    _find_unlisted(dataset, listed, log)
    return dataset


def listed_files(source: Source) -> set[str]:
    """Return the absolute paths of the images that a json lists; its content is kept for who opens the dataset.

    Raises:
        DataError: the json cannot be read.
    """
    if not source.content:
        limits: Limits = source.options.get("limits") or Limits()
        masks: Literal["pack", "drop"] = "pack" if source.options.get("masks") else "drop"
        source.content.append(load_json(source.json_path, limits.max_json_bytes, masks, annotated=source.train))
    return {os.path.abspath(os.path.join(source.image_dir, name)) for name in _names(source.content[0])}


def file_names(json_path: str | Path, limits: Limits | None = None) -> list[str]:
    """Return the file names of a json's image entries."""
    return _names(load_json(json_path, (limits or Limits()).max_json_bytes))


def _names(data: dict[str, Any]) -> list[str]:
    names = [image_name(entry) for entry in data["images"] if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str) and name]


def source_of_json(json_path: str, images: str | None, config: DataConfig | None = None) -> Source:
    """Return a json's dataset as training without a recipe would open it; with masks if any annotation has one.

    Args:
        json_path: annotation file.
        images: folder of its images; by default it is searched for.
        config: section `data`, for its limits and for which images are trained on; its paths are not read.

    Raises:
        DataError: the json cannot be read.
    """
    config = config or DataConfig()
    data = load_json(json_path, config.max_json_bytes, masks="pack")
    masks = any(isinstance(entry, dict) and "segmentation" in entry for entry in data["annotations"])
    folder = images or str(usual_folder(json_path, _names(data)))
    options = {"limits": config, "masks": masks, "keep_empty": config.keep_empty, "min_side": config.min_side}
    return Source(json_path, folder, TrainTransforms(), options=options, content=[data])


def _find_unlisted(dataset: CocoDetection, listed: Collection[str], log: IssueLog) -> None:
    """Log the image files in the folders of the listed images that no image entry names."""
    used = {os.path.abspath(dataset.path(index)) for index in range(len(dataset))}
    for folder in sorted({os.path.dirname(path) for path in used}):
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if name.lower().endswith(IMAGE_ENDINGS) and path not in used and path not in listed:
                log.add("image_not_listed", os.path.relpath(path, dataset.image_dir))


def note_shared_images(datasets: Iterable[CocoDetection], dataset: CocoDetection, log: IssueLog) -> None:
    """Log the images of a dataset that one of the other datasets contains as well."""
    # realpath: two splits may reach one file through different links
    paths = {os.path.realpath(other.path(index)) for other in datasets for index in range(len(other))}
    for index in range(len(dataset)):
        if os.path.realpath(dataset.path(index)) in paths:
            where = f"image {dataset.packed.image_ids[index]} ({dataset.file_name(index)})"
            log.add("image_in_both_splits", where)


def report(dataset: CocoDetection, log: IssueLog, show: int) -> str:
    """Format the results as text: totals, classes, then each kind of issue with its policy and first examples."""
    counts = dataset.report
    purpose = "trained" if dataset.train else "evaluated"
    lines = [
        f"{printable(dataset.json_path)}: {counts['images']:,} of {counts['images_listed']:,} images and "
        f"{counts['objects']:,} of {counts['annotations_listed']:,} annotations will be {purpose} on",
        f"images in {printable(dataset.image_dir)}",
        f"{dataset.num_classes} classes: "
        + ", ".join(f"{name} (id {key})" for name, key in zip(dataset.classes, dataset.category_ids, strict=True)),
        _about_masks(dataset),
    ]
    headings = {WARNED: "warning", DROPPED: "left out", REPAIRED: "repaired", KEPT: "worth knowing"}
    for action, heading in headings.items():
        for kind in (kind for kind in POLICY if POLICY[kind][0] == action and log.counts[kind]):
            lines.append(f"\n{heading}: {log.counts[kind]:,} x {kind.replace('_', ' ')}: {POLICY[kind][1]}")
            cases = [issue for issue in log.issues if issue.kind == kind]
            lines += [f"    {c.where}" + (f": {c.detail}" if c.detail else "") for c in cases[:show]]
            if len(cases) > show:
                lines.append(f"    ... and {len(cases) - show:,} more")
    if not log.counts:
        lines.append("no issues found")
    return "\n".join(lines)


def _about_masks(dataset: CocoDetection) -> str:
    """Say how many objects have a mask that can be drawn."""
    offsets, objects = dataset.packed.mask_offsets, ~dataset.packed.iscrowd
    if offsets is None:
        return "masks are not looked at"
    return f"{int((np.diff(offsets)[objects] > 0).sum()):,} of {int(objects.sum()):,} objects have masks"


def write_csv(log: IssueLog, path: str | Path) -> None:
    """Write one row per issue: kind, action, where, detail."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "action", "where", "detail"])
        writer.writerows([issue.kind, issue.action, issue.where, issue.detail] for issue in log.issues)


def run(
    args: argparse.Namespace,
    resolve: Callable[[str], Sequence[Source]] | None = None,
    describe: Callable[[CocoDetection], str] | None = None,
) -> int:
    """Run `check-data`: print the results and write the contact sheet.

    Args:
        args: as made by `add_arguments`.
        resolve: returns the datasets of a target; the command line reads configs, this package does not.
        describe: what else to print of a dataset to train on.

    Returns:
        exit code: 0 if the dataset is trainable (and, with `--strict`, nothing is dropped), else 1.
    """
    sources: Sequence[Source]
    try:
        sources = resolve(args.target) if resolve else [source_of_json(args.target, args.images)]
    except DataError as error:
        return _refuse(error)
    code = EXIT_TRAINABLE
    datasets: list[CocoDetection] = []
    # the jsons of all splits first: an image of val is not "unlisted" because train.json does not name it
    listed: set[str] = set()
    for source in sources:
        with contextlib.suppress(DataError):  # reported below, when the dataset is checked
            listed |= listed_files(source)
    for number, source in enumerate(sources):
        log = IssueLog(max_examples=None)
        try:
            dataset = check_dataset(source, log, listed)
        except DataError as error:
            code = _refuse(error)
            continue
        note_shared_images(datasets, dataset, log)
        print(report(dataset, log, args.show))
        if describe is not None and source.train:
            print(f"\n{describe(dataset)}")
        code = max(code, _write_files(args, dataset, log, number))
        datasets.append(dataset)
    return max(code, _compare_classes(datasets))


def _refuse(error: DataError) -> int:
    print(f"error: dataset is not trainable: {printable(error)}", file=sys.stderr)
    return EXIT_UNTRAINABLE


def _compare_classes(datasets: Sequence[CocoDetection]) -> int:
    code = EXIT_TRAINABLE
    for other in datasets[1:]:
        first = datasets[0]
        differ = categories_differ((first.category_ids, first.classes), (other.category_ids, other.classes))
        if differ:
            subject = f"{other.json_path}: its categories differ from those of {first.json_path}"
            code = _refuse(DataError(f"{subject}: {differ}. Give both the same list `categories`."))
    return code


def _write_files(args: argparse.Namespace, dataset: CocoDetection, log: IssueLog, number: int) -> int:
    if args.samples > 0:
        path = _numbered(args.sheet, number)
        write_samples(dataset, path, args.samples)
        print(f"\ncontact sheet of augmented images: {printable(path)}")
    if args.csv:
        write_csv(log, _numbered(args.csv, number))
    serious = any(log.counts[kind] for kind in POLICY if POLICY[kind][0] in (WARNED, DROPPED))
    return EXIT_UNTRAINABLE if args.strict and serious else EXIT_TRAINABLE


def _numbered(path: str, number: int) -> str:
    """Return the path itself for the first dataset, and path-2, path-3, ... for the others."""
    return path if number == 0 else str(Path(path).with_stem(f"{Path(path).stem}-{number + 1}"))


_FORMAT_OF_ENDING = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
_MULTI_PICTURE_JPEG = "MPO"  # as cameras write it: a JPEG with a preview or a stereo image after the main one


def inspect_image(dataset: CocoDetection, index: int, log: IssueLog) -> bool:
    """Decode an image and log what is unusual about it.

    Args:
        dataset: the dataset of the image; it remembers that an image is unreadable.
        index: index of the image.
        log: issues are added to it.

    Returns:
        True if the image can be read.
    """
    name, path = dataset.file_name(index), dataset.path(index)
    where = f"image {dataset.packed.image_ids[index]} ({name})"
    try:
        info = read_image_info(path, dataset.limits)
        pixels, _ = dataset.load(index)
    except ImageError as error:
        log.add("image_unreadable", where, error.reason)
        return False
    if info.mode != "RGB":
        log.add("image_converted", where, f"mode {info.mode}")
    kind = "JPEG" if info.format == _MULTI_PICTURE_JPEG else info.format
    if _FORMAT_OF_ENDING.get(Path(name).suffix.lower(), kind) != kind:
        log.add("image_name_misleads", where, f"it is a {info.format} file")
    if not name.isascii() or " " in name:
        log.add("image_name_unusual", where)
    if info.frames > 1 and info.format != _MULTI_PICTURE_JPEG:
        log.add("image_has_pages", where, f"{info.frames} in the file")
    # a standard deviation of 2 of 255 is about the noise of JPEG; every 4th pixel is enough to estimate it
    if pixels[:, ::4, ::4].float().std() < 2:
        log.add("image_uniform", where)
    # 14-bit values in 16 bits stay below 64 of 255, 12-bit values below 17; in a color file Pillow has already cut the
    # 16 bits to 8, so that only the darker case differs from an ordinary dark photo
    elif pixels.max() < (64 if info.mode.startswith("I") else 17):
        log.add("image_dark", where, f"the brightest value is {pixels.max()} of 255")
    elif blank_bottom_fraction(pixels) >= 0.25:
        log.add("image_part_blank", where, f"the lower {blank_bottom_fraction(pixels):.0%}")
    elif has_zeroed_part(path):
        log.add("image_part_blank", where, "the file holds zeros instead of pixels")
    return True


def blank_bottom_fraction(pixels: Tensor, period: int = 16) -> float:
    """Return the fraction of rows at the bottom that repeat themselves, as in a truncated JPEG that was saved again.

    Args:
        pixels: (3, h, w) uint8.
        period: width in pixels of JPEG's blocks: a truncated file is filled with copies of the last one.

    Returns:
        the fraction in [0, 1]; 0 if the first row repeats itself as well: then the image has a frame.
    """
    if pixels.shape[2] <= 2 * period:
        return 0.0
    blank = (pixels[:, :, period:] == pixels[:, :, :-period]).all(2).all(0)
    return 0.0 if blank[0] else float(blank.flip(0).cumprod(0).sum()) / len(blank)
