"""Parse a COCO json into numpy columns, which `packed.py` turns into the arrays that a dataset keeps.

Malformed entries are handled by the policy of `issues.py`. No image is opened here, see `image_sizes.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brs_detr.data.issues import DataError, IssueLog
from brs_detr.data.json_file import BOX_FROM_MASK, as_int, coerce_numbers, is_number
from brs_detr.user_files import printable


@dataclass
class Images:
    """Columns over the images of a json.

    Attributes:
        ids: (I,) int64.
        names: I file names, relative to the image folder.
        frames: (I, 2) int32 (h, w) that the boxes are drawn in.
        sizes: (I, 2) int32 (h, w) of the file as it will be read; equal to the frame if the file was not opened.
    """

    ids: np.ndarray
    names: list[str]
    frames: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def where(self, row: int | np.integer) -> str:
        """Describe an image for a message: its id and file name."""
        return f"image {self.ids[row]} ({self.names[row]})"

    def keep(self, rows: np.ndarray) -> Images:
        """Select the images of a boolean mask (I,)."""
        names = [name for name, kept in zip(self.names, rows, strict=True) if kept]
        return Images(self.ids[rows], names, self.frames[rows], self.sizes[rows])


@dataclass
class Objects:
    """Columns over the annotations of a json.

    Attributes:
        ids: (N,) int64, 0 if the json gives no id.
        rows: (N,) int64 indices into the images.
        labels: (N,) int32, 0..C-1.
        xywh: (N, 4) float64 pixels.
        areas: (N,) float64 square pixels.
        crowd: (N,) bool.
        masks: (N,) object, packed segmentations (see `ops.rle`): empty bytes for a malformed one, None for none at all;
            None unless the masks were read.
    """

    ids: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    xywh: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, which: np.ndarray) -> Objects:
        """Select the annotations of a boolean mask or an index array."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Objects(**{name: column[which] for name, column in columns.items() if column is not None})


def read_images(data: dict[str, Any], path: str | Path, log: IssueLog) -> Images:
    """Read the image entries that have an id and a file name; a size that is not given is 0.

    Raises:
        DataError: no entry is usable.
    """
    ids: list[int] = []
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    seen: set[int] = set()
    named: set[str] = set()
    for position, entry in enumerate(data["images"]):
        if isinstance(entry, dict) and coerce_numbers(entry, ("id", "width", "height")):
            log.add("number_as_text", f"image entry {position}")
        key = as_int(entry.get("id")) if isinstance(entry, dict) else None
        name = image_name(entry) if isinstance(entry, dict) else None
        if key is None or not isinstance(name, str) or not name:
            log.add("image_malformed", f"image entry {position}", repr(entry)[:80])
            continue
        if key in seen:
            log.add("image_id_duplicate", f"image {key} ({name})")
            continue
        if name in named:
            log.add("image_listed_twice", f"image {key} ({name})")
        seen.add(key)
        named.add(name)
        height, width = as_int(entry.get("height")), as_int(entry.get("width"))
        ids.append(key)
        names.append(name)
        # sizes are stored as int32
        known = height is not None and width is not None and 0 < height < 2**31 and 0 < width < 2**31
        sizes.append((height or 0, width or 0) if known else (0, 0))
    if not ids:
        raise DataError(
            f"{path}: none of its {len(data['images']):,} image entries has an integer id and a file_name. "
            f"The first is {printable(repr(data['images'][0]))[:120]}."
        )
    frames = np.array(sizes, np.int32).reshape(-1, 2)
    return Images(np.array(ids, np.int64), names, frames, frames.copy())


def image_name(entry: dict[str, Any]) -> Any:
    """Return the file name of an image entry; without one, as in LVIS, the folder and the file of its URL."""
    url = entry.get("coco_url")
    return entry.get("file_name") or ("/".join(url.split("/")[-2:]) if isinstance(url, str) else url)


_NUMBERS_OF_ANNOTATIONS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore")


class _Row(NamedTuple):
    """A well-formed annotation: its value in each column of `Objects`."""

    id: int
    row: int
    label: int
    xywh: list[float]
    area: float
    crowd: bool
    mask: Any


_TYPES = np.dtype(
    [
        ("id", np.int64),
        ("row", np.int64),
        ("label", np.int32),
        ("xywh", np.float64, (4,)),
        ("area", np.float64),
        ("crowd", bool),
        ("mask", object),
    ]
)


@dataclass
class _Known:
    """What annotations are checked against, and what was met so far.

    Attributes:
        images: the usable images.
        row_of: index of an image by its id.
        label_of: label by category id.
        ids: of the annotations so far.
        unlisted: category ids of annotations of these images that are not in the list of categories.
    """

    images: Images
    row_of: dict[int, int]
    label_of: dict[int, int]
    ids: set[int] = field(default_factory=set)
    unlisted: set[int | None] = field(default_factory=set)


def read_objects(
    data: dict[str, Any], images: Images, category_ids: list[int], log: IssueLog, masks: bool = False
) -> Objects:
    """Read the well-formed annotations: known image and category, a box of four finite numbers with w, h > 0.

    Args:
        data: content of the json; for `masks` with packed segmentations.
        images: the usable images.
        category_ids: ids in the order of the labels.
        log: issues are added to it.
        masks: also collect the segmentations.
    """
    row_of = {int(key): row for row, key in enumerate(images.ids)}
    known = _Known(images, row_of, {key: label for label, key in enumerate(category_ids)})
    read = (_read_entry(entry, position, known, log) for position, entry in enumerate(data["annotations"]))
    # without a list in between: millions of tuples would take memory and the garbage collector's time
    table = np.fromiter((row for row in read if row is not None), _TYPES)
    columns = {name: np.ascontiguousarray(table[name]) for name in _Row._fields if masks or name != "mask"}
    if known.unlisted:
        used = {category_ids[label] for label in np.unique(columns["label"])}
        _log_shifted_ids(category_ids, known.unlisted | used, log)
    return Objects(
        ids=columns["id"],
        rows=columns["row"],
        labels=columns["label"],
        xywh=columns["xywh"],
        areas=columns["area"],
        crowd=columns["crowd"],
        masks=columns.get("mask"),
    )


def _read_entry(entry: Any, position: int, known: _Known, log: IssueLog) -> _Row | None:
    """Check an annotation, the one of number `position`, and log its issues; None if it is not usable."""
    if not isinstance(entry, dict) or "image_id" not in entry or "category_id" not in entry:
        log.add("annotation_malformed", f"annotation entry {position}", repr(entry)[:80])
        return None
    box: Any = entry.get("bbox")
    # exact types first, for speed: this is called once per annotation
    if str in map(type, entry.values()) or (type(box) is list and str in map(type, box)):
        if coerce_numbers(entry, _NUMBERS_OF_ANNOTATIONS):
            log.add("number_as_text", f"annotation entry {position}")
        box = entry.get("bbox")
    row, label = _get(known.row_of, entry["image_id"]), _get(known.label_of, entry["category_id"])
    if row is None or label is None:
        name = "image_id" if row is None else "category_id"
        log.add(f"{name}_unknown", _where(entry, position), f"{name} {entry[name]!r}")
        if row is not None:
            known.unlisted.add(as_int(entry["category_id"]))
        return None
    if box_issue := _check_box(box):
        where = _where(entry, position, known.images.names[row])
        log.add(box_issue, where, f"bbox {box!r}" if "bbox" in entry else "")
        return None
    crowd, area, issues = _crowd_and_area(entry, box)
    if BOX_FROM_MASK in entry:
        issues.append(("box_from_mask", ""))
    key = as_int(entry.get("id"))
    if key in known.ids:
        issues.append(("annotation_id_duplicate", ""))
    elif key is not None:
        known.ids.add(key)
    for kind, detail in issues:
        log.add(kind, _where(entry, position, known.images.names[row]), detail)
    return _Row(key or 0, row, label, box, area, crowd, entry.get("segmentation"))


def _log_shifted_ids(listed: list[int], used: set[int | None], log: IssueLog) -> None:
    """Log category ids that are off by one: annotations counted from 0 and categories from 1, or the reverse.

    Most of the ids then exist, but name another class.
    """
    known = {key for key in used if key is not None}
    for shift in (1, -1):
        if None not in used and {key + shift for key in known} <= set(listed):
            used_range = f"{min(known)}..{max(known)}"
            listed_range = f"{listed[0]}..{listed[-1]}"
            detail = f"the categories have ids {listed_range}, the annotations use {used_range}"
            log.add("category_ids_shifted", detail)


def _where(entry: dict[str, Any], position: int, name: str = "") -> str:
    """Describe an annotation for a message: by its id or, if it has no id, by its position in the list."""
    key = entry.get("id")
    return f"annotation {f'entry {position}' if key is None else key}" + (f" ({name})" if name else "")


def _crowd_and_area(entry: dict[str, Any], box: Any) -> tuple[bool, float, list[tuple[str, str]]]:
    """Return (ignore flag, area, issues); an issue is a pair of its kind and a detail."""
    crowd: Any = entry.get("iscrowd")
    area: Any = entry.get("area")
    issues: list[tuple[str, str]] = []
    if crowd is None or type(crowd) is str:
        issues.append(("iscrowd_missing", "" if crowd is None else f"iscrowd {crowd!r}"))
        crowd = False
    elif crowd:
        issues.append(("crowd", ""))
    if not crowd and entry.get("ignore") and type(entry["ignore"]) is not str:
        issues.append(("ignored", ""))
        crowd = True
    # the area decides small/medium/large in COCO's evaluation; beyond 1e18 it is not an area in pixels
    if not is_number(area) or not 0 < area < 1e18:
        issues.append(("area_missing", "") if area is None else ("area_not_positive", f"area {area}"))
        area = box[2] * box[3]
    return bool(crowd), float(area), issues


def _check_box(box: Any) -> str | None:
    """Return the kind of issue with an xywh box, None if it is usable."""
    if box is None:
        return "box_missing"
    if type(box) is not list or len(box) != 4 or not all(map(is_number, box)):
        return "box_not_four_numbers"
    x, y, w, h = box
    # chained comparisons rather than isfinite: NaN compares false, and integers too large for a float do not raise
    if not (-1e9 < x < 1e9 and -1e9 < y < 1e9 and -1e9 < w < 1e9 and -1e9 < h < 1e9):
        return "box_not_finite"
    if w < 0 or h < 0:
        return "box_negative"
    return "box_empty" if w == 0 or h == 0 else None


def _get(table: dict[int, int], key: Any) -> int | None:
    """Look up an id that may be written as a float (3.0)."""
    number = key if type(key) is int else as_int(key)
    return None if number is None else table.get(number)


def read_categories(data: dict[str, Any], path: str | Path, log: IssueLog) -> tuple[list[int], list[str]]:
    """Read category ids in ascending order and their names; label `k` is the k-th of them.

    Raises:
        DataError: there is no category, an id is not an integer, or an id occurs twice.
    """
    names: dict[int, str] = {}
    for position, entry in enumerate(data["categories"]):
        if isinstance(entry, dict) and coerce_numbers(entry, ("id",)):
            log.add("number_as_text", f"category entry {position}")
        key = as_int(entry.get("id")) if isinstance(entry, dict) else None
        if key is None:
            shown = printable(repr(entry))[:80]
            raise DataError(
                f'{path}: the category {shown} has no integer id. It should look like {{"id": 1, "name": "..."}}.'
            )
        if key in names:
            raise DataError(f"{path}: two categories have the id {key}. Give each category its own id.")
        name = entry.get("name")
        name = "" if name is None else _one_line(str(name))
        if not name:
            log.add("category_name_missing", f"category {key}")
            name = str(key)
        elif name in names.values():
            log.add("category_name_duplicate", f"category {key}", name)
        names[key] = name
    if not names:
        raise DataError(f"{path}: the list `categories` is empty, so there is nothing to detect.")
    ids = sorted(names)
    return ids, [names[key] for key in ids]


def categories_differ(
    first: tuple[Sequence[int], Sequence[str]], second: tuple[Sequence[int], Sequence[str]], show: int = 5
) -> str | None:
    """Describe how the categories (ids, names) of two datasets differ, id by id; None if they are equal."""
    ours, theirs = dict(zip(*first, strict=True)), dict(zip(*second, strict=True))
    differing = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
    if not differing:
        return None
    cases = [f"id {key} is {_shown(ours, key)} there and {_shown(theirs, key)} here" for key in differing[:show]]
    more = f", and {len(differing) - show:,} more" if len(differing) > show else ""
    return ", ".join(cases) + more


def _shown(names: dict[int, str], key: int) -> str:
    return f"'{names[key]}'" if key in names else "absent"


def _one_line(name: str) -> str:
    # question marks rather than escapes (as `printable` writes): saved weights already hold names made this way
    return "".join(c if c.isprintable() else "?" for c in " ".join(name.split()))
