"""Weights on disk: one safetensors file that needs nothing beside it.

Class names, the dataset's category ids and the resolved config travel in the file's metadata, so a detector can be
rebuilt and its detections named from the file alone. Files appear under their name only when complete.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from brs_detr.engine.storage import CheckpointError, publish, write_text
from brs_detr.engine.tensor_file import not_finite, read_tensors, write_tensors

__all__ = ["CheckpointError", "Weights", "find_weights", "load_weights", "publish", "save_weights", "write_text"]


@dataclass(frozen=True)
class Weights:
    """A weights file in memory.

    Attributes:
        tensors: state dict, on the CPU.
        classes: name of label 0, 1, ...
        category_ids: the dataset's id of label 0, 1, ...
        config: the resolved config as nested plain values; empty where the file holds none.
        extra: further facts: "epoch", "step", "metrics", "thresholds" (score of each class's best F1).
    """

    tensors: dict[str, Tensor]
    classes: list[str]
    category_ids: list[int]
    config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def save_weights(path: Path, weights: Weights) -> None:
    """Write a weights file; a crash at any moment leaves the former file or the new one, never half of one.

    Raises:
        NonFiniteError: a tensor holds NaN or infinite numbers.
        StorageError: the disk has no room, or may not be written to.
    """
    metadata = {
        "format": "pt",
        "brs_detr": json.dumps({"classes": weights.classes, "category_ids": weights.category_ids}),
        "config": json.dumps(weights.config),
        "extra": json.dumps(weights.extra),
    }
    write_tensors(path, weights.tensors, metadata)


def load_weights(path: Path) -> Weights:
    """Read a weights file written by `save_weights`; one of an earlier version, without a checksum, too.

    Raises:
        CheckpointError: absent, unreadable, damaged, with numbers that are not finite, or not one of ours.
    """
    if not _is_file(path):
        raise CheckpointError(f"{path}: no such weights file")
    tensors, metadata = read_tensors(path)
    if "brs_detr" not in metadata:
        raise CheckpointError(f"{path}: holds tensors but no class names; convert it with `python -m brs_detr convert`")
    if bad := not_finite(tensors):
        raise CheckpointError(
            f"{path}: {len(bad)} tensors hold NaN or infinite numbers ({', '.join(bad[:3])}), so nothing can be "
            "detected with them; use an earlier file"
        )
    labels, config, extra = (_parse(path, metadata.get(key, "{}"), key) for key in ("brs_detr", "config", "extra"))
    classes, category_ids = labels.get("classes"), labels.get("category_ids")
    if not (_list_of(classes, str) and _list_of(category_ids, int) and len(classes) == len(category_ids) > 0):
        raise CheckpointError(
            f"{path}: its class names and category ids are no two lists of one length; use an earlier file, or convert "
            "it again"
        )
    scores = extra.get("thresholds", {})
    if not isinstance(scores, dict) or not _list_of(list(scores.values()), float, int):
        raise CheckpointError(f"{path}: its thresholds are no numbers by class name; use an earlier file")
    return Weights(tensors, classes, category_ids, config, extra)


def find_weights(path: Path) -> Path:
    """The weights file meant by a run folder (its best, else its last) or by the path of a file itself.

    Raises:
        CheckpointError: neither, or it may not be read; names what was looked for.
    """
    for file in (path, path / "best.safetensors", path / "last.safetensors"):
        if _is_file(file):
            return file
    raise CheckpointError(f"{path}: neither a weights file nor a run folder with best.safetensors or last.safetensors")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); ask its owner for the permission") from None


def _parse(path: Path, text: str, name: str) -> dict[str, Any]:
    """A metadata entry that must be a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: its metadata entry {name} is no JSON object; use an earlier file")
    return value


def _list_of(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(item) in kinds for item in value)
