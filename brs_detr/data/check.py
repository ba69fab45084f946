"""`check-data`: every fault of a dataset, what training does about it, and what the model will see.

Looking at each image of a dataset: what was converted, and what a person should look at as well.
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
from typing import Any

from torch import Tensor

from brs_detr.data.annotations import categories_differ
from brs_detr.data.coco import CocoDetection, Transform
from brs_detr.data.image_io import IMAGE_ENDINGS, ImageError, Limits, has_zeroed_part, read_image_info
from brs_detr.data.image_search import usual_folder
from brs_detr.data.issues import DROPPED, KEPT, POLICY, REPAIRED, WARNED, DataError, IssueLog
from brs_detr.data.json_file import load_json
from brs_detr.data.transforms import TrainTransforms
from brs_detr.user_files import printable
from brs_detr.viz.boxes import write_samples

EXIT_TRAINABLE, EXIT_UNTRAINABLE = 0, 1


@dataclass(frozen=True)
class Source:
    """One dataset to check.

    Attributes:
        json_path, image_dir: annotation file and folder of its images.
        transforms: what the contact sheet shows them through.
        train: is it trained on, or evaluated on.
        options: further arguments of `CocoDetection`.
    """

    json_path: str
    image_dir: str
    transforms: Transform
    train: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def check_dataset(source: Source, log: IssueLog, listed: Collection[str] | None = None) -> CocoDetection:
    """Open a dataset as training or evaluation does and look at every image.

    Args:
        source: what to check.
        log: filled with every fault.
        listed: absolute paths of images that some json names; default those of this one.

    Returns:
        the dataset as it will be used.

    Raises:
        DataError: it cannot be used.
    """
    options = {"transforms": source.transforms, "train": source.train, "inspect": True, **source.options}
    dataset = CocoDetection(source.json_path, source.image_dir, log=log, **options)
    readable = [inspect_image(dataset, index, log) for index in range(len(dataset))]
    if not any(readable):
        raise DataError(f"{source.json_path}: none of its images can be read: {'; '.join(log.lines((DROPPED,)))}.")
    if not dataset.report["objects"]:
        reasons = "; ".join(log.lines((WARNED, DROPPED))) or "there is none"
        raise DataError(f"{source.json_path}: none of its annotations can be evaluated: {reasons}.")
    _find_unlisted(dataset, listed_files(source) if listed is None else listed, log)
    return dataset


def listed_files(source: Source) -> set[str]:
    """Absolute paths of the images that a json names.

    Raises:
        DataError: it cannot be read.
    """
    names = file_names(source.json_path, source.options.get("limits"))
    return {os.path.abspath(os.path.join(source.image_dir, name)) for name in names}


def file_names(json_path: str | Path, limits: Limits | None = None) -> list[str]:
    """The file names of a json's image entries."""
    entries = load_json(json_path, (limits or Limits()).max_json_bytes)["images"]
    names = [entry.get("file_name") or entry.get("coco_url") for entry in entries if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str) and name]


def _find_unlisted(dataset: CocoDetection, listed: Collection[str], log: IssueLog) -> None:
    """Note the image files beside the listed ones that no image entry names."""
    used = {os.path.abspath(dataset.path(index)) for index in range(len(dataset))}
    for folder in sorted({os.path.dirname(path) for path in used}):
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if name.lower().endswith(IMAGE_ENDINGS) and path not in used and path not in listed:
                log.add("image_not_listed", os.path.relpath(path, dataset.image_dir))


def note_shared_images(datasets: Iterable[CocoDetection], dataset: CocoDetection, log: IssueLog) -> None:
    """Note the images of a dataset that one of others has as well."""
    paths = {os.path.realpath(other.path(index)) for other in datasets for index in range(len(other))}
    for index in range(len(dataset)):
        if os.path.realpath(dataset.path(index)) in paths:
            where = f"image {dataset.packed.image_ids[index]} ({dataset.file_name(index)})"
            log.add("image_in_both_splits", where)


def report(dataset: CocoDetection, log: IssueLog, show: int) -> str:
    """The findings as text: totals, classes, then each kind of fault with its policy and its first cases."""
    counts = dataset.report
    purpose = "trained" if dataset.train else "evaluated"
    lines = [
        f"{printable(dataset.json_path)}: {counts['images']:,} of {counts['images_listed']:,} images and "
        f"{counts['objects']:,} of {counts['annotations_listed']:,} annotations will be {purpose} on",
        f"images in {printable(dataset.image_dir)}",
        f"{dataset.num_classes} classes: "
        + ", ".join(f"{name} (id {key})" for name, key in zip(dataset.classes, dataset.category_ids, strict=True)),
    ]
    headings = {WARNED: "warning", DROPPED: "left out", REPAIRED: "repaired", KEPT: "worth knowing"}
    for action, heading in headings.items():
        for kind in (kind for kind in POLICY if POLICY[kind][0] == action and log.counts[kind]):
            lines.append(f"\n{heading}: {log.counts[kind]:,} x {kind.replace('_', ' ')}: {POLICY[kind][1]}")
            cases = [fault for fault in log.faults if fault.kind == kind]
            lines += [f"    {c.where}" + (f": {c.detail}" if c.detail else "") for c in cases[:show]]
            if len(cases) > show:
                lines.append(f"    ... and {len(cases) - show:,} more")
    if not log.counts:
        lines.append("no fault was found")
    return "\n".join(lines)


def write_csv(log: IssueLog, path: str | Path) -> None:
    """One row per fault: kind, what happens, where, detail."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "action", "where", "detail"])
        writer.writerows([fault.kind, fault.action, fault.where, fault.detail] for fault in log.faults)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `check-data`."""
    parser.add_argument("target", metavar="CONFIG_OR_JSON", help="recipe (.yaml) or COCO annotation file (.json)")
    parser.add_argument("--images", help="folder of the images, for a json; found in the usual places if left out")
    parser.add_argument("--sheet", default="check-data.png", help="contact sheet to write (default check-data.png)")
    parser.add_argument("--samples", type=int, default=16, help="images on the contact sheet (default 16; 0: none)")
    parser.add_argument("--show", type=int, default=5, help="cases printed of each fault (default 5)")
    parser.add_argument("--csv", help="file to write every single fault to")
    parser.add_argument("--strict", action="store_true", help="also fail when anything is left out or warned about")


def run(
    args: argparse.Namespace,
    resolve: Callable[[str], Sequence[Source]] | None = None,
    limits: Limits | None = None,
) -> int:
    """`check-data`: print the findings, write the sheet.

    Args:
        args: as made by `add_arguments`.
        resolve: gives the datasets of a recipe; the command line knows about recipes, this package does not.
        limits: for a json that is checked without a recipe.

    Returns:
        exit code: 0 if it can be trained on (and, under `--strict`, nothing is left out), else 1.
    """
    try:
        if Path(args.target).suffix in (".yaml", ".yml") and resolve is not None:
            sources = resolve(args.target)
        else:
            images = args.images or usual_folder(args.target, file_names(args.target, limits))
            sources = [Source(args.target, str(images), TrainTransforms(), options={"limits": limits or Limits()})]
    except DataError as error:
        return _refuse(error)
    code, datasets, listed = EXIT_TRAINABLE, [], set()
    for source in sources:
        with contextlib.suppress(DataError):  # named below
            listed |= listed_files(source)
    for number, source in enumerate(sources):
        log = IssueLog(examples=None)
        try:
            dataset = check_dataset(source, log, listed)
        except DataError as error:
            code = _refuse(error)
            continue
        note_shared_images(datasets, dataset, log)
        print(report(dataset, log, args.show))
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
            paths = f"{other.json_path}: its categories are not those of {first.json_path}"
            code = _refuse(DataError(f"{paths}: {differ}; give both the same list `categories`."))
    return code


def _write_files(args: argparse.Namespace, dataset: CocoDetection, log: IssueLog, number: int) -> int:
    if args.samples > 0:
        path = _numbered(args.sheet, number)
        write_samples(dataset, path, args.samples)
        print(f"\nwhat the model will see: {printable(path)}")
    if args.csv:
        write_csv(log, _numbered(args.csv, number))
    grave = any(log.counts[kind] for kind in POLICY if POLICY[kind][0] in (WARNED, DROPPED))
    return EXIT_UNTRAINABLE if args.strict and grave else EXIT_TRAINABLE


def _numbered(path: str, number: int) -> str:
    """The path itself for the first dataset, path-2 and so on for the next ones."""
    return path if number == 0 else str(Path(path).with_stem(f"{Path(path).stem}-{number + 1}"))


_FORMAT_OF_ENDING = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
_JPEG_OF_CAMERAS = "MPO"  # with a second image inside that is a preview or another eye's view


def inspect_image(dataset: CocoDetection, index: int, log: IssueLog) -> bool:
    """Read one image and log what is unusual about it.

    Args:
        dataset: it belongs to; marks it where it cannot be read.
        index: of the image.
        log: filled.

    Returns:
        whether it can be read.
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
    kind = "JPEG" if info.format == _JPEG_OF_CAMERAS else info.format
    if _FORMAT_OF_ENDING.get(Path(name).suffix.lower(), kind) != kind:
        log.add("image_name_misleads", where, f"it is a {info.format} file")
    if not name.isascii() or " " in name:
        log.add("image_name_unusual", where)
    if info.frames > 1 and info.format != _JPEG_OF_CAMERAS:
        log.add("image_has_pages", where, f"{info.frames} in the file")
    if pixels[:, ::4, ::4].float().std() < 2:
        log.add("image_uniform", where)
    elif pixels.max() < (64 if info.mode.startswith("I") else 17):  # 14 bits of 16; 12 bits, where colors hide the 16
        log.add("image_dark", where, f"the brightest value is {pixels.max()} of 255")
    elif blank_bottom_fraction(pixels) >= 0.25:
        log.add("image_part_blank", where, f"the lower {blank_bottom_fraction(pixels):.0%}")
    elif has_zeroed_part(path):
        log.add("image_part_blank", where, "the file holds zeros instead of pixels")
    return True


def blank_bottom_fraction(pixels: Tensor, period: int = 16) -> float:
    """The share of an image's height, from below, whose rows repeat themselves, as in a cut file that was saved again.

    Args:
        pixels: (3, h, w) uint8.
        period: width in pixels of the blocks that a JPEG is made of.

    Returns:
        0 also where the uppermost row is such a one: then the image has a frame.
    """
    if pixels.shape[2] <= 2 * period:
        return 0.0
    blank = (pixels[:, :, period:] == pixels[:, :, :-period]).all(2).all(0)
    return 0.0 if blank[0] else float(blank.flip(0).cumprod(0).sum()) / len(blank)
