"""Weights on disk: one safetensors file that needs nothing beside it.

Class names, the dataset's category ids and the resolved config travel in the file's metadata, so a detector can be
rebuilt and its detections named from the file alone. Files appear under their name only when complete.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the mend."""


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
    """Write a weights file; a crash at any moment leaves the former file or the new one, never half of one."""
    metadata = {
        "format": "pt",
        "brs_detr": json.dumps({"classes": weights.classes, "category_ids": weights.category_ids}),
        "config": json.dumps(weights.config),
        "extra": json.dumps(weights.extra),
    }
    # clones: safetensors refuses tensors that share memory
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata=metadata)
    publish(partial, path)


def load_weights(path: Path) -> Weights:
    """Read a weights file written by `save_weights`.

    Raises:
        CheckpointError: absent, damaged, or not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: the weights file is damaged ({error}); use an earlier one") from None
    if "brs_detr" not in metadata:
        raise CheckpointError(f"{path}: holds tensors but no class names; convert it with `python -m brs_detr convert`")
    try:
        labels = json.loads(metadata["brs_detr"])
        config, extra = (json.loads(metadata.get(key, "{}")) for key in ("config", "extra"))
        classes, category_ids = [str(name) for name in labels["classes"]], [int(key) for key in labels["category_ids"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(f"{path}: its notes on classes and settings cannot be read; use another file") from None
    return Weights(tensors, classes, category_ids, config, extra)


def find_weights(path: Path) -> Path:
    """The weights file meant by a run folder (its best, else its last) or by the path of a file itself.

    Raises:
        CheckpointError: neither; names what was looked for.
    """
    if path.is_file():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: neither a weights file nor a run folder with best.safetensors or last.safetensors")


def publish(partial: Path, path: Path) -> None:
    """Flush a finished file to disk and give it its name in one atomic step."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    publish(partial, path)
