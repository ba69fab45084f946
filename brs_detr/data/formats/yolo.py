"""YOLO datasets: a text file of fractions per image.

What a YOLO dataset consists of: images by split and class names, from a yaml, a darknet file or the folders.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from brs_detr.data.formats.base import (
    IMAGE_FOLDERS,
    ImportedDataset,
    Notes,
    Sample,
    clean_boxes,
    count_endings,
    decode,
    find_files,
    read_lines,
    read_modest,
    split_named,
    split_of,
)
from brs_detr.data.formats.yolo_labels import (
    LABEL_FOLDERS,
    find_label_files,
    images_of,
    locate,
    places_of,
    read_labels,
    to_annotation,
)
from brs_detr.data.image_io import IMAGE_ENDINGS, ImageError, Limits, read_image_info
from brs_detr.data.issues import DataError
from brs_detr.parsing import load_yaml

_NOT_LABELS = (
    "classes",
    "predefined_classes",
    "train",
    "val",
    "test",
    "notes",
    "readme",
    "convert-notes",
)  # how other files begin


def read_yolo(source: str | Path, *, classes: Sequence[str] = (), limits: Limits | None = None) -> ImportedDataset:
    """Read lines of `class cx cy w h` (fractions of the image), outlines, oriented boxes or poses.

    An outline's box is the rectangle around it. Category ids are the class numbers of the labels.

    Args:
        source: a data.yaml, darknet's .data, or a folder with or without one of them.
        classes: names of the classes 0, 1, ... instead of those that the dataset gives.
        limits: of the sizes of images; by default those of the settings.

    Raises:
        DataError: there is no image, no label file, or no line of them can be used.
    """
    notes = Notes()
    layout = find_layout(Path(source), notes)
    names = dict(enumerate(classes)) or layout.names
    files = find_label_files(path for paths in layout.splits.values() for path in paths)
    splits = _labeled_splits(layout, files, notes)
    samples: dict[Path, Sample | None] = {}
    for path in tqdm(dict.fromkeys(path for paths in splits.values() for path in paths), disable=None, leave=False):
        samples[path] = _sample(path, files[path], names, layout.keypoints, notes, limits)
    imported = {split: [samples[path] for path in paths if samples[path]] for split, paths in splits.items()}
    if not names:
        found = {item["category_id"] for group in imported.values() for sample in group for item in sample.objects}
        names = {number: f"class_{number}" for number in sorted(found)}
        for name in names.values():
            notes.add(MADE_UP, name)
    _note_label_files(files, notes)
    return ImportedDataset(names, imported, notes)


def _labeled_splits(layout: Layout, files: dict[Path, Path | None], notes: Notes) -> dict[str, list[Path]]:
    """The splits but for those that nobody has labeled."""
    splits = {}
    for split, images in layout.splits.items():
        if any(files[image] for image in images):
            splits[split] = list(dict.fromkeys(images))
        elif images:
            notes.add("splits left out without a single label file", f"{split} ({len(images):,} images)")
    if not splits:
        image = next(iter(files))
        looked = ", ".join(map(str, places_of(image)))
        others = count_endings(image.parent, (".xml", ".json"))
        raise DataError(f"{layout.source}: no image has a label file, {image} none of {looked}{others}.")
    return splits


def _sample(
    image: Path,
    file: Path | None,
    names: dict[int, str],
    keypoints: int,
    notes: Notes,
    limits: Limits | None,
) -> Sample | None:
    try:
        info = read_image_info(image, limits)
    except ImageError as error:
        notes.add("images left out that cannot be read", error)
        return None
    if file is None:
        notes.add("images without a label file: kept as background", image)
    elif file.stat().st_size == 0:
        notes.add("images with an empty label file: kept as background", image)
    if info.orientation in (2, 3, 4):
        notes.add("images that EXIF mirrors or stands on their head: boxes are written for the stored pixels", image)
    objects = []
    for place, (label, shape) in read_labels(file, keypoints, notes) if file else ():
        if names and label not in names:
            notes.add("label lines left out whose class has no name", f"{place} (class {label})")
            continue
        objects.append((place, {"category_id": label, **to_annotation(shape, info.upright_size, info.orientation)}))
    return Sample(image, info.upright_size, clean_boxes(objects, info.upright_size, notes))


def _note_label_files(files: dict[Path, Path | None], notes: Notes) -> None:
    """Note label files of two images (a.jpg and a.png) and those of none."""
    used: dict[Path, Path] = {}
    for image, file in files.items():
        if file is not None and used.setdefault(file, image) is not image:
            notes.add("images that share their label file with another image", f"{image} and {used[file]}")
    for folder in sorted({file.parent for file in used}):
        for file in sorted(folder.glob("*.txt")):
            if file not in used and not file.stem.lower().startswith(_NOT_LABELS):
                notes.add("label files left out whose image is in no split", file)


_SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
MADE_UP = "class names not found; using class_0, class_1, ... (set --classes)"
_MOST_CLASSES = 100_000  # that are named by number alone
_CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels")


@dataclass
class Layout:
    """What a dataset consists of.

    Attributes:
        source: file or folder that said so, for messages.
        names: class names by number; empty where nothing tells them.
        splits: image files by split.
        keypoints: numbers after each box of a pose dataset, else 0.
    """

    source: Path
    names: dict[int, str]
    splits: dict[str, list[Path]] = field(default_factory=dict)
    keypoints: int = 0


def find_layout(source: Path, notes: Notes) -> Layout:
    """Layout of a .yaml, of darknet's .data, or of a folder with or without one of them.

    Raises:
        DataError: it is none of these, cannot be read, or leads to no image.
    """
    if not source.exists():
        raise DataError(f"{source}: there is no such file or folder.")
    file = source if source.is_file() else _settings_file(source)
    if file is None:
        return _of_folder(source, notes)
    if file.suffix.lower() in (".yaml", ".yml"):
        return _of_settings(_read_yaml(file), file, notes)
    if file.suffix.lower() == ".data":
        return _of_settings(_read_pairs(file), file, notes)
    raise DataError(f"{source}: this is neither a folder nor a data.yaml; an archive must be unpacked first.")


def _settings_file(folder: Path) -> Path | None:
    """The folder's yaml that names splits or classes, or its .data file."""
    files = [file for file in sorted(folder.glob("*.y*ml")) if _is_about_images(_read_yaml(file, False))]
    files = [file for file in files if file.name in _YAML_NAMES][:1] or files
    files = files or [file for file in sorted(folder.glob("*.data")) if _is_about_images(_read_pairs(file))]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{folder}: several files describe a dataset; give one of {names} instead of the folder.")
    return files[0] if files else None


def _read_yaml(file: Path, strict: bool = True) -> dict[str, Any]:
    """Settings with every scalar as text: a class may be called `no`, `null` or `007`."""
    try:
        settings = load_yaml(decode(read_modest(file)), yaml.BaseLoader)
    except DataError:
        if strict or file.name in _YAML_NAMES:
            raise
        settings = {}
    except yaml.YAMLError as error:
        if strict or file.name in _YAML_NAMES:
            raise DataError(f"{file}: this is not valid YAML: {' '.join(str(error).split())}.") from None
        settings = {}
    if strict and not isinstance(settings, dict):
        raise DataError(f"{file}: this is not the data.yaml of a dataset: it has no `train` and no `names`.")
    return settings if isinstance(settings, dict) else {}


def _read_pairs(file: Path) -> dict[str, Any]:
    """Darknet's `key = value` lines, its number of classes under the name that a yaml has for it."""
    pairs = (line.partition("=") for line in read_lines(file) if not line.startswith("#"))
    settings = {key.strip(): value.strip() for key, _, value in pairs}
    return {**settings, "nc": settings.get("classes")}


def _is_about_images(settings: dict[str, Any]) -> bool:
    """Other programs' settings may lie in the folder too, some with a section `train`."""
    return "names" in settings or any(isinstance(settings.get(key), (str, list)) for key in ("train", "val"))


def _of_settings(settings: dict[str, Any], file: Path, notes: Notes) -> Layout:
    file = Path(os.path.abspath(file))
    base = str(settings.get("path") or "")
    root = locate(base, (file.parent, Path.cwd())) if base else None
    if base and root is None:
        notes.add("paths not found, the file's own folder is taken", f"{file}: path: {base}")
    roots = tuple(dict.fromkeys((root or file.parent, file.parent, Path.cwd())))
    layout = Layout(file, {}, keypoints=_keypoints(settings, file))
    if not any(settings.get(key) for key in _SPLIT_KEYS):
        layout.splits = _of_folder(file.parent, notes).splits
    for key, split in _SPLIT_KEYS.items():
        entries = settings.get(key) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            images = images_of(entry, roots, f"{file.name}: {key}: {entry}", notes)
            layout.splits[split] = layout.splits.get(split, []) + images
    if not any(layout.splits.values()) or not layout.splits.get("train", [""]):
        what = "for its `train`" if any(layout.splits.values()) else "for its splits"
        download = "; fetch the images first, its `download` is not followed" if settings.get("download") else ""
        raise DataError(f"{file}: no image was found {what} ({'; '.join(notes.lines(1))}){download}.")
    layout.names = _names_of_settings(settings, file, roots, notes) or names_of_text(_homes(roots[0], layout))
    return layout


def _keypoints(settings: dict[str, Any], file: Path) -> int:
    shape = settings.get("kpt_shape") or [0]
    try:
        if len(shape) > 2:
            raise ValueError(shape)
        return math.prod(int(number) for number in shape)
    except (TypeError, ValueError):
        raise DataError(f"{file}: kpt_shape must be two integers, not {str(shape)[:80]}.") from None


def _names_of_settings(settings: dict[str, Any], file: Path, roots: Iterable[Path], notes: Notes) -> dict[int, str]:
    names, count = settings.get("names"), settings.get("nc")
    if isinstance(names, str) and names:
        place = locate(names, roots)
        names = [line for line in read_lines(place)] if place and place.is_file() else [names]
        names = {number: name for number, name in enumerate(names) if name}
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        names = {int(number): name.strip() for number, name in (names or {}).items()}
        if names and count and int(count) != len(names):
            notes.add("settings that disagree: `names` is taken", f"{file}: nc is {count}, names has {len(names)}")
        if names or not count:
            return names
        if int(count) > _MOST_CLASSES:
            raise DataError(f"{file}: nc is {int(count):,}, more classes than any dataset has; are names missing?")
        for number in range(int(count)):
            notes.add(MADE_UP, f"class_{number}")
        return {number: f"class_{number}" for number in range(int(count))}
    except DataError:
        raise
    except (AttributeError, TypeError, ValueError):
        raise DataError(f"{file}: `names` must be a list of names or `number: name` pairs, `nc` a number.") from None


def _of_folder(source: Path, notes: Notes) -> Layout:
    """Splits by lists in the folder (train.txt ...) or by folder names; else all images are train."""
    root = Path(os.path.abspath(source))
    while len(inside := [place for place in root.iterdir() if not place.name.startswith((".", "__"))]) == 1:
        if not inside[0].is_dir() or split_named(inside[0].name) or inside[0].name.lower() in IMAGE_FOLDERS:
            break
        root = inside[0]
        if _settings_file(root):
            return find_layout(root, notes)
    lists = {key: f"{key}.txt" for key in _SPLIT_KEYS if _is_list(root / f"{key}.txt")}
    if lists:
        return _of_settings(lists, root / next(iter(lists.values())), notes)
    homes = [place for place in inside if place.is_dir() and place.name.lower() in IMAGE_FOLDERS]
    layout, groups = Layout(root, {}), {}
    for image in [path for home in homes or [root] for path in find_files(home, IMAGE_ENDINGS, notes)]:
        groups.setdefault(split_of(image, root), []).append(image)
    rest = groups.pop(None, [])
    if groups:
        for image in rest:
            notes.add("images left out beside the folders of the splits", image)
    layout.splits = groups or {split_named(root.name) or "train": rest}
    if not any(layout.splits.values()):
        raise DataError(f"{source}: no image was found here; give the folder or data.yaml of a YOLO dataset.")
    layout.names = names_of_text(_homes(root, layout))
    return layout


def _is_list(path: Path) -> bool:
    """Does a text file list images? (train.txt may also be the labels of train.jpg.)"""
    first = next(filter(None, read_lines(path)), "") if path.is_file() else ""
    return first.lower().endswith(IMAGE_ENDINGS)


def _homes(root: Path, layout: Layout) -> list[Path]:
    """Folders that a file of class names may lie in."""
    folders = [root, root / "data", *(root / name for name in LABEL_FOLDERS)]
    for images in layout.splits.values():
        folders += [place.parent for place in (images and places_of(images[0])) or []]
    return list(dict.fromkeys(folders))


def names_of_text(folders: Iterable[Path]) -> dict[int, str]:
    """Class names by line number, from the classes.txt or obj.names in one of the folders; {} where there is none.

    Raises:
        DataError: two of the files disagree, so one number would stand for two classes.
    """
    first, names = None, {}
    for file in (folder / name for folder in folders for name in _CLASS_FILES):
        if file.is_file():
            found = {number: line for number, line in enumerate(read_lines(file)) if line}
            if first and found != names:
                raise DataError(f"{first} and {file} name different classes; bring the labels to one list first.")
            first, names = first or file, found
    return names
