"""Pascal VOC folders to COCO annotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from brs_detr.data.faults import DataError
from brs_detr.data.pictures import PictureError, inspect_picture

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".JPG", ".JPEG", ".PNG")


def read_voc(
    root: str | Path, *, classes: Sequence[str] = (), one_based: bool = False, keep_difficult: bool = False
) -> tuple[dict[str, dict[str, Any]], str, list[str]]:
    """Read `Annotations/*.xml`, split by `ImageSets/Main/*.txt` where that exists.

    Args:
        root: folder with `Annotations` and `JPEGImages` (or `images`), or with xml files beside their pictures.
        classes: names in the order wanted; by default all that occur, by alphabet. Ids count from 1.
        one_based: corners are pixel numbers from 1, both included, as in the original VOC. By default x, y are taken
            as they are and width = xmax - xmin, as most labelling tools write them.
        keep_difficult: objects marked difficult are ordinary objects; otherwise they become crowd (ignored) regions.

    Returns:
        COCO dictionaries by split name, the folder that file names are relative to, and the lines of what was skipped.

    Raises:
        DataError: there is no annotation, or an object's name is not among `classes`.
    """
    root = Path(root)
    notes = root / "Annotations" if (root / "Annotations").is_dir() else root
    pictures = next((root / name for name in ("JPEGImages", "images") if (root / name).is_dir()), notes)
    trees, skipped = {}, []
    for path in sorted(notes.glob("*.xml")):
        try:
            trees[path.stem] = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            skipped.append(f"{path}: no valid XML ({error})")
    if not trees:
        raise DataError(f"{root}: no VOC annotation (Annotations/*.xml) was found here.")
    found = sorted({_text(item, "name") for tree in trees.values() for item in tree.iter("object")})
    names = list(classes) or found
    if set(found) - set(names):
        raise DataError(f"{root}: the objects {', '.join(sorted(set(found) - set(names)))} are not among the classes.")
    splits = _splits(root, trees)
    datasets = {}
    for split, stems in splits.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for stem in stems:
            image = _image(trees[stem], stem, pictures, len(images) + 1)
            if image is None:
                skipped.append(f"{notes / stem}.xml: its picture is not in {pictures}, or cannot be read")
                continue
            images.append(image)
            for item in trees[stem].iter("object"):
                annotation = _annotation(item, names, one_based, keep_difficult)
                if annotation is None:
                    skipped.append(f"{notes / stem}.xml: an object without a usable bndbox")
                    continue
                annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **annotation})
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
        datasets[split] = {"images": images, "annotations": annotations, "categories": categories}
    return datasets, str(pictures), skipped


def _splits(root: Path, trees: dict[str, ElementTree.Element]) -> dict[str, list[str]]:
    lists = {path.stem: path for path in sorted((root / "ImageSets" / "Main").glob("*.txt"))}
    # CLASS_train.txt files tell presence of one class, not a split
    wanted = {name: path for name, path in lists.items() if "_" not in name}
    splits = {}
    for name, path in wanted.items():
        stems = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        splits[name] = [stem for stem in stems if stem in trees]
    return splits or {"all": list(trees)}


def _image(tree: ElementTree.Element, stem: str, pictures: Path, key: int) -> dict[str, Any] | None:
    names = [_text(tree, "filename"), *(stem + ending for ending in ENDINGS)]
    name = next((name for name in names if name and (pictures / name).is_file()), None)
    if name is None:
        return None
    try:
        height, width = (int(_text(tree, f"size/{side}") or 0) for side in ("height", "width"))
        if height <= 0 or width <= 0:
            height, width = inspect_picture(pictures / name).stored_size
    except (ValueError, PictureError):
        return None
    return {"id": key, "file_name": name, "height": height, "width": width}


def _annotation(
    item: ElementTree.Element, names: list[str], one_based: bool, keep_difficult: bool
) -> dict[str, Any] | None:
    box = _box(item, one_based)
    if box is None:
        return None
    crowd = int(_text(item, "difficult") == "1" and not keep_difficult)
    label = names.index(_text(item, "name")) + 1
    return {"category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}


def _box(item: ElementTree.Element, one_based: bool) -> list[float] | None:
    try:
        x0, y0, x1, y1 = (float(_text(item, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        return None
    if one_based:
        x0, y0 = x0 - 1, y0 - 1
    return [x0, y0, x1 - x0, y1 - y0]


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()
