"""Recognize what a dataset argument names: which format, and which annotation file is of which split.

`data=FOLDER_OR_FILE` takes a COCO layout, Roboflow's COCO export, a single COCO json, a YOLO folder or its data.yaml,
and Pascal VOC folders. Where two formats or annotation files fit, the error lists them; nothing is chosen in silence.

Only names and the beginnings of files are read here, without torch, so that a wrong path is answered at once.
`dataset_source.py` opens what was recognized.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import yaml

from brs_detr.data.formats.base import decode, split_named
from brs_detr.data.issues import DataError
from brs_detr.data.storage import raise_storage_fault
from brs_detr.parsing import load_yaml
from brs_detr.user_files import MODEST_BYTES, UserFileError, printable, read_file, read_start

Kind = Literal["coco", "roboflow", "yolo", "voc"]

NAMES: dict[Kind, str] = {
    "coco": "COCO json",
    "roboflow": "Roboflow's COCO export",
    "yolo": "YOLO",
    "voc": "Pascal VOC",
}
ROBOFLOW_JSON = "_annotations.coco.json"
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # of the flat YOLO folders of most tools
_START = 2**16  # bytes in which a COCO json names its first list, after `info` and the licenses
_WORDS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing", "testdev"),
}


@dataclass(frozen=True)
class DatasetLayout:
    """A dataset that was recognized.

    Attributes:
        kind: its format.
        source: absolute path as given.
        place: folder that holds the dataset, or the file of a YOLO dataset that describes it.
        jsons: annotation files of a COCO format by split; "all" for one that says nothing of splits.
        passed_over: annotation files that are not used.
    """

    kind: Kind
    source: Path
    place: Path
    jsons: dict[str, Path] = field(default_factory=dict)
    passed_over: tuple[Path, ...] = ()

    @property
    def root(self) -> Path:
        """Return the folder that paths are shown relative to."""
        return self.place if self.place.is_dir() else self.place.parent


def recognize(source: str | Path) -> DatasetLayout:
    """Recognize a dataset.

    Args:
        source: folder, COCO json, or the yaml (darknet: .data file) of a YOLO dataset.

    Raises:
        DataError: nothing is there, it is of no known format, or of more than one.
        ReadError: the storage fails.
    """
    given = Path(os.path.abspath(source))
    try:
        if given.is_dir():
            return _of_folder(given)
        if not given.exists():
            raise DataError(
                f"{given}: there is no such file or folder. Set data= to the folder of a dataset, a COCO json or the "
                "data.yaml of a YOLO dataset."
            )
        return _of_file(given)
    except OSError as error:
        raise_storage_fault(error, given)
        raise DataError(f"{error.filename or given}: {error.strerror or error}.") from error


def is_yolo_yaml(path: str | Path) -> bool:
    """Check whether a yaml describes a YOLO dataset: it names classes or paths, where a recipe has sections."""
    try:
        settings = load_yaml(decode(read_file(path, MODEST_BYTES)), yaml.BaseLoader)
    except (yaml.YAMLError, UserFileError, OSError):
        return False
    if not isinstance(settings, dict):
        return False
    return "names" in settings or any(isinstance(settings.get(key), (str, list)) for key in ("train", "val"))


def _of_file(path: Path) -> DatasetLayout:
    name = path.name.lower()
    if name.endswith((".json", ".json.gz")):
        return DatasetLayout("coco", path, path.parent, {"all": path})
    if name.endswith((".yaml", ".yml")) and not is_yolo_yaml(path):
        raise DataError(f"{path}: this yaml describes no dataset: it has neither `names` nor paths `train` and `val`.")
    if name.endswith((".yaml", ".yml", ".data")):
        return DatasetLayout("yolo", path, path)
    if name.endswith(ARCHIVES):
        raise DataError(f"{path}: this is an archive. Unpack it and give the folder.")
    raise DataError(f"{path}: this is no dataset. Give a folder, a COCO json or the data.yaml of a YOLO dataset.")


def _of_folder(given: Path) -> DatasetLayout:
    folder = given
    while True:
        found = [*_coco(given, folder), *_yolo(given, folder), *_voc(given, folder)]
        inside = [path for path in folder.iterdir() if not path.name.startswith((".", "__"))]
        if found or len(inside) != 1 or not inside[0].is_dir():
            break
        folder = inside[0]  # archives often unpack to a single folder around everything
    if not found:
        raise DataError(f"{given}: no dataset was recognized here. {_what_is_known()}")
    if len(found) > 1:
        shown = "; ".join(f"{NAMES[layout.kind]}: {_how_to_name(layout)}" for layout in found)
        raise DataError(f"{given}: annotations of {len(found)} formats are here. Name one of them ({shown}).")
    return found[0]


def _what_is_known() -> str:
    return (
        "Known are COCO (annotations/*.json or train/_annotations.coco.json), YOLO (data.yaml, or a folder `labels`) "
        "and Pascal VOC (Annotations/*.xml)."
    )


def _how_to_name(layout: DatasetLayout) -> str:
    """Say how to name one of several datasets in a folder."""
    if layout.jsons:
        folder = next(iter(layout.jsons.values())).parent
        if folder != layout.place and split_named(folder.name) is None:
            return f"data={printable(folder)}"
        return "data.root, data.train_json, data.train_images, data.val_json, data.val_images"
    if layout.place.is_file():
        return f"data={printable(layout.place)}"
    annotations = layout.place / "Annotations"
    if layout.kind == "voc" and annotations.is_dir():
        return f"data={printable(annotations)}"
    return f"`brs-detr convert-dataset {layout.kind} {printable(layout.place)} OUT`"


def _coco(given: Path, folder: Path) -> Iterator[DatasetLayout]:
    """Yield the layout of COCO jsons in a folder, its folders of annotations and its folders of splits, if any."""
    groups: dict[str, list[Path]] = {}
    roboflow = False
    for path in _jsons(folder):
        own = split_named(path.parent.name) if path.parent != folder else None
        groups.setdefault(own or split_of_name(path.name) or "all", []).append(path)
        roboflow = roboflow or path.name == ROBOFLOW_JSON
    if not groups:
        return
    passed_over = set(chain(*groups.values()))
    if len(groups) > 1:  # beside jsons of splits another one is their sum, or something else
        groups.pop("all", None)
    if len(groups) > 1 and len(_candidates(groups.get("test", []))) > 1:
        groups.pop("test")  # COCO and LVIS list the images of several tests; nothing is trained on them
    chosen = {split: _one(given, split, paths) for split, paths in groups.items()}
    passed_over -= set(chosen.values())
    kind: Kind = "roboflow" if roboflow else "coco"
    yield DatasetLayout(kind, given, folder, chosen, tuple(sorted(passed_over)))


def _jsons(folder: Path) -> list[Path]:
    """List the COCO jsons of a folder."""
    # no deeper than that: labeling tools keep their own jsons anywhere
    folders = [folder, *_named(folder, _may_have_jsons)]
    files = (path for place in folders for path in sorted(place.iterdir()) if _is_json_name(path.name))
    return [path for path in islice(files, 1000) if path.is_file() and _is_coco(path)]


def _named(folder: Path, test: Callable[[str], bool]) -> list[Path]:
    """List the folders in a folder whose names pass a test."""
    return [path for path in sorted(folder.iterdir()) if test(path.name) and path.is_dir()]


def _may_have_jsons(name: str) -> bool:
    return name.lower().startswith(("annotation", "label")) or split_named(name) is not None


def _is_json_name(name: str) -> bool:
    return name.lower().endswith((".json", ".json.gz")) and not name.startswith(".")


def _is_coco(path: Path) -> bool:
    """Check the beginning of a json for a list that a COCO dataset has; a packed one is believed by its name."""
    if path.suffix.lower() == ".gz":
        return True
    try:
        start = read_start(path, _START).replace(b"\0", b"")  # without the zero bytes of UTF-16
    except UserFileError:
        return False
    return re.search(rb'"(images|annotations|categories|licenses)"\s*:\s*\[', start) is not None


def split_of_name(name: str) -> str | None:
    """Return the split that the name of a json says it is of: instances_train2017.json is of train."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in _WORDS.items() if set(known) & set(words)), None)


def _candidates(paths: list[Path]) -> list[Path]:
    """Leave out what COCO has beside instances_, of the same images: captions_ and person_keypoints_."""
    return [path for path in paths if path.name.startswith("instances_")] or paths


def _one(given: Path, split: str, paths: list[Path]) -> Path:
    """Choose the json of a split.

    Raises:
        DataError: several could be meant.
    """
    candidates = _candidates(paths)
    if len(candidates) > 1:
        shown = ", ".join(printable(os.path.relpath(path, given)) for path in candidates[:5])
        what = "the dataset" if split == "all" else f"the split {split}"
        raise DataError(
            f"{given}: {len(candidates)} annotation files could be {what}: {shown}. Name one with "
            "data=FILE.json data.val_fraction=0.1, or set data.train_json, data.val_json and the folders of images."
        )
    return candidates[0]


def _yolo(given: Path, folder: Path) -> Iterator[DatasetLayout]:
    """Yield the YOLO dataset of a folder: described by a file in it, or recognized by its labels."""
    files = [path for path in sorted(folder.glob("*.y*ml")) if is_yolo_yaml(path)]
    files = files or [path for path in sorted(folder.glob("*.data")) if _is_darknet(path)]
    if files:
        # several are refused, by name, when the folder is read
        yield DatasetLayout("yolo", given, files[0] if len(files) == 1 else folder)
        return
    places = [folder, *_named(folder, lambda name: split_named(name) is not None)]
    labels = chain(*(place.glob(pattern) for place in places for pattern in ("[Ll]abels/*.txt", "[Ll]abels/*/*.txt")))
    if _has_label(labels) or _has_flat_labels(folder):
        yield DatasetLayout("yolo", given, folder)


def _is_darknet(path: Path) -> bool:
    try:
        return re.search(rb"^\s*(train|valid|names)\s*=", read_start(path, _START), re.MULTILINE) is not None
    except UserFileError:
        return False


def _has_flat_labels(folder: Path) -> bool:
    """Check for images with a text file of labels beside them."""
    images = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in _IMAGE_ENDINGS)
    return _has_label(path.with_suffix(".txt") for path in images)


def _has_label(files: Iterable[Path]) -> bool:
    """Check the first files that hold anything: images without objects have empty labels."""
    held = (path for path in islice(files, 10_000) if path.is_file() and path.stat().st_size > 0)
    return any(_is_label(path) for path in islice(held, 20))


def _is_label(path: Path) -> bool:
    """Check for a first line `class cx cy w h`, or one of more numbers."""
    try:
        first = read_start(path, 400).lstrip().split(b"\n")[0]
    except UserFileError:
        return False
    return re.match(rb"\d+(?:\.0*)?([ \t,;]+-?[\d.]+(e-?\d+)?){4,}", first) is not None


def _voc(given: Path, folder: Path) -> Iterator[DatasetLayout]:
    """Yield the VOC dataset of a folder, recognized by an xml file."""
    place = folder.parent if folder.name == "Annotations" else folder  # its images are beside it
    # no other folders: else a folder of several datasets would be taken for one
    places = [folder, *_named(folder, lambda name: _may_have_jsons(name) or name.lower().startswith("xml"))]
    xmls = chain(*(place.glob("*.xml") for place in places), folder.glob("VOC*/Annotations/*.xml"))
    for path in islice(xmls, 20):
        try:
            start = read_start(path, 2**12).replace(b"\0", b"")
        except UserFileError:
            continue
        if re.search(rb"<(\w+:)?annotation\b", start):
            yield DatasetLayout("voc", given, place)
            return
