"""`check-data`: every fault of a dataset, what training does about it, and what the model will see."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from brs_detr.data import annotations as reading
from brs_detr.data.coco import CocoDetection, Transform
from brs_detr.data.faults import DROPPED, KEPT, POLICY, REPAIRED, DataError, FaultLog
from brs_detr.data.pictures import PictureError, inspect_picture
from brs_detr.data.sheet import write_samples
from brs_detr.data.transforms import TrainTransforms

EXIT_TRAINABLE, EXIT_UNTRAINABLE = 0, 1
_PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
_FORMAT_OF_ENDING = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}


class Source(NamedTuple):
    """One dataset to check: annotation file, folder of its pictures, and the augmentation that training will use."""

    json_path: str
    image_dir: str
    transforms: Transform


def check_dataset(source: Source, log: FaultLog) -> CocoDetection:
    """Open a dataset as training does and look at every picture.

    Args:
        source: what to check.
        log: filled with every fault.

    Returns:
        the dataset as training will use it.

    Raises:
        DataError: it cannot be trained on.
    """
    dataset = CocoDetection(
        source.json_path, source.image_dir, transforms=source.transforms, train=True, inspect=True, log=log
    )
    readable = [_check_picture(dataset, index, log) for index in range(len(dataset))]
    if not any(readable):
        raise DataError(f"{source.json_path}: none of its pictures can be read.")
    _find_unlisted(dataset, log)
    return dataset


def _check_picture(dataset: CocoDetection, index: int, log: FaultLog) -> bool:
    name = dataset.file_name(index)
    where = f"image {dataset.packed.image_ids[index]} ({name})"
    try:
        info = inspect_picture(dataset.path(index))
        pixels, _ = dataset.load(index)
    except PictureError as error:
        log.add("picture_unreadable", where, str(error))
        return False
    if info.mode != "RGB":
        log.add("picture_converted", where, f"mode {info.mode}")
    if _FORMAT_OF_ENDING.get(Path(name).suffix.lower(), info.format) not in (info.format, _alias(info.format)):
        log.add("picture_name_misleads", where, f"it is a {info.format} file")
    if not name.isascii() or " " in name:
        log.add("picture_name_unusual", where)
    if pixels[:, ::4, ::4].float().std() < 2:
        log.add("picture_uniform", where)
    return True


def _alias(kind: str) -> str:
    return {"MPO": "JPEG"}.get(kind, kind)  # what several cameras call their JPEG files


def _find_unlisted(dataset: CocoDetection, log: FaultLog) -> None:
    """Note the picture files beside the listed ones that no image entry names."""
    listed = {entry["file_name"] for entry in reading.load_json(dataset.json_path)["images"] if _has_name(entry)}
    for folder in sorted({os.path.dirname(name) for name in listed}):
        path = os.path.join(dataset.image_dir, folder)
        for name in sorted(os.listdir(path)) if os.path.isdir(path) else ():
            relative = os.path.join(folder, name)
            if name.lower().endswith(_PICTURE_ENDINGS) and relative not in listed:
                log.add("picture_not_listed", relative)


def _has_name(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("file_name"), str)


def report(dataset: CocoDetection, log: FaultLog, show: int) -> str:
    """The findings as text: totals, classes, then each kind of fault with its policy and its first cases."""
    counts = dataset.report
    lines = [
        f"{dataset.json_path}: {counts['images']:,} of {counts['images_listed']:,} images and "
        f"{counts['objects']:,} of {counts['annotations_listed']:,} annotations will be trained on",
        f"{dataset.num_classes} classes: "
        + ", ".join(f"{name} (id {key})" for name, key in zip(dataset.classes, dataset.category_ids, strict=True)),
    ]
    headings = {DROPPED: "left out", REPAIRED: "repaired", KEPT: "worth knowing"}
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


def write_csv(log: FaultLog, path: str | Path) -> None:
    """One row per fault: kind, what happens, where, detail."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "action", "where", "detail"])
        writer.writerows([fault.kind, fault.action, fault.where, fault.detail] for fault in log.faults)


def find_images(json_path: str | Path) -> str:
    """The folder that most likely holds the pictures of a json, from where datasets usually keep them.

    Raises:
        DataError: none of the usual places has the first picture.
    """
    path = Path(json_path)
    names = [entry["file_name"] for entry in reading.load_json(path)["images"] if _has_name(entry)]
    stem = path.stem.removeprefix("instances_")
    places = [path.parent, *(root / sub for root in (path.parent, path.parent.parent) for sub in ("images", stem, ""))]
    places += [path.parent.parent / "images" / stem]
    for place in places:
        if any((place / name).exists() for name in names[:20]):
            return str(place)
    raise DataError(f"{json_path}: its pictures are not in a usual place; name their folder with --images DIR.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `check-data`."""
    parser.add_argument("target", metavar="CONFIG_OR_JSON", help="recipe (.yaml) or COCO annotation file (.json)")
    parser.add_argument("--images", help="folder of the pictures, for a json; found in the usual places if left out")
    parser.add_argument("--sheet", default="check-data.png", help="contact sheet to write (default check-data.png)")
    parser.add_argument("--samples", type=int, default=16, help="pictures on the contact sheet (default 16; 0: none)")
    parser.add_argument("--show", type=int, default=5, help="cases printed of each fault (default 5)")
    parser.add_argument("--csv", help="file to write every single fault to")
    parser.add_argument("--strict", action="store_true", help="also fail when anything is left out")


def run(args: argparse.Namespace, resolve: Callable[[str], Sequence[Source]] | None = None) -> int:
    """`check-data`: print the findings, write the sheet.

    Args:
        args: as made by `add_arguments`.
        resolve: gives the datasets of a recipe; the command line knows about recipes, this package does not.

    Returns:
        exit code: 0 if it can be trained on (and, under `--strict`, nothing is left out), else 1.
    """
    code, classes = EXIT_TRAINABLE, {}
    try:
        if Path(args.target).suffix in (".yaml", ".yml") and resolve is not None:
            sources = resolve(args.target)
        else:
            sources = [Source(args.target, args.images or find_images(args.target), TrainTransforms())]
        for number, source in enumerate(sources):
            log = FaultLog(examples=None)
            dataset = check_dataset(source, log)
            print(report(dataset, log, args.show))
            code = max(code, _write_files(args, dataset, log, number))
            classes[source.json_path] = dict(zip(dataset.category_ids, dataset.classes, strict=True))
        _require_equal_classes(classes)
    except DataError as error:
        print(f"cannot be trained on: {error}", file=sys.stderr)
        return EXIT_UNTRAINABLE
    return code


def _require_equal_classes(classes: dict[str, dict[int, str]]) -> None:
    (first, expected), *others = classes.items()
    for path, found in others:
        differing = sorted({key for key in expected | found if expected.get(key) != found.get(key)})
        if differing:
            cases = [f"{key} is {expected.get(key, 'absent')} / {found.get(key, 'absent')}" for key in differing[:5]]
            raise DataError(f"{first} and {path} differ in their categories: id {', id '.join(cases)}.")


def _write_files(args: argparse.Namespace, dataset: CocoDetection, log: FaultLog, number: int) -> int:
    if args.samples > 0:
        path = _numbered(args.sheet, number)
        write_samples(dataset, path, args.samples)
        print(f"\nwhat the model will see: {path}")
    if args.csv:
        write_csv(log, _numbered(args.csv, number))
    dropped = sum(log.counts[kind] for kind in POLICY if POLICY[kind][0] == DROPPED)
    return EXIT_UNTRAINABLE if args.strict and dropped else EXIT_TRAINABLE


def _numbered(path: str, number: int) -> str:
    """The path itself for the first dataset, path-2 and so on for the next ones."""
    return path if number == 0 else str(Path(path).with_stem(f"{Path(path).stem}-{number + 1}"))
