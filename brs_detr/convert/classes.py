"""Names and category ids of the classes of an official checkpoint, which stores names at best.

The official code numbers classes in the order of the dataset's json, whatever the order of the names it stores. A
weights file lists ids beside names, so that order is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brs_detr.engine.checkpoint import CheckpointError
from brs_detr.parsing import TwoValuesError, dict_of_pairs
from brs_detr.user_files import UserFileError, read_file

COCO_NAMES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)
_NEVER_USED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = tuple(number for number in range(1, 91) if number not in _NEVER_USED)


@dataclass(frozen=True)
class Classes:
    """The classes of a checkpoint.

    Attributes:
        names: of label 0, 1, ...
        ids: category id of label 0, 1, ...
        remark: where the names and ids come from.
    """

    names: list[str]
    ids: list[int]
    remark: str


def name_classes(count: int, meta: Mapping[str, Any], json_path: Path | None, source: str) -> Classes:
    """Names and ids for `count` classes: from a json, else the checkpoint's notes, else COCO's for 80.

    Args:
        count: K of the checkpoint.
        meta: MMCV's notes.
        json_path: annotations in COCO's format whose `categories` the checkpoint was trained on.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: the classes cannot be named, or the json names another number of them.
    """
    stored = stored_names(meta)
    if json_path is not None:
        return _from_json(count, stored, json_path, source)
    if stored and len(stored) != count:
        raise CheckpointError(
            f"{source}: has {count} classes but names {len(stored)}; give the json that it was trained on with "
            "--num-classes-from FILE"
        )
    if tuple(stored) == COCO_NAMES or (not stored and count == len(COCO_NAMES)):
        remark = "COCO's names and category ids" + ("" if stored else ", assumed since there are 80 classes")
        return Classes(list(COCO_NAMES), list(COCO_IDS), remark)
    if stored:
        ids = list(range(1, count + 1))
        remark = "names from the checkpoint, category ids 1, 2, ... assumed (--num-classes-from FILE states them)"
        return Classes(list(stored), ids, remark)
    raise CheckpointError(
        f"{source}: has {count} classes without names; give the json in COCO's format that it was trained on with "
        "--num-classes-from FILE"
    )


def stored_names(meta: Mapping[str, Any]) -> list[str]:
    """Class names in MMCV's or MMEngine's notes; empty where there are none."""
    notes = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), Mapping) else meta
    names = next((notes[key] for key in ("CLASSES", "classes") if notes.get(key)), ())
    return [names] if isinstance(names, str) else [str(name) for name in names]


def _from_json(count: int, stored: Sequence[str], path: Path, source: str) -> Classes:
    try:
        content = read_file(path).decode("utf-8-sig")
        categories = json.loads(content, object_pairs_hook=dict_of_pairs)["categories"]
        pairs = [(int(entry["id"]), str(entry["name"])) for entry in categories]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (UserFileError, TwoValuesError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(f"{path}: no json in COCO's format with `categories` of id and name") from None
    if stored and {name for _, name in pairs} > set(stored):
        pairs = [pair for pair in pairs if pair[1] in stored]
    if len(pairs) != count:
        raise CheckpointError(f"{source}: has {count} classes, but {path} names {len(pairs)}; give the json it knows")
    ids, names = (list(column) for column in zip(*pairs))
    return Classes(names, ids, f"names and category ids from {path}")
