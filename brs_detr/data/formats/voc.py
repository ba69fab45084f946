"""Read Pascal VOC datasets: one xml file per image, in any folder layout, and lists of names for the splits."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

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
    same_name,
    split_named,
    split_of,
)
from brs_detr.data.image_io import IMAGE_ENDINGS, ImageError, ImageInfo, read_image_info, same_aspect
from brs_detr.data.issues import DataError


def read_voc(
    root: str | Path,
    *,
    classes: Sequence[str] = (),
    one_based: bool = False,
    keep_difficult: bool = False,
    limits: Limits | None = None,
) -> ImportedDataset:
    """Read every `<annotation>` xml under a folder; see `image_of` for the images and `find_splits` for the splits.

    Args:
        root: a VOC folder, a folder of several, or any folder with xml files and images.
        classes: class names in the desired order; by default all that occur, alphabetically. Ids count from 1.
        one_based: corners are pixel numbers from 1, both included, as in the original VOC. By default x, y are used
            unchanged and width = xmax - xmin, as most labeling tools write them.
        keep_difficult: treat objects marked difficult as ordinary objects; otherwise they become crowd (ignored)
            regions.
        limits: maximum sizes of images; by default those of `Limits`.

    Raises:
        DataError: there is no annotation, or an object's name is not among `classes`.
    """
    root, notes = Path(os.path.abspath(root)), Notes()
    if not root.is_dir():
        raise DataError(f"{root}: this is not a folder; give the one that holds the annotations and the images.")
    files = find_files(root, (*IMAGE_ENDINGS, ".xml", ".txt"), notes)
    xmls, texts = ([path for path in files if path.suffix.lower() == ending] for ending in (".xml", ".txt"))
    trees = read_trees(xmls, notes)
    if not trees:
        reason = "; ".join(notes.lines(1)) or "there is no xml file"
        others = count_endings(root, (".txt", ".json"))
        raise DataError(f"{root}: no VOC annotation was found here: {reason}{others}.")
    labels = _labels(root, trees, classes)
    images = by_stem(path for path in files if path.suffix.lower() in IMAGE_ENDINGS)
    splits, divided = find_splits(root, texts, trees, labels, notes)

    samples: dict[Path, Sample | None] = {}
    for xml in tqdm(dict.fromkeys(xml for chosen in splits.values() for xml in chosen), disable=None, leave=False):
        path = image_of(xml, _text(trees[xml], "filename"), images, notes, root)
        objects = list(_objects(xml, trees[xml], notes, labels, one_based, keep_difficult)) if path else []
        samples[xml] = _sample(xml, trees[xml], path, objects, notes, limits) if path else None
    imported = ImportedDataset({label: name for name, label in labels.items()}, {}, notes, divided)
    for split, chosen in splits.items():
        imported.splits[split] = _one_per_image([sample for xml in chosen if (sample := samples[xml])], notes)
    _note_unlabeled(images, xmls, samples, notes)
    return imported


def _labels(root: Path, trees: dict[Path, Element], classes: Sequence[str]) -> dict[str, int]:
    """Assign numbers from 1 to the class names."""
    occurring = {_text(item, "name") for tree in trees.values() for item in tree.iter("object")} - {""}
    unknown = sorted(occurring - set(classes)) if classes else []
    if unknown:
        raise DataError(f"{root}: the objects {', '.join(unknown)} are not among the classes {', '.join(classes)}.")
    return {name: number for number, name in enumerate(classes or sorted(occurring), 1)}


def _sample(
    xml: Path, tree: Element, path: Path, objects: list[tuple[str, dict[str, Any]]], notes: Notes, limits: Limits | None
) -> Sample | None:
    try:
        info = read_image_info(path, limits)
    except ImageError as error:
        notes.add("images left out that cannot be read", error)
        return None
    size = _frame(xml, tree, info, [annotation["bbox"] for _, annotation in objects], notes)
    return Sample(path, size, clean_boxes(objects, size, notes))


def _frame(xml: Path, tree: Element, info: ImageInfo, boxes: list[list[float]], notes: Notes) -> tuple[int, int]:
    """Return the (h, w) of the xml if it is plausible, else the frame of the image that contains the boxes.

    Plausible are the image as stored, the image turned upright, and a resized one of the aspect ratio of either.
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
        sizes = f"{width}x{height}, the image {info.stored_size[1]}x{info.stored_size[0]}"
        if any(same_aspect((height, width), frame) for frame in frames) and holds((height, width)):
            notes.add("annotation files whose image was resized: training scales the boxes", f"{xml} ({sizes})")
            return height, width
        notes.add("annotation files with a wrong size: the image's own is used", f"{xml} ({sizes})")
    else:
        notes.add("annotation files without a size: the image's own is used", xml)
    return next(filter(holds, frames), info.stored_size)


def _objects(
    xml: Path, tree: Element, notes: Notes, labels: dict[str, int], one_based: bool, keep_difficult: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over (location for the notes, annotation) of each box."""
    for item in tree.iter("object"):
        name, boxes = _text(item, "name"), item.findall("bndbox")
        place = f"{xml} ({name})"
        if not name or not boxes:
            notes.add("objects left out without a name or a bndbox", place)
            continue
        difficult = _text(item, "difficult").lower() in ("1", "true") and not keep_difficult
        if difficult:
            hint = "convert-dataset --keep-difficult: ordinary objects"
            notes.add(f"difficult objects made ignored regions ({hint})", place)
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
                    notes.add("boxes that start before pixel 1: check --one-based", place)
                # the first pixel becomes 0; xmax stays, since it is included: width = xmax - xmin + 1
                x0, y0 = x0 - 1, y0 - 1
            box = [x0, y0, x1 - x0, y1 - y0]
            yield place, {"category_id": labels[name], "bbox": box, "iscrowd": int(difficult)}


def _one_per_image(samples: list[Sample], notes: Notes) -> list[Sample]:
    chosen: dict[Path, Sample] = {}
    for sample in samples:
        if chosen.setdefault(sample.path, sample) is not sample:
            notes.add("annotation files left out whose image belongs to another one", sample.path)
    return list(chosen.values())


def _note_unlabeled(
    images: dict[str, list[Path]], xmls: list[Path], samples: dict[Path, Sample | None], notes: Notes
) -> None:
    used = {sample.path for sample in samples.values() if sample}
    folders, stems = {path.parent for path in used}, {same_name(xml.stem) for xml in xmls}
    for stem, paths in images.items():
        for path in paths:
            if path.parent in folders and path not in used and stem not in stems:
                notes.add("images left out without an annotation file", path)


def _text(element: Element, path: str) -> str:
    return " ".join((element.findtext(path) or "").split())


_USUAL_LISTS = ("train", "val", "trainval", "test", "valid", "validation")


def read_trees(paths: Iterable[Path], notes: Notes) -> dict[Path, ElementTree.Element]:
    """Parse the `<annotation>` of each file that has one; tags are stripped of their namespace."""
    trees = {}
    for path in paths:
        try:
            tree = _parse(read_modest(path))
        except DataError as error:
            notes.add("xml files left out that are not regular or too large", error)
            continue
        except (ElementTree.ParseError, LookupError, ValueError) as error:
            notes.add("xml files left out that are not valid", f"{path} ({error})")
            continue
        for element in tree.iter():
            element.tag = element.tag.rpartition("}")[2]
        if tree.tag == "annotation":
            trees[path] = tree
        else:
            notes.add("xml files left out that are not VOC annotations", f"{path} (its root is <{tree.tag}>)")
    return trees


def _parse(data: bytes) -> ElementTree.Element:
    if b"<!ENTITY" in data.replace(b"\0", b""):  # without the zero bytes of UTF-16
        # annotations need no entities, a few can expand to gigabytes, and not every version of expat limits them
        raise ValueError("it declares entities")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # often a wrong encoding is declared
        declared = re.search(rb"""<\?xml[^>]*encoding=["']([\w-]+)""", data[:200])
        text = decode(data, declared[1].decode() if declared else None).lstrip("\ufeff")
        text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text).strip()
        try:
            return ElementTree.fromstring(re.sub(r"&(?!#?\w+;)", "&amp;", text))
        except ElementTree.ParseError:
            raise error from None  # the first error: its line numbers are those of the file


def by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Group files by name without suffix, ignoring case and the composition of accents."""
    groups = defaultdict(list)
    for path in paths:
        groups[same_name(path.stem)].append(path)
    return dict(groups)


def find_splits(
    root: Path, texts: Iterable[Path], xmls: Collection[Path], names: Collection[str], notes: Notes
) -> tuple[dict[str, list[Path]], bool]:
    """Group annotation files by split: from `ImageSets/Main/*.txt`, else other lists, else folders, else all train.

    Args:
        root: folder of the dataset; its own name may be that of a split.
        texts: text files under it.
        xmls: the annotation files.
        names: class names, to recognize lists about one class.
        notes: listed names without an annotation file are added here.

    Returns:
        The files by split, and whether lists or folders under the root name the splits.
    """
    lists = [path for path in texts if path.parts[-3:-1] == ("ImageSets", "Main")]
    lists = lists or [path for path in texts if path.parent.name == "ImageSets"]
    lists = lists or [path for path in texts if path.stem in _USUAL_LISTS]
    stems, files = {path.stem for path in lists}, by_stem(xmls)
    splits: defaultdict[str, dict[Path, None]] = defaultdict(dict)  # dicts as ordered sets
    for path in lists:
        lines = [line for line in read_lines(path) if line]
        if _is_class_list(path.stem, lines, stems, names):
            continue
        matches = [_listed(line, path, files) for line in lines]
        for line in (line for line, xml in zip(lines, matches) if xml is None):
            notes.add("listed names left out without an annotation file", f"{path.name}: {line}")
        chosen = dict.fromkeys(xml for xml in matches if xml is not None)
        if chosen:
            splits[{"valid": "val", "validation": "val"}.get(path.stem, path.stem)].update(chosen)
        else:
            notes.add("lists left out that name no annotation file", path)
    listed = {xml for chosen in splits.values() for xml in chosen}
    for xml in xmls:
        if listed and xml not in listed:
            notes.add("annotation files left out that are in no list", xml)
    divided = bool(splits) or any(split_of(xml, root) for xml in xmls)
    for xml in () if splits else xmls:
        splits[split_of(xml, root) or split_named(root.name) or "train"][xml] = None
    return {split: list(chosen) for split, chosen in splits.items()}, divided


def _is_class_list(stem: str, lines: list[str], stems: set[str], names: Collection[str]) -> bool:
    """Recognize lists like cat_train.txt, which mark each image of train with a cat (1, 0, -1): they are not splits."""
    head, _, tail = stem.rpartition("_")
    marked = bool(lines) and all(len(line.split()) == 2 and line.split()[1] in ("-1", "0", "1") for line in lines)
    return stem not in _USUAL_LISTS and (marked or (head in names and tail in stems))


def _listed(line: str, where: Path, files: dict[str, list[Path]]) -> Path | None:
    """Find the annotation file of a line of a list: a stem, a file name or a path, possibly followed by columns."""
    for text in (line, line.split()[0]):  # the full line first: names may contain spaces
        path = PureWindowsPath(text)  # splits at both kinds of slashes
        bare = path.stem if path.suffix.lower() in (*IMAGE_ENDINGS, ".xml") else path.name
        if same_name(bare) in files:
            return max(files[same_name(bare)], key=lambda xml: _shared(xml, where))
    return None


def image_of(xml: Path, tag: str, images: dict[str, list[Path]], notes: Notes, root: Path) -> Path | None:
    """Find the image of an annotation file: with the xml's own name, else the one named by its `filename`.

    Of several candidates, one in an image folder or beside the xml is preferred, then the one with the most folder
    names in common.

    Args:
        xml: the annotation file.
        tag: its `filename`, often outdated, with another suffix, or a path of another machine.
        images: images by stem.
        notes: missing and ambiguous images are added here.
        root: folder of the dataset; the names of the folders that it lies in say nothing.
    """
    named = PureWindowsPath(tag)
    candidates = images.get(same_name(xml.stem)) or images.get(same_name(named.stem)) or []
    if not candidates:
        notes.add("annotation files left out whose image was not found", f"{xml} (filename {tag or 'not given'})")
        return None

    def rank(path: Path) -> tuple[bool, int, bool]:
        inside = path.relative_to(root)
        in_image_folder = path.parent == xml.parent or any(part.lower() in IMAGE_FOLDERS for part in inside.parts)
        return in_image_folder, _shared(inside, xml.relative_to(root)), path.name == named.name

    path = max(candidates, key=rank)
    if same_name(path.stem) != same_name(named.stem) and same_name(named.stem) in images:
        notes.add("annotation files whose filename is another image: the one of their own name is used", xml)
    return path


def _shared(path: Path, other: Path) -> int:
    """Count the folder names that two files have in common."""
    return len(set(path.parts[:-1]) & set(other.parts[:-1]))
