"""The files of a Pascal VOC dataset: which xml is an annotation, which picture is whose, and what the lists say."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path, PureWindowsPath
from xml.etree import ElementTree

from brs_detr.data.faults import DataError
from brs_detr.data.labelled import (
    PICTURE_FOLDERS,
    Notes,
    decode,
    read_lines,
    read_modest,
    same_name,
    split_named,
    split_of,
)
from brs_detr.data.pictures import PICTURE_ENDINGS

_USUAL_LISTS = ("train", "val", "trainval", "test", "valid", "validation")


def read_trees(paths: Iterable[Path], notes: Notes) -> dict[Path, ElementTree.Element]:
    """The `<annotation>` of each file that has one; tags come without their namespace."""
    trees = {}
    for path in paths:
        try:
            tree = _parse(read_modest(path))
        except DataError as error:
            notes.add("xml files left out that are not files of a usual size", error)
            continue
        except (ElementTree.ParseError, LookupError, ValueError) as error:
            notes.add("xml files left out that are not valid", f"{path} ({error})")
            continue
        for element in tree.iter():
            element.tag = element.tag.rpartition("}")[2]
        if tree.tag == "annotation":
            trees[path] = tree
        else:
            notes.add("xml files left out that are no VOC annotations", f"{path} (its root is <{tree.tag}>)")
    return trees


def _parse(data: bytes) -> ElementTree.Element:
    if b"<!ENTITY" in data.replace(b"\0", b""):  # in UTF-16, too
        # no annotation needs any, a few of them stand for gigabytes, and not every version of expat minds
        raise ValueError("it declares entities")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # often the wrong encoding is declared
        declared = re.search(rb"""<\?xml[^>]*encoding=["']([\w-]+)""", data[:200])
        text = decode(data, declared[1].decode() if declared else None).lstrip("\ufeff")
        text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text).strip()
        try:
            return ElementTree.fromstring(re.sub(r"&(?!#?\w+;)", "&amp;", text))
        except ElementTree.ParseError:
            raise error from None  # whose line numbers are those of the file


def by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by name without suffix; case and the way accents are composed do not count."""
    groups = defaultdict(list)
    for path in paths:
        groups[same_name(path.stem)].append(path)
    return dict(groups)


def find_splits(
    root: Path, texts: Iterable[Path], xmls: Collection[Path], names: Collection[str], notes: Notes
) -> dict[str, list[Path]]:
    """Annotation files by split: as `ImageSets/Main/*.txt` or other lists say, else the folders; else all are train.

    Args:
        root: the dataset; its own name may tell a split too.
        texts: text files below it.
        xmls: the annotation files.
        names: class names, to know the lists about one class.
        notes: names without an annotation file are added here.
    """
    lists = [path for path in texts if path.parts[-3:-1] == ("ImageSets", "Main")]
    lists = lists or [path for path in texts if path.parent.name == "ImageSets"]
    lists = lists or [path for path in texts if path.stem in _USUAL_LISTS]
    stems, files, splits = {path.stem for path in lists}, by_stem(xmls), defaultdict(dict)
    for path in lists:
        lines = [line for line in read_lines(path) if line]
        if _tells_one_class(path.stem, lines, stems, names):
            continue
        found = [_listed(line, path, files) for line in lines]
        for line in (line for line, xml in zip(lines, found) if xml is None):
            notes.add("names left out that a list has and no annotation file", f"{path.name}: {line}")
        chosen = dict.fromkeys(xml for xml in found if xml is not None)
        if chosen:
            splits[{"valid": "val", "validation": "val"}.get(path.stem, path.stem)].update(chosen)
        else:
            notes.add("lists left out that name no annotation file", path)
    listed = {xml for chosen in splits.values() for xml in chosen}
    for xml in xmls:
        if listed and xml not in listed:
            notes.add("annotation files left out that are in no list", xml)
    for xml in () if splits else xmls:
        splits[split_of(xml, root) or split_named(root.name) or "train"][xml] = None
    return {split: list(chosen) for split, chosen in splits.items()}


def _tells_one_class(stem: str, lines: list[str], stems: set[str], names: Collection[str]) -> bool:
    """cat_train.txt says of each picture of train whether it shows a cat (1, 0, -1): it is no split."""
    head, _, tail = stem.rpartition("_")
    marked = bool(lines) and all(len(line.split()) == 2 and line.split()[1] in ("-1", "0", "1") for line in lines)
    return stem not in _USUAL_LISTS and (marked or (head in names and tail in stems))


def _listed(line: str, where: Path, files: dict[str, list[Path]]) -> Path | None:
    """The annotation file of one line of a list: a stem, a file name or a path, perhaps with columns after it."""
    for text in (line, line.split()[0]):
        path = PureWindowsPath(text)  # knows both kinds of slashes
        bare = path.stem if path.suffix.lower() in (*PICTURE_ENDINGS, ".xml") else path.name
        if same_name(bare) in files:
            return max(files[same_name(bare)], key=lambda xml: _shared(xml, where))
    return None


def picture_of(xml: Path, tag: str, pictures: dict[str, list[Path]], notes: Notes) -> Path | None:
    """The picture of an annotation file: that of its own name, else the one that its `filename` names.

    Of several, one in an image folder or in the xml's own comes first, then the one that shares most folder names.

    Args:
        xml: the annotation file.
        tag: its `filename`, often stale, with another suffix, or a path of another machine.
        pictures: by stem.
        notes: what was not found or had to be chosen is added here.
    """
    named = PureWindowsPath(tag)
    candidates = pictures.get(same_name(xml.stem)) or pictures.get(same_name(named.stem)) or []
    if not candidates:
        notes.add("annotation files left out whose picture was not found", f"{xml} (filename {tag or 'not given'})")
        return None

    def rank(path: Path) -> tuple[bool, int, bool]:
        at_home = path.parent == xml.parent or any(part.lower() in PICTURE_FOLDERS for part in path.parts)
        return at_home, _shared(path, xml), path.name == named.name

    path = max(candidates, key=rank)
    if same_name(path.stem) != same_name(named.stem) and same_name(named.stem) in pictures:
        notes.add("annotation files whose filename is another picture: the one of their own name is taken", xml)
    return path


def _shared(path: Path, other: Path) -> int:
    """How many folder names two files have in common."""
    return len(set(path.parts[:-1]) & set(other.parts[:-1]))
