"""Opening a COCO json: in any Unicode encoding, packed with gzip or not, and without keeping its masks in memory."""

from __future__ import annotations

import gc
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from brs_detr.data.faults import DataError
from brs_detr.data.limits import Limits
from brs_detr.data.masks import mask_box
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
