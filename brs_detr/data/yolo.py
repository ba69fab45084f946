"""YOLO folders (a data.yaml, images/, labels/) to COCO annotations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from brs_detr.data.faults import DataError
from brs_detr.data.outlines import polygon_area
from brs_detr.data.pictures import PictureError, inspect_picture
from brs_detr.data.voc import ENDINGS


def read_yolo(root: str | Path) -> tuple[dict[str, dict[str, Any]], str, list[str]]:
    """Read `class cx cy w h` lines (fractions of the picture), or `class x1 y1 x2 y2 ...` outlines.

    Args:
        root: a data.yaml, or the folder that holds it; without one, a folder with `classes.txt`, `images` and `labels`.

    Returns:
        COCO dictionaries by split name (category ids are the class numbers of the labels), the folder that file names
        are relative to, and the lines of what was skipped.

    Raises:
        DataError: the class names or the pictures cannot be found.
    """
    root = Path(root)
    file = root if root.is_file() else next((p for p in (root / "data.yaml", root / "data.yml") if p.is_file()), None)
    folder = file.parent if file else root
    if file is None:
        names, splits = _names_of_text(root), _splits_of_folders(root)
    else:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        names, splits = _names_of_yaml(settings, file), _splits_of_yaml(settings, folder)
    if not any(splits.values()):
        raise DataError(f"{root}: no picture was found for the splits {', '.join(splits) or '(none)'}.")
    base = os.path.commonpath([str(p.parent.resolve()) for paths in splits.values() for p in paths])
    skipped: list[str] = []
    datasets = {split: _dataset(paths, names, base, skipped) for split, paths in splits.items() if paths}
    return datasets, base, skipped


def _dataset(paths: list[Path], names: dict[int, str], base: str, skipped: list[str]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for path in paths:
        try:
            height, width = inspect_picture(path).upright_size  # fractions are of the picture as shown
        except PictureError as error:
            skipped.append(str(error))
            continue
        key = len(images) + 1
        images.append({"id": key, "file_name": os.path.relpath(path.resolve(), base), "height": height, "width": width})
        label_file = _label_file(path)
        lines = label_file.read_text(encoding="utf-8").splitlines() if label_file.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            annotation = _annotation(line, width, height, names)
            if annotation is None:
                skipped.append(f"{label_file}:{number}: not `class cx cy w h` or an outline, or an unknown class")
                continue
            annotations.append({"id": len(annotations) + 1, "image_id": key, **annotation})
    categories = [{"id": number, "name": name} for number, name in sorted(names.items())]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(line: str, width: int, height: int, names: dict[int, str]) -> dict[str, Any] | None:
    try:
        label, *values = (float(word) for word in line.split())
    except ValueError:
        return None
    if label not in names or not np.isfinite(values).all():
        return None
    if len(values) == 4:
        cx, cy, w, h = values
        box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
        extra: dict[str, Any] = {"area": box[2] * box[3]}
    elif len(values) >= 6 and len(values) % 2 == 0:
        outline = np.reshape(values, (-1, 2)) * (width, height)
        low, high = outline.min(0), outline.max(0)
        box = [*low.tolist(), *(high - low).tolist()]
        extra = {"area": abs(polygon_area(outline)), "segmentation": [outline.ravel().tolist()]}
    else:
        return None
    return {"category_id": int(label), "bbox": [round(value, 4) for value in box], "iscrowd": 0, **extra}


def _label_file(path: Path) -> Path:
    """.../images/.../x.jpg has .../labels/.../x.txt; else x.txt lies beside it."""
    head, found, tail = str(path).rpartition(f"{os.sep}images{os.sep}")
    if found:
        label = Path(f"{head}{os.sep}labels{os.sep}{tail}").with_suffix(".txt")
        if label.is_file() or not path.with_suffix(".txt").is_file():
            return label
    return path.with_suffix(".txt")


def _names_of_yaml(settings: dict[str, Any], file: Path) -> dict[int, str]:
    names = settings.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DataError(f"{file}: it has no list `names` of the classes.")
    return {int(number): str(name) for number, name in names.items()}


def _names_of_text(root: Path) -> dict[int, str]:
    for name in ("classes.txt", "obj.names", "labels/classes.txt"):
        if (root / name).is_file():
            lines = (root / name).read_text(encoding="utf-8").split("\n")
            return {number: line.strip() for number, line in enumerate(lines) if line.strip()}
    raise DataError(f"{root}: neither data.yaml nor classes.txt names the classes.")


def _splits_of_yaml(settings: dict[str, Any], folder: Path) -> dict[str, list[Path]]:
    root = folder / str(settings.get("path") or "")
    splits = {}
    for split in ("train", "val", "test"):
        entries = settings.get(split) or []
        entries = entries if isinstance(entries, list) else [entries]
        splits[split] = [path for entry in entries for path in _pictures(str(entry), (root, folder))]
    return splits


def _pictures(entry: str, roots: tuple[Path, ...]) -> list[Path]:
    """Pictures of one entry: a folder, or a text file that lists them. Exports often have one `../` too many."""
    for text in (entry, entry.removeprefix("../")):
        for root in roots:
            place = root / text
            if place.is_dir():
                return sorted(path for path in place.rglob("*") if path.suffix in ENDINGS)
            if place.is_file():
                lines = [line.strip() for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
                return [root / line.removeprefix("./") for line in lines]
    return []


def _splits_of_folders(root: Path) -> dict[str, list[Path]]:
    images = root / "images" if (root / "images").is_dir() else root
    folders = sorted(
        path for path in images.iterdir() if path.is_dir() and path.name in ("train", "val", "valid", "test")
    )
    groups = {path.name: path for path in folders} or {"all": images}
    return {name: sorted(p for p in path.rglob("*") if p.suffix in ENDINGS) for name, path in groups.items()}
