"""Opening a COCO json: in any Unicode encoding, packed with gzip or not, and without keeping its masks in memory.

Numbers of a json as labeling tools write them: 3.0 for an id, "17" in quotes, true for 1.

The box around a COCO segmentation, for annotations that have no box of their own.
"""

from __future__ import annotations

import gc
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from brs_detr.data.image_io import Limits
from brs_detr.data.issues import DataError
from brs_detr.parsing import TwoValuesError, dict_of_pairs
from brs_detr.user_files import UserFileError, printable, read_file, read_start, unpack_gzip

BOX_FROM_MASK = "box_from_mask"  # key of an annotation whose box was not in the file


def load_json(path: str | Path, most_bytes: int = Limits.max_json_bytes) -> dict[str, Any]:
    """Read a COCO json.

    Polygons and run lengths are dropped while it is parsed, for they are most of its memory; an annotation without a
    box gets the one around them, and a true entry `box_from_mask`.

    Args:
        path: of the file.
        most_bytes: its largest size, unpacked (`data.max_json_bytes`).

    Raises:
        DataError: the file cannot be opened, is too large, is no JSON, gives a key two values, or is not a detection
            dataset.
    """
    content = _read(path, most_bytes)
    start = f"it begins with '{printable(content[:40].decode('utf-8', 'replace'))}'" if content else "it is empty"
    try:
        text = content.decode(json.detect_encoding(content))
        del content
        with _no_collection():
            data = json.loads(text, object_pairs_hook=_without_mask)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: this is not a JSON file in UTF-8 ({error.reason} at byte {error.start}).") from None
    except TwoValuesError as error:
        raise DataError(f"{path}: {error}.") from None
    except (ValueError, RecursionError) as error:  # bad syntax, numbers of thousands of digits, endless nesting
        raise DataError(f"{path}: this is not a JSON file ({error}; {start}).") from None
    del text
    _require_lists(data, path)
    return data


def _read(path: str | Path, most_bytes: int) -> bytes:
    try:
        start = read_start(path, 64)
        if start and not any(start):  # a file of holes would fill the memory with zeros before anyone looked at them
            raise UserFileError("it begins with zeros")
        content = read_file(path, most_bytes, "data.max_json_bytes")
        return unpack_gzip(content, most_bytes, "data.max_json_bytes") if content[:2] == b"\x1f\x8b" else content
    except FileNotFoundError:
        raise DataError(f"{path}: this annotation file does not exist.") from None
    except (OSError, EOFError, zlib.error, UserFileError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: this annotation file cannot be read ({reason}).") from None


def _require_lists(data: Any, path: str | Path) -> None:
    if isinstance(data, list):
        raise DataError(f"{path}: this is a list, as detection results are; a dataset has images and annotations.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            known = ", ".join(map(str, list(data)[:6])) if isinstance(data, dict) else ""
            found = f"it has {printable(known)}" if known else f"it is {printable(str(data))[:40]}"
            if isinstance(data, dict) and key in data:
                found = f"its `{key}` is {_kind(data[key])}"
            raise DataError(f"{path}: this is not a COCO detection dataset: it has no list `{key}` ({found}).")
    if not data["images"]:
        raise DataError(f"{path}: its list `images` is empty.")


def _kind(value: Any) -> str:
    return {dict: "an object, not a list", type(None): "null"}.get(type(value), f"a {type(value).__name__}")


def _without_mask(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict_of_pairs(pairs)
    mask, stated = entry.pop("segmentation", None), entry.get("bbox")
    if mask and (not stated or (type(stated) is list and not any(stated))):  # four zeros, too, stand for no box
        box = mask_box(mask)
        if box is not None:
            entry["bbox"], entry[BOX_FROM_MASK] = box, True
    return entry


@contextmanager
def _no_collection() -> Iterator[None]:
    """Parsing makes millions of objects and no garbage: the collector would only walk them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_WORDS = {"true": 1, "false": 0}
_NUMBERS = frozenset((int, float))


def is_number(value: Any) -> bool:
    """True for int and float, but not bool."""
    return type(value) in _NUMBERS


def as_int(value: Any) -> int | None:
    """The value as an id or a size: an int, or a float without a fraction, that fits 64 bits; else None."""
    if type(value) is int:
        return value if -(2**62) < value < 2**62 else None
    return int(value) if type(value) is float and abs(value) < 2**53 and value.is_integer() else None


def coerce_numbers(entry: dict[str, Any], keys: Sequence[str]) -> bool:
    """Replace texts that are numbers by these numbers, in place; also within a list.

    Args:
        entry: of a json.
        keys: where to look.

    Returns:
        whether there was one.
    """
    found = False
    for key in keys:
        value = entry.get(key)
        if type(value) is str:
            plain = _plain(value)
        elif type(value) is list and str in map(type, value):
            plain = [_plain(item) if type(item) is str else item for item in value]
        else:
            continue
        found |= plain != value
        entry[key] = plain
    return found


def _plain(text: str) -> int | float | str:
    word = text.strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:  # also an int of thousands of digits
            continue
    return text


def mask_box(mask: Any) -> list[float] | None:
    """The box (x, y, w, h) in pixels around a COCO segmentation, without drawing it.

    Args:
        mask: polygons [x0, y0, x1, y1, ...] of three or more points in all, however the list is nested, or {"size":
            [h, w], "counts": run lengths down the columns, as a list or in COCO's compressed text}.

    Returns:
        the box; None where the mask is empty or malformed.
    """
    try:
        if isinstance(mask, dict):
            return _runs_box(mask["counts"], *mask["size"])
        points = np.array(list(_numbers(mask))).reshape(-1, 2)
        if len(points) < 3 or not np.isfinite(points).all():
            return None
        low, high = points.min(0), points.max(0)
        return [*low.tolist(), *(high - low).tolist()]
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError):
        return None


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    else:
        yield float(value)


def _runs_box(counts: str | list[int], height: int, width: int) -> list[float] | None:
    """The box around run lengths.

    Not by pycocotools' `toBbox`: on damaged masks it ends the process (a height of 0 or 2^32), reads past the end of
    the text, or returns a box far outside the image.
    """
    runs = np.asarray(_decode_runs(counts) if isinstance(counts, str) else counts, np.int64)
    if height < 1 or (runs < 0).any() or runs.sum() > height * width:
        return None
    ends = np.cumsum(runs)
    first, last = ends[:-1:2], ends[1::2] - 1  # pixels of each run of the mask, counted down the columns
    first, last = first[last >= first], last[last >= first]
    if not len(first):
        return None
    # a run that goes on in the next column touches both the bottom and the top
    wraps = (first // height != last // height).any()
    top, bottom = (0, height - 1) if wraps else ((first % height).min(), (last % height).max())
    left, right = first.min() // height, last.max() // height
    return [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]


def _decode_runs(text: str) -> list[int]:
    """Run lengths of COCO's compressed text: 5 bits a character, low ones first, the later ones as differences.

    Source: pycocotools, `rleFrString`.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in text.encode("ascii"):
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) and 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
