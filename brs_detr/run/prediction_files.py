"""Write predictions: one JSON line per image while predicting, converted to --format at the end.

The lines are on disk at once, so a process that is killed leaves them, and a video of any length takes no memory.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from brs_detr.config import ConfigError
from brs_detr.data.annotations import categories_differ, read_categories, read_images
from brs_detr.data.issues import IssueLog
from brs_detr.data.json_file import load_json
from brs_detr.data.sources import Source
from brs_detr.engine.storage import PARTIAL_BYTES, write_file, write_text
from brs_detr.user_files import printable

Record = dict[str, Any]
FORMATS = ("json", "coco", "yolo", "csv")
MAX_NAME_BYTES = 255  # of a file name on common file systems
CSV_COLUMNS = ["file_name", "width", "height", "frame", "time", "name", "category_id", "score", "x1", "y1", "x2", "y2"]


class Labels(NamedTuple):
    """What the predictions are named by.

    Attributes:
        classes: name of each label. category_ids: the dataset's id of each.
        stems: by `file_name` of a record the path, without ending, of files about it.
        image_ids: by `file_name` the id in a dataset, where there are no videos; None: images are numbered from 1.
    """

    classes: Sequence[str]
    category_ids: Sequence[int]
    stems: Mapping[str, Path]
    image_ids: Mapping[str, int] | None = None


def convert(lines: Path, out: Path, kind: str, labels: Labels) -> None:
    """Write the predictions of a file of lines in one of `FORMATS` to a folder.

    Args:
        lines: one record a line: `file_name`, `width`, `height`, `objects`; of a frame of a video also `frame` and
            `time`.
        out: folder.
        kind: the format.
        labels: names and ids.

    Raises:
        StorageError: the disk is full.
    """
    {"json": _write_json, "coco": _write_coco, "yolo": _write_yolo, "csv": _write_csv}[kind](lines, out, labels)


def read_records(lines: Path) -> Iterator[Record]:
    """Iterate over the records of a file of lines; the last line is left out if a full disk or Ctrl-C cut it short."""
    with open(lines, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def read_image_ids(path: Path, labels: Labels, max_bytes: int) -> dict[str, int]:
    """Read the ids of images from a COCO json, by file name, and by its last part where that is unique.

    As a dataset reads them: numbers may be written as text, and images without an integer id are left out.

    Raises:
        DataError: it is not a COCO json.
        ConfigError: its categories are not those of the weights.
    """
    content, log = load_json(path, max_bytes, annotated=False), IssueLog()
    own = read_categories(content, path, log)
    if differ := categories_differ((labels.category_ids, labels.classes), own):
        raise ConfigError(f"--annotations={path}: its categories are not those of the weights: {differ}.")
    images = read_images(content, path, log)
    ids = dict(zip(images.names, images.ids.tolist(), strict=True))
    last = Counter(name.rpartition("/")[2] for name in images.names)
    return {short: ids[name] for name in ids if last[short := name.rpartition("/")[2]] == 1} | ids


def id_of(name: str, image_ids: Mapping[str, int]) -> int | None:
    """Return the id of an image by its name in the dataset, or by the last part of it."""
    return image_ids.get(name, image_ids.get(name.rpartition("/")[2]))


def _write_json(lines: Path, out: Path, labels: Labels) -> None:
    """Write predictions.json of all images, and of each video NAME.jsonl with a line for each frame.

    Where there are only videos, a predictions.json of earlier predictions is removed, as it would be of other sources.
    """
    first = next(read_records(lines), {})
    if "frame" not in first or any("frame" not in record for record in read_records(lines)):
        images = (record for record in read_records(lines) if "frame" not in record)
        _write_list(out / "predictions.json", images)
    else:
        (out / "predictions.json").unlink(missing_ok=True)
    frames = (record for record in read_records(lines) if "frame" in record)
    for name, records in itertools.groupby(frames, lambda record: record["file_name"]):
        path = _with_ending(out / labels.stems[name], ".jsonl")
        write_file(path, lambda file, own=records: file.writelines(_line(one) for one in own))  # type: ignore[misc]


def _write_coco(lines: Path, out: Path, labels: Labels) -> None:
    """Write predictions.json, COCO's results; where images are numbered here, images.json says what the numbers are.

    An images.json of earlier predictions is removed where it would be of other numbers.
    """

    def results() -> Iterator[Record]:
        for number, record in enumerate(read_records(lines), start=1):
            found = number if labels.image_ids is None else id_of(record["file_name"], labels.image_ids)
            for one in record["objects"] if found is not None else ():
                yield {"image_id": found, **{key: value for key, value in one.items() if key != "name"}}

    _write_list(out / "predictions.json", results())
    if labels.image_ids is None:
        images = (
            {"id": number, **{key: value for key, value in record.items() if key != "objects"}}
            for number, record in enumerate(read_records(lines), start=1)
        )
        named = zip(labels.category_ids, labels.classes, strict=True)
        categories = json.dumps([{"id": number, "name": name} for number, name in named])
        end = f',\n"categories": {categories}}}\n'
        write_file(out / "images.json", lambda file: _write_items(file, images, b'{"images": ', end.encode()))
    else:
        (out / "images.json").unlink(missing_ok=True)


def _write_yolo(lines: Path, out: Path, labels: Labels) -> None:
    """Write labels/NAME.txt of each image or frame, `class x y w h score` in shares of its sides, and classes.txt."""
    of_category = {category: label for label, category in enumerate(labels.category_ids)}
    for record in read_records(lines):
        path = out / "labels" / labels.stems[record["file_name"]]
        frame = f"_{record['frame']:06d}" if "frame" in record else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for one in record["objects"]:
            x, y, w, h = one["bbox"]
            width, height = record["width"], record["height"]
            shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            row = " ".join(f"{share:.6f}" for share in shares)
            rows.append(f"{of_category[one['category_id']]} {row} {one['score']:.6g}\n")
        # not atomically: there may be many thousands, and a name may be as long as a name can be
        _with_ending(path, f"{frame}.txt").write_text("".join(rows), encoding="utf-8")
    write_text(out / "classes.txt", "".join(f"{name}\n" for name in labels.classes))


def require_own_labels(sources: Sequence[Source], stems: Mapping[str, Path]) -> None:
    """Refuse an image whose file of labels may be that of a frame of a video: clip_000000.png beside clip.mp4.

    Args:
        sources: images and videos.
        stems: as in `Labels`.

    Raises:
        ConfigError: naming both.
    """
    videos = {str(stems[one.name]): one.name for one in sources if one.kind != "image"}  # a URL may turn out to be one
    for source in sources:
        frame = re.fullmatch(r"(.+)_\d{6,}", str(stems[source.name]), re.DOTALL)
        if source.kind in ("image", "url") and frame is not None and frame[1] in videos:
            raise ConfigError(
                f"--format=yolo: {printable(source.name)} and a frame of {printable(videos[frame[1]])} may have the "
                "same file of labels. Predict one of them with another --out."
            )


def _write_csv(lines: Path, out: Path, labels: Labels) -> None:
    """Write predictions.csv, a row for each object; boxes are corners in pixels."""

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text)
        writer.writerow(CSV_COLUMNS)
        for record in read_records(lines):
            about = [record.get(key, "") for key in CSV_COLUMNS[:5]]
            for one in record["objects"]:
                x, y, w, h = one["bbox"]
                corners = [round(value, 2) for value in (x, y, x + w, y + h)]
                writer.writerow([*about, one["name"], one["category_id"], one["score"], *corners])
        text.flush()
        text.detach()  # else it would close the file

    write_file(out / "predictions.csv", write)


def _write_list(path: Path, items: Iterable[Record]) -> None:
    """Write a json list, an item a line, without holding it in memory."""
    write_file(path, lambda file: _write_items(file, items, b"", b"\n"))


def _write_items(file: BinaryIO, items: Iterable[Record], before: bytes, after: bytes) -> None:
    file.write(before + b"[")
    for number, item in enumerate(items):
        file.write(b",\n" if number else b"\n")
        file.write(_line(item).rstrip(b"\n"))
    file.write(b"\n]" + after)


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _with_ending(stem: Path, ending: str) -> Path:
    """Append an ending to a path, whatever dots its name has; a name that becomes too long ends in a hash."""
    room = MAX_NAME_BYTES - len(ending) - PARTIAL_BYTES  # `write_file` adds these for a while
    name = os.fsencode(stem.name)
    if len(name) <= room:
        return stem.with_name(stem.name + ending)
    digest = hashlib.sha256(name).hexdigest()[:16]
    return stem.with_name(f"{name[: room - 17].decode('utf-8', 'ignore')}-{digest}{ending}")


def drawing_names(files: list[Path]) -> list[Path]:
    """Choose a unique name for the drawing of each file; the same files always get the same names.

    a/b.jpg -> a/b.png, or a/b.jpg.png if there is also a/b.gif. A name that is too long for the file system or already
    taken is truncated and ends in a hash of the file name.
    """
    stems = Counter(file.with_suffix("") for file in files)
    plain = [file.with_suffix(".png") if stems[file.with_suffix("")] == 1 else Path(f"{file}.png") for file in files]
    uses = Counter(plain)
    taken: set[Path] = set()
    names: list[Path] = []
    for file, name in zip(files, plain, strict=True):
        if uses[name] > 1 or len(os.fsencode(name.name)) > MAX_NAME_BYTES:
            name = next(name for name in _hashed_names(file) if name not in uses and name not in taken)
        taken.add(name)
        names.append(name)
    return names


def _hashed_names(file: Path) -> Iterable[Path]:
    """Iterate over truncated names that end in a hash, another one in each attempt."""
    for attempt in range(1000):
        digest = hashlib.sha256(os.fsencode(file) + b"\0" * attempt).hexdigest()[:16]
        start = os.fsencode(file.name)[: MAX_NAME_BYTES - len(digest) - len("-.png")].decode("utf-8", "ignore")
        yield file.with_name(f"{start}-{digest}.png")
