"""Load a COCO json: in any Unicode encoding, with or without gzip, and without keeping its masks in memory.

Numbers may be written as labeling tools do: 3.0 for an id, "17" in quotes, true for 1. An annotation without a box gets
the box around its segmentation.
"""

from __future__ import annotations

import gc
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from brs_detr.data.config import Limits
from brs_detr.data.issues import DataError
from brs_detr.data.storage import raise_storage_fault
from brs_detr.ops.rle import checked_runs, pack_segmentation
from brs_detr.parsing import TwoValuesError, dict_of_pairs
from brs_detr.user_files import UserFileError, printable, read_file, read_start, unpack_gzip

BOX_FROM_MASK = "box_from_mask"  # key of an annotation whose box was not in the file


def load_json(
    path: str | Path,
    max_bytes: int = Limits.max_json_bytes,
    masks: Literal["drop", "pack", "keep"] = "drop",
    annotated: bool = True,
) -> dict[str, Any]:
    """Read a COCO json.

    Polygons and run lengths are dropped or packed during parsing, since they take most of the memory; an annotation
    without a box gets the box around them, and an entry `box_from_mask` that is True.

    Args:
        path: annotation file.
        max_bytes: maximum size after unpacking (`data.max_json_bytes`).
        masks: what becomes of `segmentation`: "drop"; "pack" as by `ops.rle.pack_segmentation`, bytes that are empty
            if it is malformed; or "keep" as it stands.
        annotated: refuse a json without `annotations`; else the list is empty then, as for COCO's test images.

    Raises:
        DataError: the file cannot be opened, is too large, is not JSON, gives a key two values, or is not a detection
            dataset.
    """
    content = _read(path, max_bytes)
    start = f"it begins with '{printable(content[:40].decode('utf-8', 'replace'))}'" if content else "it is empty"
    try:
        text = content.decode(json.detect_encoding(content))
        del content  # as the text below: the file is freed before its objects are made
        with _paused_gc():
            data = json.loads(text, object_pairs_hook=partial(_convert_mask, masks))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: this is not a JSON file in UTF-8 ({error.reason} at byte {error.start}).") from None
    except TwoValuesError as error:
        raise DataError(f"{path}: {error}.") from None
    except (ValueError, RecursionError) as error:  # bad syntax, numbers of thousands of digits, endless nesting
        raise DataError(f"{path}: this is not a JSON file ({error}; {start}).") from None
    del text
    if not annotated and isinstance(data, dict):
        data.setdefault("annotations", [])
    _require_lists(data, path)
    return data


def _read(path: str | Path, max_bytes: int) -> bytes:
    """Read a file, and unpack it if its first bytes are those of gzip."""
    try:
        start = read_start(path, 64)
        if start and not any(start):  # a sparse file takes no space on disk, but would fill the memory with zeros
            raise UserFileError("it begins with zeros")
        content = read_file(path, max_bytes, "data.max_json_bytes")
        return unpack_gzip(content, max_bytes, "data.max_json_bytes") if content[:2] == b"\x1f\x8b" else content
    except FileNotFoundError:
        raise DataError(f"{path}: this annotation file does not exist.") from None
    except (OSError, EOFError, zlib.error, UserFileError) as error:
        raise_storage_fault(error, path)
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: this annotation file cannot be read ({reason}).") from None


def _require_lists(data: Any, path: str | Path) -> None:
    if isinstance(data, list):
        raise DataError(f"{path}: this is a list, as detection results are; a dataset has images and annotations.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            known = ", ".join(map(str, list(data)[:6])) if isinstance(data, dict) else ""
            content = f"it has {printable(known)}" if known else f"it is {printable(str(data))[:40]}"
            if isinstance(data, dict) and key in data:
                content = f"its `{key}` is {_type_name(data[key])}"
            raise DataError(f"{path}: this is not a COCO detection dataset: it has no list `{key}` ({content}).")
    if not data["images"]:
        raise DataError(f"{path}: its list `images` is empty.")


def _type_name(value: Any) -> str:
    return {dict: "an object, not a list", type(None): "null"}.get(type(value), f"a {type(value).__name__}")


def _convert_mask(masks: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of the json, its segmentation dropped, packed or kept; it may replace a missing box."""
    entry = dict_of_pairs(pairs)
    mask, stated = entry.pop("segmentation", None), entry.get("bbox")
    if mask and (not stated or (type(stated) is list and not any(stated))):  # some tools write four zeros for no box
        box = mask_box(mask)
        if box is not None:
            entry["bbox"], entry[BOX_FROM_MASK] = box, True
    if mask and masks != "drop":
        entry["segmentation"] = pack_segmentation(mask) if masks == "pack" else mask
    return entry


@contextmanager
def _paused_gc() -> Iterator[None]:
    """Pause the garbage collector, which would scan the millions of objects of a json repeatedly, and free none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_WORDS = {"true": 1, "false": 0}
_NUMBER_TYPES = frozenset((int, float))


def is_number(value: Any) -> bool:
    """Return True for int and float, but not bool (a subclass of int)."""
    return type(value) in _NUMBER_TYPES


def as_int(value: Any) -> int | None:
    """Return an id or a size as int if it is an int or a float without a fraction that fits 64 bits, else None."""
    # 2**62: twice the number still fits int64; 2**53: the largest range in which every integer is a float
    if type(value) is int:
        return value if -(2**62) < value < 2**62 else None
    return int(value) if type(value) is float and abs(value) < 2**53 and value.is_integer() else None


def coerce_numbers(entry: dict[str, Any], keys: Sequence[str]) -> bool:
    """Convert numbers written as strings, in place, also within a list.

    Args:
        entry: an object of a json.
        keys: keys whose values are converted.

    Returns:
        True if a value was converted.
    """
    converted = False
    for key in keys:
        value = entry.get(key)
        number: Any
        if type(value) is str:
            number = _parse_number(value)
        elif type(value) is list and str in map(type, value):
            number = [_parse_number(item) if type(item) is str else item for item in value]
        else:
            continue
        converted |= number != value
        entry[key] = number
    return converted


def _parse_number(text: str) -> int | float | str:
    """Return the number that a string stands for, or the string itself."""
    word = text.strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    for number_type in (int, float):
        try:
            return number_type(word)
        except ValueError:  # also raised for an int of thousands of digits
            continue
    return text


def mask_box(mask: Any) -> list[float] | None:
    """Compute the box (x, y, w, h) in pixels around a COCO segmentation, without rasterizing it.

    Args:
        mask: polygons [x0, y0, x1, y1, ...] of three or more points in total, in a list of any nesting, or {"size":
            [h, w], "counts": run lengths down the columns, as a list or as COCO's compressed string}.

    Returns:
        the box; None if the mask is empty or malformed.
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
    """Compute the box around run lengths.

    Not by pycocotools' `toBbox`: on damaged masks it ends the process (a height of 0 or 2^32), reads past the end of
    the text, or returns a box far outside the image.
    """
    runs = checked_runs(counts, height, width)
    if runs is None:
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
