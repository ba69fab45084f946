"""Common part of the dataset converters: from labeled images of any source format to COCO dictionaries."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from brs_detr.data.issues import DataError
from brs_detr.data.split import hold_out_images, require_fraction, short_names
from brs_detr.user_files import MODEST_BYTES, TEXT_BYTES, UserFileError, printable, read_file

IMAGE_FOLDERS = ("images", "jpegimages", "image", "imgs", "img")
_SPLIT = re.compile(
    r"(?:(train)(?:ing)?|(val)(?:id)?(?:ation)?|(test)(?:ing)?)(?:[ _-]?(?:images?|imgs?|set|data|\d{4}))*",
    re.IGNORECASE,
)


class Notes:
    """Log of what a conversion dropped, changed or guessed: locations by kind (a phrase in the plural)."""

    def __init__(self) -> None:
        self.places: dict[str, list[str]] = {}

    def add(self, kind: str, place: object) -> None:
        """Add a location under a kind."""
        self.places.setdefault(kind, []).append(printable(place))

    def lines(self, show: int = 3) -> list[str]:
        """Format one line per kind: the count and the first `show` locations."""
        lines = []
        for kind, places in self.places.items():
            more = f" ... and {len(places) - show:,} more" if len(places) > show else ""
            lines.append(f"{len(places):,} x {kind}: {'; '.join(places[:show])}{more}")
        return lines


class Sample(NamedTuple):
    """An image and its objects.

    Attributes:
        path: absolute path of the file.
        size: (h, w) of the frame that the boxes are drawn in.
        objects: COCO annotations without their ids: category_id, bbox (x, y, w, h in pixels), area, iscrowd.
    """

    path: Path
    size: tuple[int, int]
    objects: list[dict[str, Any]]


@dataclass
class ImportedDataset:
    """A converted dataset: class names by category id, images by split, and notes on the conversion.

    `divided` is False if the dataset names no splits: then all images are in one, mostly "train".
    """

    classes: dict[int, str]
    splits: dict[str, list[Sample]]
    notes: Notes = field(default_factory=Notes)
    divided: bool = True


def find_files(root: Path, endings: Sequence[str], notes: Notes) -> list[Path]:
    """Find all files under a folder with one of the (lower-case) endings, sorted; hidden files are skipped.

    Args:
        root: the folder; links in it are followed.
        endings: file endings, with the dot.
        notes: files whose name is not UTF-8 are added here: a json cannot name them.
    """
    paths: list[Path] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(os.path.abspath(root), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        real = os.path.realpath(folder)
        if real in seen:  # a link to a parent folder would never end
            folders[:] = []
            continue
        seen.add(real)
        for name in names:
            if name.startswith(".") or not name.lower().endswith(tuple(endings)):
                continue
            try:
                os.path.join(folder, name).encode()
            except UnicodeEncodeError:
                notes.add("files left out whose name is not UTF-8", ascii(os.path.join(folder, name)))
                continue
            paths.append(Path(folder, name))
    return sorted(paths)


def count_endings(root: Path, endings: Sequence[str]) -> str:
    """Describe how many files of other formats are under a folder, for the end of an error message."""
    counts = Counter(path.suffix.lower() for path in find_files(root, endings, Notes()))
    return f" (but there are {', '.join(f'{n:,} {ending}' for ending, n in counts.items())} files)" if counts else ""


def decode(data: bytes, declared: str | None = None) -> str:
    """Decode text of unknown encoding: by its byte order mark, as declared, as UTF-8, or else as Latin-1."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    if declared and declared.lower().startswith("utf-"):
        declared = None  # UTF-16 has a byte order mark, so without one the text is UTF-8 or the declaration is wrong
    for encoding in (declared, "utf-8-sig"):
        try:
            if encoding:
                return data.decode(encoding)
        except (UnicodeError, LookupError):
            continue
    return data.decode("latin-1")  # never fails: every byte is a character


def read_modest(path: Path, max_bytes: int = MODEST_BYTES) -> bytes:
    """Read a file that describes a dataset or an image.

    Raises:
        DataError: the file is not regular, or larger than any such file should be.
        OSError: as `open` does.
    """
    try:
        return read_file(path, max_bytes)
    except UserFileError as error:
        raise DataError(f"{path}: this file is not read: {error}.") from None


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file of unknown encoding and line ends, stripped; blank lines are kept.

    Raises:
        DataError, OSError: as `read_modest` does.
    """
    # not splitlines, which also splits at characters that a class name may contain
    text = decode(read_modest(path, TEXT_BYTES)).replace("\r\n", "\n").replace("\r", "\n")
    return [line.strip() for line in text.split("\n")]


def same_name(name: str) -> str:
    """Normalize a file name, so that names which differ only in case or in composed accents become equal."""
    return unicodedata.normalize("NFC", name).casefold()


def split_named(folder: str) -> str | None:
    """Return train, val or test if a folder's name means that split (valid, test_images, train2017, ...)."""
    match = _SPLIT.fullmatch(folder)
    return next(group for group in match.groups() if group).lower() if match else None


def split_of(path: Path, root: Path) -> str | None:
    """Return the split named by a folder between `root` and a file, the outermost first; None if there is no such."""
    return next(filter(None, map(split_named, path.relative_to(root).parts[:-1])), None)


def clean_boxes(
    objects: Iterable[tuple[str, dict[str, Any]]], size: tuple[int, int], notes: Notes
) -> list[dict[str, Any]]:
    """Drop invalid and duplicate boxes, and clip those that exceed their image by less than half a pixel.

    Larger overhangs are kept: training clips them and counts them (`box_clipped`).

    Args:
        objects: (location for the notes, annotation with a `bbox` x, y, w, h in pixels).
        size: (h, w) of the image.
        notes: dropped boxes are added here.
    """
    kept: list[dict[str, Any]] = []
    seen: set[str] = set()
    height, width = size
    for place, annotation in objects:
        x, y, w, h = annotation["bbox"]
        left, top, right, bottom = x, y, x + w, y + h
        if not all(map(math.isfinite, (left, top, right, bottom))):
            notes.add("boxes left out that are not finite numbers", place)
        elif w <= 0 or h <= 0:
            notes.add("boxes left out that have no width or no height", place)
        elif right <= 0 or bottom <= 0 or left >= width or top >= height:
            notes.add("boxes left out that lie outside their image", place)
        else:
            left, top = (0.0 if -0.5 < low < 0 else low for low in (left, top))
            right = width if width < right < width + 0.5 else right
            bottom = height if height < bottom < height + 0.5 else bottom
            # 4 digits: products of fractions and sizes are not exact, and duplicates must become equal
            box = [round(value, 4) for value in (left, top, right - left, bottom - top)]
            key = repr((annotation["category_id"], box, annotation.get("segmentation")))
            if key in seen:
                notes.add("boxes left out that repeat another of the image", place)
                continue
            seen.add(key)
            kept.append({**annotation, "bbox": box, "area": annotation.get("area") or round(box[2] * box[3], 4)})
    return kept


def hold_out(imported: ImportedDataset, fraction: float, seed: int = 0, setting: str = "--val-fraction") -> None:
    """Split a fraction of train off as val, with all classes on both sides as far as possible: see `split.py`.

    Args:
        imported: its train split is divided.
        fraction: of the images.
        seed: another one gives another choice.
        setting: what gives the fraction, for errors.

    Raises:
        DataError: there is a val split already, there is no train split, or it is too small.
    """
    require_fraction(fraction, {name: len(group) for name, group in imported.splits.items()}, setting)
    samples = imported.splits["train"]
    base = _common_folder(imported)  # absolute names would give another choice where the dataset was moved
    names = short_names([_name_in(base, sample.path) for sample in samples])
    classes: dict[str, set[Hashable]] = {name: set() for name in names}
    for name, sample in zip(names, samples, strict=True):
        classes[name] |= {item["category_id"] for item in sample.objects if not item.get("iscrowd")}
    held = hold_out_images(classes, fraction, seed)
    imported.splits["train"] = [sample for name, sample in zip(names, samples, strict=True) if name not in held]
    imported.splits["val"] = [sample for name, sample in zip(names, samples, strict=True) if name in held]


def _common_folder(imported: ImportedDataset) -> str:
    """Return the deepest folder that holds the images of all splits."""
    return os.path.commonpath({sample.path.parent for samples in imported.splits.values() for sample in samples})


def _name_in(base: str, path: Path) -> str:
    """Return the path of an image relative to a folder, with slashes."""
    return Path(os.path.relpath(path, base)).as_posix()


def pick_train_val(imported: ImportedDataset) -> tuple[str, str | None]:
    """Choose the splits to train and to validate on; None if there is no split to validate on."""
    names = list(imported.splits)
    train = next((name for name in ("train", "trainval") if name in names), names[0])
    return train, next((name for name in ("val", "test") if name in names and name != train), None)


def validate(imported: ImportedDataset, source: object) -> None:
    """Drop empty splits; note class names that differ in case only, and images both trained and validated on.

    Raises:
        DataError: there is no object; the message names `source`.
    """
    notes = imported.notes
    if not any(sample.objects for samples in imported.splits.values() for sample in samples):
        reasons = "; ".join(notes.lines(1)) or "the labels are empty"
        raise DataError(f"{source}: there is no object to train on ({reasons}).")
    for split in [split for split, samples in imported.splits.items() if not samples]:
        del imported.splits[split]
        notes.add("splits left out without an image", split)
    names: dict[str, str] = {}
    for name in imported.classes.values():
        if names.setdefault(same_name(name), name) != name:
            notes.add("classes that differ in case only", f"{names[same_name(name)]} and {name}")
    train, val = pick_train_val(imported)
    trained = {sample.path for sample in imported.splits[train]}
    for sample in imported.splits[val] if val else ():
        if sample.path in trained:
            notes.add(f"images that are in {train} and in {val}", sample.path)


def to_coco(imported: ImportedDataset) -> tuple[dict[str, dict[str, Any]], str]:
    """Convert to COCO dictionaries by split, and return the folder that their file names are relative to.

    An image has the same id in every split that contains it. Image and annotation ids count from 1.
    """
    paths = sorted({sample.path for samples in imported.splits.values() for sample in samples})
    image_ids = {path: number for number, path in enumerate(paths, 1)}
    base = _common_folder(imported)
    categories = [{"id": key, "name": name} for key, name in sorted(imported.classes.items())]
    datasets = {}
    for split, samples in imported.splits.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for path, (height, width), objects in samples:
            images.append({"id": image_ids[path], "file_name": _name_in(base, path), "height": height, "width": width})
            for annotation in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": image_ids[path], **annotation})
        datasets[split] = {"images": images, "annotations": annotations, "categories": categories}
    return datasets, base
