"""YOLO datasets: a text file of fractions per picture; folders are read in `yolo_layout`, lines in `yolo_labels`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from brs_detr.data.faults import DataError
from brs_detr.data.labelled import Labelled, Notes, Sample, count_endings, settle
from brs_detr.data.limits import Limits
from brs_detr.data.pictures import PictureError, inspect_picture
from brs_detr.data.yolo_labels import find_label_files, places_of, read_labels, to_annotation
from brs_detr.data.yolo_layout import MADE_UP, Layout, find_layout

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


def read_yolo(source: str | Path, *, classes: Sequence[str] = (), limits: Limits | None = None) -> Labelled:
    """Read lines of `class cx cy w h` (fractions of the picture), outlines, oriented boxes or poses.

    An outline's box is the rectangle around it. Category ids are the class numbers of the labels.

    Args:
        source: a data.yaml, darknet's .data, or a folder with or without one of them.
        classes: names of the classes 0, 1, ... instead of those that the dataset gives.
        limits: of the sizes of pictures; by default those of the settings.

    Raises:
        DataError: there is no picture, no label file, or no line of them can be used.
    """
    notes = Notes()
    layout = find_layout(Path(source), notes)
    names = dict(enumerate(classes)) or layout.names
    files = find_label_files(path for paths in layout.splits.values() for path in paths)
    splits = _labelled_splits(layout, files, notes)
    samples: dict[Path, Sample | None] = {}
    for path in tqdm(dict.fromkeys(path for paths in splits.values() for path in paths), disable=None, leave=False):
        samples[path] = _sample(path, files[path], names, layout.keypoints, notes, limits)
    labelled = {split: [samples[path] for path in paths if samples[path]] for split, paths in splits.items()}
    if not names:
        found = {item["category_id"] for group in labelled.values() for sample in group for item in sample.objects}
        names = {number: f"class_{number}" for number in sorted(found)}
        for name in names.values():
            notes.add(MADE_UP, name)
    _note_label_files(files, notes)
    return Labelled(names, labelled, notes)


def _labelled_splits(layout: Layout, files: dict[Path, Path | None], notes: Notes) -> dict[str, list[Path]]:
    """The splits but for those that nobody has labelled."""
    splits = {}
    for split, pictures in layout.splits.items():
        if any(files[picture] for picture in pictures):
            splits[split] = list(dict.fromkeys(pictures))
        elif pictures:
            notes.add("splits left out without a single label file", f"{split} ({len(pictures):,} pictures)")
    if not splits:
        picture = next(iter(files))
        looked = ", ".join(map(str, places_of(picture)))
        others = count_endings(picture.parent, (".xml", ".json"))
        raise DataError(f"{layout.source}: no picture has a label file, {picture} none of {looked}{others}.")
    return splits


def _sample(
    picture: Path,
    file: Path | None,
    names: dict[int, str],
    keypoints: int,
    notes: Notes,
    limits: Limits | None,
) -> Sample | None:
    try:
        info = inspect_picture(picture, limits)
    except PictureError as error:
        notes.add("pictures left out that cannot be read", error)
        return None
    if file is None:
        notes.add("pictures without a label file: kept as background", picture)
    elif file.stat().st_size == 0:
        notes.add("pictures with an empty label file: kept as background", picture)
    if info.orientation in (2, 3, 4):
        notes.add(
            "pictures that EXIF mirrors or stands on their head: boxes are written for the stored pixels", picture
        )
    objects = []
    for place, (label, shape) in read_labels(file, keypoints, notes) if file else ():
        if names and label not in names:
            notes.add("label lines left out whose class has no name", f"{place} (class {label})")
            continue
        objects.append((place, {"category_id": label, **to_annotation(shape, info.upright_size, info.orientation)}))
    return Sample(picture, info.upright_size, settle(objects, info.upright_size, notes))


def _note_label_files(files: dict[Path, Path | None], notes: Notes) -> None:
    """Note label files of two pictures (a.jpg and a.png) and those of none."""
    used: dict[Path, Path] = {}
    for picture, file in files.items():
        if file is not None and used.setdefault(file, picture) is not picture:
            notes.add("pictures that share their label file with another picture", f"{picture} and {used[file]}")
    for folder in sorted({file.parent for file in used}):
        for file in sorted(folder.glob("*.txt")):
            if file not in used and not file.stem.lower().startswith(_NOT_LABELS):
                notes.add("label files left out whose picture is in no split", file)
