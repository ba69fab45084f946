"""The `convert-dataset` command: convert Pascal VOC, YOLO and Cityscapes to COCO annotations, or split a COCO json.

Images are not moved.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brs_detr.data.annotations import image_name
from brs_detr.data.config import Limits
from brs_detr.data.formats.base import ImportedDataset, Notes, hold_out, pick_train_val, read_lines, to_coco, validate
from brs_detr.data.formats.cityscapes import read_cityscapes
from brs_detr.data.formats.coco import require_free, split_coco, write_dataset
from brs_detr.data.formats.voc import read_voc
from brs_detr.data.formats.yolo import read_yolo
from brs_detr.data.image_search import usual_folder
from brs_detr.data.issues import DataError
from brs_detr.data.json_file import load_json
from brs_detr.data.layouts import recognize
from brs_detr.data.storage import raise_storage_fault
from brs_detr.user_files import printable

NOTES_FILE = "convert-notes.txt"


def run(args: argparse.Namespace) -> int:
    """Run `convert-dataset`: write the annotations, print what was left out and the next commands.

    Raises:
        DataError: the dataset cannot be converted, or an output file exists that was not made by this command.
    """
    try:
        return _convert(args)
    except OSError as error:  # a file that may not be read, a folder that cannot be written to
        raise_storage_fault(error, args.source)
        raise DataError(f"{error.filename or args.source}: {error.strerror or error}.") from error


def _convert(args: argparse.Namespace) -> int:
    if args.format == "coco":
        return _split(args)
    if args.images:
        raise DataError("--images: this option is for COCO jsons only. Leave it out.")
    out = _out_folder(args)
    imported = _read(args)
    if args.val_fraction is not None:
        hold_out(imported, args.val_fraction, args.seed)
    validate(imported, args.source)
    datasets, images = to_coco(imported)
    write_all(datasets, out)
    print_notes(imported.notes, out / NOTES_FILE)
    train, val = pick_train_val(imported)
    print(next_steps(out, images, train, val, datasets[train], None if val else _as_argument(args, train)))
    return 0


def _read(args: argparse.Namespace) -> ImportedDataset:
    """Read a dataset of another format than COCO's."""
    classes = _class_names(args.classes)
    # only headers are read here, so the number of pixels does not matter
    limits = Limits(max_image_pixels=sys.maxsize, max_image_bytes=args.max_image_bytes)
    if args.format == "voc":
        options = {"one_based": args.one_based, "keep_difficult": args.keep_difficult}
        return read_voc(args.source, classes=classes, limits=limits, **options)
    if args.one_based or args.keep_difficult:
        raise DataError("--one-based, --keep-difficult: these options are for VOC only. Leave them out.")
    if args.format == "cityscapes":
        if classes:
            raise DataError("--classes: those of Cityscapes are fixed. Leave it out.")
        return read_cityscapes(args.source, args.max_image_bytes)
    return read_yolo(args.source, classes=classes, limits=limits)


def _split(args: argparse.Namespace) -> int:
    """Split a COCO json into train.json and val.json."""
    if args.classes or args.one_based or args.keep_difficult:
        raise DataError("--classes, --one-based, --keep-difficult: a COCO json says these itself. Leave them out.")
    source = Path(args.source)
    if source.is_dir():
        raise DataError(f"{source}: this is a folder. Name the annotation file to split.")
    data = load_json(source, masks="keep")
    names = [str(image_name(entry) or "") for entry in data["images"] if isinstance(entry, dict)]
    images = os.path.abspath(args.images or usual_folder(source, names))
    out = _out_folder(args)
    if os.path.realpath(source) in (os.path.realpath(out / "train.json"), os.path.realpath(out / "val.json")):
        raise DataError(f"{source}: its own split would take its place. Give another folder with --out.")
    fraction = 0.1 if args.val_fraction is None else args.val_fraction
    parts = split_coco(data, fraction, args.seed, "--val-fraction")
    write_all(parts, out)
    print(next_steps(out, images, "train", "val"))
    return 0


def _as_argument(args: argparse.Namespace, train: str) -> str | None:
    """Return the dataset as `data=` takes it, which can hold out images itself; None where it would read another."""
    if train != "train" or args.classes or args.one_based or args.keep_difficult:
        return None
    with contextlib.suppress(DataError):
        if recognize(args.source).kind == args.format:
            return os.path.abspath(args.source)
    return None


def _out_folder(args: argparse.Namespace) -> Path:
    """Return the folder to write to: for a COCO json by default its own.

    Raises:
        DataError: it is given twice, or not at all.
    """
    if args.out and args.out_option:
        raise DataError(f"--out {args.out_option}: the folder to write to is given twice ({args.out}). Leave one out.")
    out = args.out or args.out_option or (Path(args.source).parent if args.format == "coco" else None)
    if out is None:
        raise DataError(f"{args.source}: name a folder to write to: convert-dataset {args.format} {args.source} OUT.")
    return Path(out).absolute()


def write_all(datasets: Mapping[str, dict[str, Any]], out: Path) -> None:
    """Write the json of every split and print what it has, or write none.

    Raises:
        DataError: a file was not made by this command.
    """
    paths = {split: out / f"{split}.json" for split in datasets}
    require_free(paths.values())  # before the first one is written: all splits are replaced, or none
    for split, path in paths.items():
        data = write_dataset(datasets[split], path)
        counts = (len(data["images"]), len(data["annotations"]), len(data["categories"]))
        print("{}: {:,} images, {:,} objects, {} classes".format(printable(path), *counts))


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


def next_steps(
    out: Path,
    images: str,
    train: str,
    val: str | None,
    data: dict[str, Any] | None = None,
    source: str | None = None,
) -> str:
    """Format the command lines that check the dataset and that train on it.

    Args:
        out: folder of the jsons.
        images: folder of the images.
        train, val: names of the splits; None: there is no val split.
        data: annotations of split `train`; None for those of a json of the user's, which may have faults.
        source: of the conversion, where `data=` takes it: what is trained on without a val split.
    """
    lines = ["next:"]
    for split in filter(None, (train, val)):
        words = ["python", "-m", "brs_detr", "check-data", str(out / f"{split}.json"), "--images", images]
        lines.append(printable(shlex.join(words)))
    paths: dict[str, object] = {"data.root": images, "data.train_json": str(out / f"{train}.json")}
    paths |= {"data.train_images": ".", "data.val_json": str(out / f"{val}.json"), "data.val_images": "."}
    if val is None:
        hint = "training needs a train and a val split; --val-fraction 0.1 splits val off train"
        if source is None:
            return "\n".join([*lines, hint])
        lines.append(f"{hint}, as data.val_fraction=0.1 does without converting:")
        paths = {"data": source, "data.val_fraction": 0.1}
    with contextlib.suppress(DataError):  # `check-data` says what is wrong with the json
        lines.append(_recipe(out / f"{train}.json", images, data, paths))
    return "\n".join(lines)


def _recipe(path: Path, images: str, data: dict[str, Any] | None, paths: Mapping[str, object]) -> str:
    """Describe the recipe to start from; the other arguments as of `next_steps`, with the settings that name the data.

    Raises:
        DataError: the json cannot be trained on.
    """
    from brs_detr.commands.first_recipe import Dataset, first_recipe  # torch takes seconds, the conversion often less
    from brs_detr.data.anchor_fit import boxes_of_json

    if data is None:
        from brs_detr.commands.check_data import facts_of
        from brs_detr.data.coco import CocoDetection

        return first_recipe(facts_of(CocoDetection(path, images, train=True), paths))
    rows = (a["image_id"] for a in data["annotations"] if not a.get("iscrowd") and not a.get("ignore"))
    per_image = Counter(rows)
    counts = {image["file_name"]: per_image[image["id"]] for image in data["images"]}
    names = {category["id"]: category["name"] for category in data["categories"]}
    return first_recipe(Dataset(boxes_of_json(data), len(data["images"]), counts, paths, names))
