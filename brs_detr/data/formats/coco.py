"""Split a COCO json by image, take out the grouping category of Roboflow's exports, and write jsons."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from brs_detr.data.issues import DataError
from brs_detr.data.json_file import as_int
from brs_detr.data.split import hold_out_images, require_fraction, short_names
from brs_detr.user_files import UserFileError, read_start

_BEGINNING = '{"info": {"description": "converted by brs_detr'  # first characters of every json that is written here


def split_coco(
    data: dict[str, Any], fraction: float, seed: int = 0, setting: str = "data.val_fraction"
) -> dict[str, dict[str, Any]]:
    """Split the content of a COCO json into "train" and "val"; both keep all categories and every other entry.

    Annotations go with their image. What is no image, or belongs to none, stays in train, where it is counted.

    Args:
        data: content of the json; not changed.
        fraction: of the images to hold out.
        seed: another one gives another choice.
        setting: what gives the fraction, for errors.

    Raises:
        DataError: it cannot be split.
    """
    images = [image for image in data["images"] if _number(image, "id") is not None]
    names = short_names([str(image.get("file_name", image["id"])) for image in images])
    name_of = {_number(image, "id"): name for image, name in zip(images, names, strict=True)}
    require_fraction(fraction, {"train": len(set(names))}, setting)
    classes: dict[str, set[Hashable]] = {name: set() for name in names}
    for annotation in data["annotations"]:
        name, category = name_of.get(_number(annotation, "image_id")), _number(annotation, "category_id")
        if name is not None and category is not None and not annotation.get("iscrowd"):
            classes[name].add(category)
    held = hold_out_images(classes, fraction, seed)
    parts = {}
    for split in ("train", "val"):
        own = [i for i in data["images"] if (name_of.get(_number(i, "id")) in held) == (split == "val")]
        objects = [a for a in data["annotations"] if (name_of.get(_number(a, "image_id")) in held) == (split == "val")]
        parts[split] = {**data, "images": own, "annotations": objects}
    return parts


def _number(entry: Any, key: str) -> int | None:
    """Return an id of an entry, which may be written in quotes; None without one."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value[:20])
    return as_int(value)


def grouping_category(datasets: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Find the category that Roboflow's exports put before the classes: all others name it as their supercategory.

    Args:
        datasets: contents of the jsons of all splits.

    Returns:
        Its entry; None if there is none, or if any annotation is of it.
    """
    categories = [entry for entry in datasets[0]["categories"] if isinstance(entry, dict)]
    first = next((entry for entry in categories if _number(entry, "id") == 0), None)
    others = [entry for entry in categories if entry is not first]
    if first is None or not others or any(entry.get("supercategory") != first.get("name") for entry in others):
        return None
    annotations = (annotation for data in datasets for annotation in data["annotations"])
    return None if any(_number(annotation, "category_id") == 0 for annotation in annotations) else first


def without_category(data: dict[str, Any], category: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a json without one of its categories, which no annotation is of."""
    return {**data, "categories": [entry for entry in data["categories"] if entry != category]}


def require_free(paths: Iterable[Path], beginning: str = _BEGINNING) -> None:
    """Refuse to overwrite a json that was not written here; earlier conversions are replaced.

    Args:
        paths: of the jsons to write.
        beginning: first characters of every json that the command writes.

    Raises:
        DataError: the message names the file.
    """
    for path in filter(Path.exists, paths):
        try:
            is_own = read_start(path, len(beginning)) == beginning.encode()
        except UserFileError:
            is_own = False
        if not is_own:
            raise DataError(f"{path}: this file exists and was not made by this command. Choose another folder.")


def write_dataset(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write a COCO json, all of it or nothing, and return the data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"info": {"description": _BEGINNING.rpartition('"')[2]}, **{k: v for k, v in data.items() if k != "info"}}
    # a name of its own: two evaluations of one run may write the same file
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return data


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left of `write_dataset` in a folder, to which no other process writes now."""
    for temporary in folder.glob(".*.json-[0-9]*"):
        temporary.unlink(missing_ok=True)
