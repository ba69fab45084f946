"""Pascal VOC: an xml file per picture, wherever the two lie, and lists of names for the splits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from tqdm import tqdm

from brs_detr.data.faults import DataError
from brs_detr.data.frames import same_aspect
from brs_detr.data.labelled import (
    Labelled,
    Notes,
    Sample,
    count_endings,
    find_files,
    same_name,
    settle,
)
from brs_detr.data.limits import Limits
from brs_detr.data.pictures import PICTURE_ENDINGS, PictureError, PictureInfo, inspect_picture
from brs_detr.data.voc_files import by_stem, find_splits, picture_of, read_trees


def read_voc(
    root: str | Path,
    *,
    classes: Sequence[str] = (),
    one_based: bool = False,
    keep_difficult: bool = False,
    limits: Limits | None = None,
) -> Labelled:
    """Read every `<annotation>` xml below a folder; see `voc_files` for pictures and splits.

    Args:
        root: one VOC folder, several below one, or any folder with xml files and pictures.
        classes: names in the order wanted; by default all that occur, by alphabet. Ids count from 1.
        one_based: corners are pixel numbers from 1, both included, as in the original VOC. By default x, y are taken
            as they are and width = xmax - xmin, as most labelling tools write them.
        keep_difficult: objects marked difficult are ordinary objects; otherwise they become crowd (ignored) regions.
        limits: of the sizes of pictures; by default those of the settings.

    Raises:
        DataError: there is no annotation, or an object's name is not among `classes`.
    """
    root, notes = Path(os.path.abspath(root)), Notes()
    if not root.is_dir():
        raise DataError(f"{root}: this is not a folder; give the one that holds the annotations and the pictures.")
    files = find_files(root, (*PICTURE_ENDINGS, ".xml", ".txt"), notes)
    xmls, texts = ([path for path in files if path.suffix.lower() == ending] for ending in (".xml", ".txt"))
    trees = read_trees(xmls, notes)
    if not trees:
        found = "; ".join(notes.lines(1)) or "there is no xml file"
        others = count_endings(root, (".txt", ".json"))
        raise DataError(f"{root}: no VOC annotation was found here: {found}{others}.")
    labels = _labels(root, trees, classes)
    pictures = by_stem(path for path in files if path.suffix.lower() in PICTURE_ENDINGS)
    splits = find_splits(root, texts, trees, labels, notes)

    samples: dict[Path, Sample | None] = {}
    for xml in tqdm(dict.fromkeys(xml for chosen in splits.values() for xml in chosen), disable=None, leave=False):
        path = picture_of(xml, _text(trees[xml], "filename"), pictures, notes)
        found = list(_objects(xml, trees[xml], notes, labels, one_based, keep_difficult)) if path else []
        samples[xml] = _sample(xml, trees[xml], path, found, notes, limits) if path else None
    labelled = Labelled({label: name for name, label in labels.items()}, {}, notes)
    for split, chosen in splits.items():
        labelled.splits[split] = _one_per_picture([samples[xml] for xml in chosen if samples[xml]], notes)
    _note_unlabelled(pictures, xmls, samples, notes)
    return labelled


def _labels(root: Path, trees: dict[Path, Element], classes: Sequence[str]) -> dict[str, int]:
    occurring = {_text(item, "name") for tree in trees.values() for item in tree.iter("object")} - {""}
    unknown = sorted(occurring - set(classes)) if classes else []
    if unknown:
        raise DataError(f"{root}: the objects {', '.join(unknown)} are not among the classes {', '.join(classes)}.")
    return {name: number for number, name in enumerate(classes or sorted(occurring), 1)}


def _sample(
    xml: Path, tree: Element, path: Path, objects: list[tuple[str, dict[str, Any]]], notes: Notes, limits: Limits | None
) -> Sample | None:
    try:
        info = inspect_picture(path, limits)
    except PictureError as error:
        notes.add("pictures left out that cannot be read", error)
        return None
    size = _frame(xml, tree, info, [annotation["bbox"] for _, annotation in objects], notes)
    return Sample(path, size, settle(objects, size, notes))


def _frame(xml: Path, tree: Element, info: PictureInfo, boxes: list[list[float]], notes: Notes) -> tuple[int, int]:
    """(h, w) as the xml says, or where it says nothing possible the frame of the picture that holds the boxes.

    Possible are the picture as stored, the picture upright, and a resized one of the same aspect ratio.
    """

    def holds(size: tuple[int, int]) -> bool:
        return all(x + w <= size[1] + 1 and y + h <= size[0] + 1 for x, y, w, h in boxes)

    frames = (info.stored_size, info.upright_size)
    try:
        height, width = (int(float(_text(tree, f"size/{side}"))) for side in ("height", "width"))
    except (ValueError, OverflowError):
        height = width = 0
    if (height, width) in frames:
        return height, width
    if height > 0 and width > 0:
        sizes = f"{width}x{height}, the picture {info.stored_size[1]}x{info.stored_size[0]}"
        if same_aspect((height, width), info.stored_size) and holds((height, width)):
            notes.add("annotation files whose picture was resized: training scales the boxes", f"{xml} ({sizes})")
            return height, width
        notes.add("annotation files with a wrong size: the picture's own is taken", f"{xml} ({sizes})")
    else:
        notes.add("annotation files without a size: the picture's own is taken", xml)
    return next(filter(holds, frames), info.stored_size)


def _objects(
    xml: Path, tree: Element, notes: Notes, labels: dict[str, int], one_based: bool, keep_difficult: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, annotation) of each box."""
    for item in tree.iter("object"):
        name, boxes = _text(item, "name"), item.findall("bndbox")
        place = f"{xml} ({name})"
        if not name or not boxes:
            notes.add("objects left out without a name or a bndbox", place)
            continue
        difficult = _text(item, "difficult").lower() in ("1", "true") and not keep_difficult
        if difficult:
            notes.add("difficult objects made ignored regions (--keep-difficult: ordinary objects)", place)
        for element in boxes:
            try:
                x0, y0, x1, y1 = (float(_text(element, key)) for key in ("xmin", "ymin", "xmax", "ymax"))
            except ValueError:
                notes.add("boxes left out without four numbers", place)
                continue
            if x0 > x1 or y0 > y1:
                notes.add("boxes whose corners were swapped", place)
                x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
            if one_based:
                if x0 < 1 or y0 < 1:
                    notes.add("boxes that start before pixel 1: is --one-based right?", place)
                x0, y0 = x0 - 1, y0 - 1
            box = [x0, y0, x1 - x0, y1 - y0]
            yield place, {"category_id": labels[name], "bbox": box, "iscrowd": int(difficult)}


def _one_per_picture(samples: list[Sample], notes: Notes) -> list[Sample]:
    chosen: dict[Path, Sample] = {}
    for sample in samples:
        if chosen.setdefault(sample.path, sample) is not sample:
            notes.add("annotation files left out whose picture another one has", sample.path)
    return list(chosen.values())


def _note_unlabelled(
    pictures: dict[str, list[Path]], xmls: list[Path], samples: dict[Path, Sample | None], notes: Notes
) -> None:
    used = {sample.path for sample in samples.values() if sample}
    folders, stems = {path.parent for path in used}, {same_name(xml.stem) for xml in xmls}
    for stem, paths in pictures.items():
        for path in paths:
            if path.parent in folders and path not in used and stem not in stems:
                notes.add("pictures left out without an annotation file", path)


def _text(element: Element, path: str) -> str:
    return " ".join((element.findtext(path) or "").split())
