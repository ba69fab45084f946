"""The `convert-dataset` command: convert Pascal VOC, YOLO and Cityscapes to COCO annotations; images are not moved."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from brs_detr.data.config import Limits
from brs_detr.data.formats.base import Notes, hold_out, pick_train_val, read_lines, to_coco, validate
from brs_detr.data.formats.cityscapes import read_cityscapes
from brs_detr.data.formats.voc import read_voc
from brs_detr.data.formats.yolo import read_yolo
from brs_detr.data.issues import DataError
from brs_detr.user_files import UserFileError, printable, read_start

NOTES_FILE = "convert-notes.txt"
_BEGINNING = '{"info": {"description": "converted by brs_detr'  # first characters of every json that is written here


def run(args: argparse.Namespace) -> int:
    """Run `convert-dataset`: write the annotations, print what was left out and the next commands.

    Raises:
        DataError: the dataset cannot be converted, or an output file exists that was not made by this command.
    """
    try:
        return _convert(args)
    except OSError as error:  # a file that may not be read, a folder that cannot be written to
        raise DataError(f"{error.filename or args.source}: {error.strerror or error}.") from error


def _convert(args: argparse.Namespace) -> int:
    classes = _class_names(args.classes)
    # only headers are read here, so the number of pixels does not matter
    limits = Limits(max_image_pixels=sys.maxsize, max_image_bytes=args.max_image_bytes)
    if args.format == "voc":
        options = {"one_based": args.one_based, "keep_difficult": args.keep_difficult}
        imported = read_voc(args.source, classes=classes, limits=limits, **options)
    elif args.one_based or args.keep_difficult:
        raise DataError("--one-based, --keep-difficult: these options are for VOC only. Leave them out.")
    elif args.format == "cityscapes":
        if classes:
            raise DataError("--classes: those of Cityscapes are fixed. Leave it out.")
        imported = read_cityscapes(args.source, args.max_image_bytes)
    else:
        imported = read_yolo(args.source, classes=classes, limits=limits)
    if args.val_fraction is not None:
        hold_out(imported, args.val_fraction)
    validate(imported, args.source)
    datasets, images = to_coco(imported)
    out = Path(args.out).absolute()
    paths = {split: out / f"{split}.json" for split in datasets}
    require_free(paths.values())  # before the first one is written: all splits are replaced, or none
    for split, path in paths.items():
        data = write_dataset(datasets[split], path)
        counts = (len(data["images"]), len(data["annotations"]), len(data["categories"]))
        print("{}: {:,} images, {:,} objects, {} classes".format(printable(path), *counts))
    print_notes(imported.notes, out / NOTES_FILE)
    train, val = pick_train_val(imported)
    print(next_steps(out, images, train, val, datasets[train]))
    return 0


def print_notes(notes: Notes, path: Path) -> None:
    """Print the first examples of each kind of note, and write all of them to a file."""
    lines = [f"{kind}: {place}\n" for kind, places in notes.places.items() for place in places]
    path.unlink(missing_ok=True)
    if lines:
        path.write_text("".join(lines), encoding="utf-8")
        print("\n".join(notes.lines()))
        print(f"every case: {printable(path)}")


def _class_names(text: str | None) -> list[str]:
    """Read class names from a file, or from text separated by commas; [] if the option is not given."""
    if text is None:
        return []
    names = read_lines(Path(text)) if os.path.isfile(text) else [name.strip() for name in text.split(",")]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names or len(set(names)) < len(names):
        raise DataError(
            f"--classes {text}: expected a file with one name per line, or names separated by commas, without "
            "duplicates."
        )
    return names


def require_free(paths: Iterable[Path]) -> None:
    """Refuse to overwrite a json that was not written by this command; earlier conversions are replaced.

    Raises:
        DataError: the message names the file.
    """
    for path in filter(Path.exists, paths):
        try:
            is_conversion = read_start(path, len(_BEGINNING)) == _BEGINNING.encode()
        except UserFileError:
            is_conversion = False
        if not is_conversion:
            raise DataError(f"{path}: this file exists and was not made by this command. Choose another folder.")


def write_dataset(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write a COCO json atomically, and return the data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = {"description": _BEGINNING.rpartition('"')[2]}
    temporary = path.with_suffix(".json.partial")
    temporary.write_text(json.dumps({"info": info, **data}, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
    return data


def next_steps(out: Path, images: str, train: str, val: str | None, data: dict[str, Any]) -> str:
    """Format the command lines that check the dataset and train on it; `data` are the annotations of split `train`."""
    lines = ["next:"]
    for split in filter(None, (train, val)):
        words = ["python", "-m", "brs_detr", "check-data", str(out / f"{split}.json"), "--images", images]
        lines.append(printable(shlex.join(words)))
    if val is None:
        hint = "training needs a train and a val split; --val-fraction 0.1 splits val off train"
        return "\n".join([*lines, hint])
    from brs_detr.commands.first_recipe import Dataset, first_recipe  # torch takes seconds, the conversion often less
    from brs_detr.data.anchor_fit import boxes_of_json

    paths = {"data.root": images, "data.train_json": str(out / f"{train}.json"), "data.train_images": "."}
    paths |= {"data.val_json": str(out / f"{val}.json"), "data.val_images": "."}
    per_image = Counter(annotation["image_id"] for annotation in data["annotations"])
    fullest = max(per_image.values(), default=0)
    return "\n".join([*lines, first_recipe(Dataset(boxes_of_json(data), len(data["images"]), fullest, paths))])
