"""Read YOLO datasets: one text file of normalized boxes per image.

Images by split and class names come from a yaml, from a darknet file, or from the folders.
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

from brs_detr.data.config import Limits
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
    label_candidates,
    locate,
    read_labels,
    to_annotation,
)
from brs_detr.data.image_io import IMAGE_ENDINGS, ImageError, read_image_info
from brs_detr.data.image_search import leads_outside
from brs_detr.data.issues import DataError
from brs_detr.parsing import load_yaml

# beginnings of the names of text files that are not labels
_NOT_LABELS = ("classes", "predefined_classes", "train", "val", "test", "notes", "readme", "convert-notes")


def read_yolo(source: str | Path, *, classes: Sequence[str] = (), limits: Limits | None = None) -> ImportedDataset:
    """Read lines of `class cx cy w h` (fractions of the image size), polygons, oriented boxes or poses.

    The box of a polygon is the rectangle around it. Category ids are the class numbers of the labels.

    Args:
        source: a data.yaml, darknet's .data file, or a folder with or without one of them.
        classes: names of the classes 0, 1, ..., which replace those of the dataset.
        limits: maximum sizes of images; by default those of `Limits`.

    Raises:
        DataError: there is no image, no label file, or no usable line in them.
    """
    notes = Notes()
    dataset = find_dataset(Path(source), notes)
    names = dict(enumerate(classes)) or dataset.names
    files = find_label_files(path for paths in dataset.splits.values() for path in paths)
    splits = _labeled_splits(dataset, files, notes)
    samples: dict[Path, Sample | None] = {}
    for path in tqdm(dict.fromkeys(path for paths in splits.values() for path in paths), disable=None, leave=False):
        samples[path] = _sample(path, files[path], names, dataset.keypoints, notes, limits)
    imported = {split: [sample for path in paths if (sample := samples[path])] for split, paths in splits.items()}
    if not names:
        numbers = {item["category_id"] for group in imported.values() for sample in group for item in sample.objects}
        names = {number: f"class_{number}" for number in sorted(numbers)}
        for name in names.values():
            notes.add(DEFAULT_NAMES, name)
    _note_label_files(files, notes)
    return ImportedDataset(names, imported, notes, dataset.divided)


def _labeled_splits(dataset: YoloDataset, files: dict[Path, Path | None], notes: Notes) -> dict[str, list[Path]]:
    """Return the splits that have at least one label file."""
    splits = {}
    for split, images in dataset.splits.items():
        if any(files[image] for image in images):
            splits[split] = list(dict.fromkeys(images))
        elif images:
            notes.add("splits left out without a single label file", f"{split} ({len(images):,} images)")
    if not splits:
        image = next(iter(files))
        tried = ", ".join(map(str, label_candidates(image)))
        others = count_endings(image.parent, (".xml", ".json"))
        raise DataError(f"{dataset.source}: no image has a label file. For {image} these were tried: {tried}{others}.")
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
    height, width = info.upright_size
    if info.orientation > 1 and (info.orientation < 5 or height == width):  # its size does not tell if it was applied
        notes.add("images that EXIF mirrors or turns to the same size: boxes are written for the stored pixels", image)
    objects = []
    for place, (label, shape) in read_labels(file, keypoints, notes) if file else ():
        if names and label not in names:
            notes.add("label lines left out whose class has no name", f"{place} (class {label})")
            continue
        objects.append((place, {"category_id": label, **to_annotation(shape, info.upright_size, info.orientation)}))
    return Sample(image, info.upright_size, clean_boxes(objects, info.upright_size, notes))


def _note_label_files(files: dict[Path, Path | None], notes: Notes) -> None:
    """Note label files shared by two images (a.jpg and a.png) and label files without an image."""
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
DEFAULT_NAMES = "class names not found; using class_0, class_1, ... (convert-dataset --classes sets them)"
_MAX_CLASSES = 100_000  # named class_0, class_1, ...: a mistyped `nc` must not fill the memory
_CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels")


@dataclass
class YoloDataset:
    """Contents of a YOLO dataset.

    Attributes:
        source: file or folder that describes it, for messages.
        names: class names by number; empty if they are not given.
        splits: image files by split.
        keypoints: count of numbers after each box in a pose dataset, else 0.
        divided: False if neither lists nor folders name splits: then all images are in one.
    """

    source: Path
    names: dict[int, str]
    splits: dict[str, list[Path]] = field(default_factory=dict)
    keypoints: int = 0
    divided: bool = True


def find_dataset(source: Path, notes: Notes) -> YoloDataset:
    """Find the images and class names of a .yaml, of darknet's .data, or of a folder with or without one of them.

    Raises:
        DataError: the source is of another kind, cannot be read, or has no image.
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
    raise DataError(f"{source}: this is neither a folder nor a data.yaml. Unpack an archive first.")


def _settings_file(folder: Path) -> Path | None:
    """Find the folder's yaml that names splits or classes, or its .data file."""
    files = [file for file in sorted(folder.glob("*.y*ml")) if _is_about_images(_read_yaml(file, False))]
    files = [file for file in files if file.name in _YAML_NAMES][:1] or files
    files = files or [file for file in sorted(folder.glob("*.data")) if _is_about_images(_read_pairs(file))]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{folder}: several files describe a dataset. Give one of {names} instead of the folder.")
    return files[0] if files else None


def _read_yaml(file: Path, strict: bool = True) -> dict[str, Any]:
    """Read settings with every scalar as a string: a class may be called `no`, `null` or `007`.

    Args:
        file: the yaml.
        strict: False returns {} for a file that may belong to another program, instead of raising.
    """
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
    """Read darknet's `key = value` lines; its `classes` becomes `nc`, as a yaml calls the number of classes."""
    pairs = (line.partition("=") for line in read_lines(file) if not line.startswith("#"))
    settings = {key.strip(): value.strip() for key, _, value in pairs}
    return {**settings, "nc": settings.get("classes")}


def _is_about_images(settings: dict[str, Any]) -> bool:
    """Recognize the settings of a dataset: other programs' settings may be in the folder, with a section `train`."""
    return "names" in settings or any(isinstance(settings.get(key), (str, list)) for key in ("train", "val"))


def _of_settings(settings: dict[str, Any], file: Path, notes: Notes) -> YoloDataset:
    file = Path(os.path.abspath(file))
    base = str(settings.get("path") or "")
    root = locate(base, (file.parent, Path.cwd())) if base else None
    if base and root is None:
        notes.add("paths not found, the file's own folder is used", f"{file}: path: {base}")
    roots = tuple(dict.fromkeys((root or file.parent, file.parent, Path.cwd())))
    dataset = YoloDataset(file, {}, keypoints=_keypoints(settings, file))
    if not any(settings.get(key) for key in _SPLIT_KEYS):
        found = _of_folder(file.parent, notes)
        dataset.splits, dataset.divided = found.splits, found.divided
    for key, split in _SPLIT_KEYS.items():
        entries = settings.get(key) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            images = images_of(entry, roots, f"{file.name}: {key}: {entry}", notes)
            dataset.splits[split] = dataset.splits.get(split, []) + images
    if not any(dataset.splits.values()) or not dataset.splits.get("train", [""]):
        what = "for its `train`" if any(dataset.splits.values()) else "for its splits"
        download = ". Download the images first; its `download` is not run" if settings.get("download") else ""
        raise DataError(f"{file}: no image was found {what} ({'; '.join(notes.lines(1))}){download}.")
    dataset.names = _names_of_settings(settings, file, roots, notes) or names_of_text(_name_folders(roots[0], dataset))
    return dataset


def _keypoints(settings: dict[str, Any], file: Path) -> int:
    shape = settings.get("kpt_shape") or [0]
    try:
        if len(shape) > 2:
            raise ValueError(shape)
        return math.prod(int(number) for number in shape)
    except (TypeError, ValueError):
        raise DataError(f"{file}: kpt_shape must be two integers, not {str(shape)[:80]}.") from None


def _names_of_settings(settings: dict[str, Any], file: Path, roots: Iterable[Path], notes: Notes) -> dict[int, str]:
    """Read `names`: a list, a dictionary, or a path; without it, `nc` default names."""
    names, count = settings.get("names"), settings.get("nc")
    if isinstance(names, str) and names:
        names = {number: name for number, name in enumerate(_lines_of_names(names, file, roots)) if name}
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        names = {int(number): name.strip() for number, name in (names or {}).items()}
        if names and count and int(count) != len(names):
            notes.add("settings that disagree: `names` is used", f"{file}: nc is {count}, names has {len(names)}")
        if names or not count:
            return names
        if int(count) > _MAX_CLASSES:
            raise DataError(
                f"{file}: nc is {int(count):,}, more classes than any dataset has. Correct it, or add names."
            )
        for number in range(int(count)):
            notes.add(DEFAULT_NAMES, f"class_{number}")
        return {number: f"class_{number}" for number in range(int(count))}
    except DataError:
        raise
    except (AttributeError, TypeError, ValueError):
        raise DataError(f"{file}: `names` must be a list of names or `number: name` pairs, `nc` a number.") from None


def _lines_of_names(text: str, file: Path, roots: Iterable[Path]) -> list[str]:
    """Return the lines of the file that `names` is the path of, else the one name that it is.

    Raises:
        DataError: the file is not in the folder of the settings. They may come from anyone, and each line would be the
            name of a class: in logs, in weights, and where these are published.
    """
    found = [locate(text, (file.parent,)), locate(text, roots)]
    places = [place for place in found if place is not None and place.is_file()]
    for place in places:
        if not leads_outside(str(place), file.parent):
            return list(read_lines(place))
    if places and (Path(text).suffix or "/" in text or "\\" in text):
        raise DataError(
            f"{file}: names: {text} is a file outside {file.parent}, which is not read. Copy it there, or write the "
            "names as a list."
        )
    return [text]


def _of_folder(source: Path, notes: Notes) -> YoloDataset:
    """Find splits by lists in the folder (train.txt, ...) or by folder names; else all images are train."""
    root = Path(os.path.abspath(source))
    # archives often unpack to a single folder around everything
    while len(inside := [place for place in root.iterdir() if not place.name.startswith((".", "__"))]) == 1:
        if not inside[0].is_dir() or split_named(inside[0].name) or inside[0].name.lower() in IMAGE_FOLDERS:
            break
        root = inside[0]
        if _settings_file(root):
            return find_dataset(root, notes)
    lists = {key: f"{key}.txt" for key in _SPLIT_KEYS if _is_list(root / f"{key}.txt")}
    if lists:
        return _of_settings(lists, root / next(iter(lists.values())), notes)
    image_folders = [path for path in inside if path.is_dir() and path.name.lower() in IMAGE_FOLDERS]
    dataset = YoloDataset(root, {})
    groups: dict[str | None, list[Path]] = {}
    for image in [path for folder in image_folders or [root] for path in find_files(folder, IMAGE_ENDINGS, notes)]:
        groups.setdefault(split_of(image, root), []).append(image)
    rest = groups.pop(None, [])
    if groups:
        for image in rest:
            notes.add("images left out beside the folders of the splits", image)
    splits = {name: images for name, images in groups.items() if name is not None}
    dataset.splits, dataset.divided = splits or {split_named(root.name) or "train": rest}, bool(splits)
    if not any(dataset.splits.values()):
        raise DataError(f"{source}: no image was found here. Give the folder or data.yaml of a YOLO dataset.")
    dataset.names = names_of_text(_name_folders(root, dataset))
    return dataset


def _is_list(path: Path) -> bool:
    """Return True if a text file lists images: train.txt may also be the labels of train.jpg."""
    first = next(filter(None, read_lines(path)), "") if path.is_file() else ""
    return first.lower().endswith(IMAGE_ENDINGS)


def _name_folders(root: Path, dataset: YoloDataset) -> list[Path]:
    """Return the folders that may contain a file of class names."""
    folders = [root, root / "data", *(root / name for name in LABEL_FOLDERS)]
    for images in dataset.splits.values():
        folders += [path.parent for path in (label_candidates(images[0]) if images else [])]
    return list(dict.fromkeys(folders))


def names_of_text(folders: Iterable[Path]) -> dict[int, str]:
    """Read class names by line number from the classes.txt or obj.names in one of the folders; {} without a file.

    Raises:
        DataError: two of the files disagree, so one number would mean two classes.
    """
    first: Path | None = None
    names: dict[int, str] = {}
    for file in (folder / name for folder in folders for name in _CLASS_FILES):
        if file.is_file():
            lines = {number: line for number, line in enumerate(read_lines(file)) if line}
            if first and lines != names:
                raise DataError(f"{first} and {file} name different classes. Renumber the labels by one list first.")
            first, names = first or file, lines
    return names
