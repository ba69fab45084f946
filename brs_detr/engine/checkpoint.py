"""What a run saves and starts from: weights files, resumable states, weights of other runs.

Class names, the dataset's category ids and the resolved config travel in the file's metadata, so a detector can be
rebuilt and its detections named from the file alone. Files appear under their name only when complete.

Starting from the weights of another run, also one with other classes.

Which tensors depend on the classes is not guessed from their names or from a matching number (four boxes coordinates,
four classes): a second detector with one class more shows it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Transfer:
    """What `load_matching` did, by tensor name.

    Attributes:
        kept: loaded as they are.
        by_class: rows of the classes that both detectors know were copied; the other rows are fresh.
        fresh: in the model, but absent from the file or of another shape.
        unused: in the file only.
    """

    kept: list[str]
    by_class: list[str]
    fresh: list[str]
    unused: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.kept)} tensors loaded as they are"]
        titles = {
            "rows of shared classes loaded, the others re-initialized": self.by_class,
            "re-initialized": self.fresh,
            "in the file but unused": self.unused,
        }
        lines += [f"{len(names)} {title}: {', '.join(names)}" for title, names in titles.items() if names]
        return "\n".join(lines)


def rows_per_class(model: nn.Module, one_class_more: nn.Module) -> dict[str, int]:
    """Rows that each class owns in the class-dependent tensors of a detector, by tensor name.

    Args:
        model: the detector.
        one_class_more: the same detector, built for one class more.
    """
    larger = one_class_more.state_dict()
    growth = {
        name: larger[name].shape[0] - tensor.shape[0] for name, tensor in model.state_dict().items() if tensor.dim()
    }
    return {name: rows for name, rows in growth.items() if rows}


@torch.no_grad()
def load_matching(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    old_classes: Sequence[str],
    classes: Sequence[str],
    class_rows: Mapping[str, int],
    objectness: Collection[str] = (),
) -> Transfer:
    """Load every tensor that fits; class-dependent ones row by row for the class names that both sides share.

    Args:
        model: the detector to fill, in place.
        tensors: state dict of another detector.
        old_classes: class names of `tensors`.
        classes: class names of `model`.
        class_rows: of `rows_per_class`; may be empty where the classes are the same.
        objectness: class-dependent tensors whose first row means "any object", whatever the classes; it is copied.
    """
    shared = [(old_classes.index(name), new) for new, name in enumerate(classes) if name in old_classes]
    same = list(old_classes) == list(classes)
    kept, by_class, fresh, filled = [], [], [], {}
    for name, target in model.state_dict().items():
        source, rows = tensors.get(name), class_rows.get(name, 0)
        if source is None:
            fresh.append(name)
        elif (same or not rows) and source.shape == target.shape:
            filled[name] = source
            kept.append(name)
        elif rows and (pairs := [(0, 0)] if name in objectness else shared) and source.shape[1:] == target.shape[1:]:
            filled[name] = _copy_rows(source, target, pairs, rows, len(old_classes), len(classes))
            by_class.append(name)
        else:
            fresh.append(name)
    model.load_state_dict(filled, strict=False)
    return Transfer(kept, by_class, fresh, sorted(set(tensors) - set(model.state_dict())))


def _copy_rows(source: Tensor, target: Tensor, shared: list[tuple[int, int]], rows: int, old: int, new: int) -> Tensor:
    """`target` with the rows of shared classes, and those behind the last class (background), taken from `source`."""
    result = target.clone()
    for before, after in shared:
        result[after * rows : (after + 1) * rows] = source[before * rows : (before + 1) * rows]
    if source.shape[0] - old * rows == target.shape[0] - new * rows:
        result[new * rows :] = source[old * rows :]
    return result
