"""Open what `layouts.py` recognized: COCO jsons are used where they lie, the others are converted to jsons of a run.

Nothing is ever written into the dataset's own folder. What is written depends on the dataset alone, so that a resumed
run, another process and another evaluation read the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from brs_detr.data.annotations import image_name
from brs_detr.data.config import DataConfig
from brs_detr.data.formats.base import Notes, hold_out, pick_train_val, to_coco, validate
from brs_detr.data.formats.coco import grouping_category, split_coco, without_category, write_dataset
from brs_detr.data.formats.voc import read_voc
from brs_detr.data.formats.yolo import read_yolo
from brs_detr.data.image_search import usual_folder
from brs_detr.data.issues import DataError
from brs_detr.data.json_file import load_json
from brs_detr.data.layouts import NAMES, DatasetLayout, recognize
from brs_detr.data.storage import raise_storage_fault
from brs_detr.user_files import printable, read_start

NOTES_FILE = "notes.txt"

_NAME_BOTH = "Name both: data.root, data.train_json, data.train_images, data.val_json and data.val_images."
_LARGE = 2**26  # bytes of a json from which it is not read a second time only to count its images


class Split(NamedTuple):
    """A split: its annotation file, the folder of its images, their number, and where both come from, for the log.

    The number is None for a large json, which is counted when the dataset is opened.
    """

    json: Path
    images: Path
    number: int | None
    origin: str


@dataclass(frozen=True)
class Opened:
    """A dataset with COCO jsons.

    Attributes:
        layout: as recognized.
        splits: those asked for, by purpose: "train", "val".
        remarks: what was passed over or guessed.
        notes: what a conversion left out.
        files: what was written, a line each.
        divided: False if the dataset names no splits: without `val_fraction` an evaluation then measures all of it.
    """

    layout: DatasetLayout
    splits: dict[str, Split]
    remarks: list[str] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)
    files: list[str] = field(default_factory=list)
    divided: bool = True

    def describe(self, kept: bool = True) -> list[str]:
        """Format what was recognized in a line, then a line per remark and kind of note.

        Args:
            kept: True if what was written stays, with the file of all notes; it is named then.
        """
        counts = {k: "" if split.number is None else f" {split.number:,} images" for k, split in self.splits.items()}
        parts = [f"{name}{counts[name]} ({split.origin})" for name, split in self.splits.items()]
        head = f"data={printable(self.layout.source)}: {NAMES[self.layout.kind]}; {', '.join(parts)}"
        below = [*self.remarks, *self.notes.lines(1), *self.files] if kept else [*self.remarks, *self.notes.lines()]
        return [head, *(f"  {line}" for line in below)]

    def settings(self, config: DataConfig) -> DataConfig:
        """Return the settings with the paths of the splits, relative to the dataset where they are in it."""
        paths: dict[str, Any] = {"source": str(self.layout.source), "root": str(self.layout.root)}
        for name, split in self.splits.items():
            paths[f"{name}_json"] = _inside(split.json, self.layout.root)
            paths[f"{name}_images"] = _inside(split.images, self.layout.root)
        return replace(config, **paths)


def open_source(config: DataConfig, folder: Path, purposes: tuple[str, ...] = ("train", "val")) -> Opened:
    """Open the dataset `data.source`.

    Args:
        config: with the source and perhaps `val_fraction`.
        folder: jsons are written here, if any are needed.
        purposes: "train" and "val", or "val" alone for an evaluation, which takes all images if there are no splits.

    Raises:
        DataError: it is not recognized, or has no split for a purpose.
        ReadError: the storage fails.
        OSError: the disk of `folder` is full or read-only.
    """
    assert config.source is not None
    layout = recognize(config.source)
    opened = _open_coco if layout.kind in ("coco", "roboflow") else _convert
    try:
        return opened(layout, config, folder, purposes)
    except OSError as error:  # a file that may not be read, a folder that cannot be written to
        raise_storage_fault(error, layout.source)
        raise DataError(f"{error.filename or layout.source}: {error.strerror or error}.") from error


def _open_coco(layout: DatasetLayout, config: DataConfig, folder: Path, purposes: tuple[str, ...]) -> Opened:
    """Use the jsons of a COCO layout, or write those of a split that is wanted."""
    chosen = _purposes(layout, config.val_fraction, purposes)
    heads = {path: _read_head(path, config.max_json_bytes) for path in chosen.values()}
    images = {path: usual_folder(path, head.names, _NAME_BOTH) for path, head in heads.items()}
    remarks, group = _passed_over(layout), _grouping_category(layout, config)
    splits = {}
    for purpose, path in chosen.items():
        target, number = path, heads[path].number
        if config.val_fraction is not None or group is not None:
            data = load_json(path, config.max_json_bytes, masks="keep")
            data = data if group is None else without_category(data, group)
            data = data if config.val_fraction is None else split_coco(data, config.val_fraction)[purpose]
            target, number = folder / f"{purpose}.json", len(data["images"])
            write_dataset(data, target)
        splits[purpose] = Split(target, images[path], number, _origin(path, images[path], layout))
    if group is not None:
        name = printable(group.get("name"))
        remarks.append(f"category 0, {name}, is no class: it groups the others, and no annotation is of it")
    return Opened(layout, splits, remarks, files=_written(splits, folder), divided=list(layout.jsons) != ["all"])


class _Head(NamedTuple):
    """File names of images of a json, and their number if the file is small enough to be read twice."""

    names: list[str]
    number: int | None


def _read_head(path: Path, max_bytes: int) -> _Head:
    """Read names of images from a json; of a large one from its beginning, where COCO's lists them."""
    if path.stat().st_size > _LARGE:
        start = read_start(path, 2**20)
        found = re.findall(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', start)
        if found:
            return _Head([json.loads(text) for text in found[:20]], None)
    entries = load_json(path, max_bytes)["images"]
    names = [image_name(entry) for entry in entries if isinstance(entry, dict)]
    return _Head([name for name in names if isinstance(name, str) and name], len(entries))


def _passed_over(layout: DatasetLayout) -> list[str]:
    if not layout.passed_over:
        return []
    names = ", ".join(printable(_inside(path, layout.root)) for path in layout.passed_over[:4])
    more = f", and {len(layout.passed_over) - 4} more" if len(layout.passed_over) > 4 else ""
    return [f"not used: {names}{more}"]


def _grouping_category(layout: DatasetLayout, config: DataConfig) -> dict[str, Any] | None:
    """Read all splits of a Roboflow export, to find the category that groups the others; None in other layouts."""
    if layout.kind != "roboflow":
        return None
    return grouping_category([load_json(path, config.max_json_bytes) for path in layout.jsons.values()])


def _purposes(layout: DatasetLayout, fraction: float | None, purposes: tuple[str, ...]) -> dict[str, Path]:
    """Choose the json for each purpose; with a fraction to hold out, one json is for both.

    Raises:
        DataError: there is none, or there is a val split although a fraction is to be held out.
    """
    jsons = layout.jsons
    train, val = jsons.get("train", jsons.get("all")), jsons.get("val", jsons.get("test"))
    if fraction is not None:
        if "val" in jsons or train is None:
            has = "a val split already" if "val" in jsons else "no train split to divide"
            raise DataError(f"data.val_fraction={fraction:g}: {layout.source} has {has}. Leave it out.")
        return dict.fromkeys(purposes, train)
    if "train" not in purposes:
        val = val or jsons.get("all")  # to evaluate on, one json needs no split
    found = {"train": train, "val": val}
    chosen = {purpose: path for purpose in purposes if (path := found[purpose]) is not None}
    _require_all(layout, chosen, purposes, list(jsons), train)
    return chosen


def _require_all(
    layout: DatasetLayout,
    chosen: Mapping[str, Any],
    purposes: tuple[str, ...],
    names: list[str],
    train: Path | None = None,
) -> None:
    """Raise if a purpose has no split; `names` are those there are, `train` the json of the images to train on."""
    missing = [purpose for purpose in purposes if purpose not in chosen]
    if not missing:
        return
    shown = {"train": "training", "val": "validation"}[missing[0]]
    there = f"found: {', '.join(names)}" if names != ["all"] else "one annotation file for all images"
    there = "; ".join([there, *_passed_over(layout)])
    hint = " Set data.val_fraction=0.1 to hold out a tenth of its images." if missing == ["val"] else ""
    if missing == ["val"] and "train" not in purposes:
        whole = "rename that split to val" if train is None else f"give its json, data={train}"
        hint = (
            " Set data.val_fraction as in the training to measure what that held out. To measure all its images, "
            f"trained on or not, {whole}."
        )
    raise DataError(f"{layout.source}: there is no {shown} split ({there}).{hint}")


def _origin(path: Path, images: Path, layout: DatasetLayout) -> str:
    where = _inside(images, layout.root)
    return (
        f"{printable(_inside(path, layout.root))}, images in {'the same folder' if where == '.' else printable(where)}"
    )


def _convert(layout: DatasetLayout, config: DataConfig, folder: Path, purposes: tuple[str, ...]) -> Opened:
    """Convert a YOLO or VOC dataset."""
    read = read_voc if layout.kind == "voc" else read_yolo
    imported = read(layout.place, limits=config)
    if config.val_fraction is not None:
        hold_out(imported, config.val_fraction, setting="data.val_fraction")
    validate(imported, layout.source)
    train, val = pick_train_val(imported)
    if val is None and "train" not in purposes and not (imported.divided and train in ("train", "trainval")):
        val = train  # to evaluate on, images that are in no split need none
    named = {"train": train, "val": val}
    chosen = {purpose: split for purpose in purposes if (split := named[purpose]) is not None}
    _require_all(layout, chosen, purposes, list(imported.splits))
    # of all splits, so that an image has the same id whatever the purposes are
    datasets, images = to_coco(imported)
    splits = {}
    for purpose, split in chosen.items():
        target = folder / f"{purpose}.json"
        write_dataset(datasets[split], target)
        splits[purpose] = Split(target, Path(images), len(datasets[split]["images"]), f"its split {split}")
    names = printable(", ".join(imported.classes[key] for key in sorted(imported.classes)))
    order = "by alphabet, since VOC gives them no order" if layout.kind == "voc" else "as numbered"
    remarks = [f"{len(imported.classes)} classes {order}: {names}"]
    if unused := [name for name in imported.splits if name not in (train, val)]:
        remarks.append(f"not used: split {', '.join(unused)}")
    files = [*_write_notes(imported.notes, folder / NOTES_FILE), *_written(splits, folder)]
    return Opened(layout, splits, remarks, imported.notes, files, imported.divided)


def _write_notes(notes: Notes, path: Path) -> list[str]:
    """Write all notes of a conversion to a file, and name it if there are any."""
    path.unlink(missing_ok=True)
    lines = [f"{kind}: {place}\n" for kind, places in notes.places.items() for place in places]
    if lines:
        path.write_text("".join(lines), encoding="utf-8")
    return [f"every case: {printable(path)}"] if lines else []


def _written(splits: Mapping[str, Split], folder: Path) -> list[str]:
    """Name the jsons that were written."""
    paths = [split.json for split in splits.values() if split.json.parent == folder]
    return [f"written: {', '.join(map(printable, paths))}"] if paths else []


def _inside(path: Path, folder: Path) -> str:
    """Return a path relative to a folder it is in, else as it is."""
    full, top = os.path.abspath(path), os.path.abspath(folder)
    return os.path.relpath(full, top) if os.path.join(full, "").startswith(os.path.join(top, "")) else full
