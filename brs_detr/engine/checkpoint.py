"""Weights files of detectors, and fine-tuning from them, also with other classes.

Class names, the dataset's category ids and the resolved config are stored in the file's metadata, so a detector can be
rebuilt and its detections named from the file alone. Files appear under their name only when complete.

Which tensors depend on the classes is not guessed from their names or sizes (there may be four classes as there are
four box coordinates): comparison with a detector that has one class more shows it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from brs_detr.engine.tensor_file import not_finite, read_tensors, write_tensors
from brs_detr.exit_codes import CheckpointError


@dataclass(frozen=True)
class Weights:
    """A weights file in memory.

    Attributes:
        tensors: state dict, on the CPU.
        classes: name of label 0, 1, ...
        category_ids: the dataset's id of label 0, 1, ...
        config: the resolved config as nested plain values; empty if the file has no config.
        extra: further metadata: "epoch", "step", "metrics", "thresholds" (raw score of each class's best F1),
            "calibration" (by head, see `evaluation.calibration`), "validated_on" (fingerprint of the dataset); of
            several heads "head_thresholds", the same of each, "predict_with", the best one, and "ensemble".
    """

    tensors: dict[str, Tensor]
    classes: list[str]
    category_ids: list[int]
    config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def save_weights(path: Path, weights: Weights) -> None:
    """Write a weights file; a crash at any moment leaves the old file or the new one, never a partial one.

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
    """Read a weights file written by `save_weights`, with or (earlier versions) without a checksum.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, holds non-finite numbers, or lacks class names.
    """
    if not _is_file(path):
        raise CheckpointError(f"{path}: no such weights file")
    tensors, metadata = read_tensors(path)
    if "brs_detr" not in metadata:
        raise CheckpointError(f"{path}: holds tensors but no class names; convert it with `python -m brs_detr convert`")
    if bad := not_finite(tensors):
        raise CheckpointError(
            f"{path}: {len(bad)} tensors hold NaN or infinite numbers ({', '.join(bad[:3])}). Use an earlier file."
        )
    labels, config, extra = (_parse(path, metadata.get(key, "{}"), key) for key in ("brs_detr", "config", "extra"))
    classes, category_ids = labels.get("classes"), labels.get("category_ids")
    if not (_is_list_of(classes, str) and _is_list_of(category_ids, int) and len(classes) == len(category_ids) > 0):
        raise CheckpointError(
            f"{path}: its class names and category ids are not two lists of the same length. Use an earlier file, or "
            "convert it again."
        )
    by_head = extra.get("head_thresholds", {})
    all_scores = [extra.get("thresholds", {}), *(by_head.values() if isinstance(by_head, dict) else [by_head])]
    if not all(isinstance(own, dict) and _is_list_of(list(own.values()), float, int) for own in all_scores):
        raise CheckpointError(f"{path}: its thresholds are not numbers by class name. Use an earlier file.")
    return Weights(tensors, classes, category_ids, config, extra)


def read_extra(path: Path) -> dict[str, Any]:
    """Read only the further metadata of a weights file (see `Weights.extra`).

    Raises:
        CheckpointError: the file is missing, or no weights file of this project.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _parse(path, (file.metadata() or {})["extra"], "extra")
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: not a weights file ({error}). Use a file of a training.") from None


def find_weights(path: Path) -> Path:
    """Return the weights file of a run folder (its best, else its last), or the path itself if it is a file.

    Raises:
        CheckpointError: there is no such file, or permission to read it is missing.
    """
    for file in (path, path / "best.safetensors", path / "last.safetensors"):
        if _is_file(file):
            return file
    raise CheckpointError(f"{path}: neither a weights file nor a run folder with best.safetensors or last.safetensors")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Ask its owner for permission.") from None


def _parse(path: Path, text: str, name: str) -> dict[str, Any]:
    """Parse a metadata entry that must be a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: its metadata entry {name} is not a JSON object. Use an earlier file.")
    return value


def _is_list_of(value: Any, *types: type) -> TypeGuard[list[Any]]:
    # The exact type, since True would pass as an int.
    return isinstance(value, list) and all(type(item) in types for item in value)


@dataclass(frozen=True)
class Transfer:
    """Report of `load_matching`: tensor names by what became of them.

    Attributes:
        kept: loaded unchanged.
        by_class: rows of the classes that both detectors have were copied; the other rows keep their initialization.
        fresh: keep their initialization, missing in the file or of another shape there.
        unused: in the file only.
    """

    kept: list[str]
    by_class: list[str]
    fresh: list[str]
    unused: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.kept)} tensors loaded unchanged"]
        titles = {
            "rows of shared classes loaded, the others re-initialized": self.by_class,
            "re-initialized": self.fresh,
            "in the file but unused": self.unused,
        }
        lines += [f"{len(names)} {title}: {', '.join(names)}" for title, names in titles.items() if names]
        return "\n".join(lines)


def rows_per_class(model: nn.Module, one_class_more: nn.Module) -> dict[str, int]:
    """Count the rows per class in the class-dependent tensors of a detector, by tensor name.

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
    by_anchor: Collection[str] = (),
) -> Transfer:
    """Load every tensor of matching shape; class-dependent ones row by row for the class names that both share.

    Args:
        model: the detector to load into, in place.
        tensors: state dict of another detector.
        old_classes: class names of `tensors`.
        classes: class names of `model`.
        class_rows: of `rows_per_class`; may be empty if the classes are the same.
        objectness: class-dependent tensors whose first row means "any object" whatever the classes; it is copied.
        by_anchor: class-dependent tensors whose rows are those of one anchor after the other, each with all classes;
            the rows of the others are those of one class after the other.

    Returns:
        A report by tensor name.
    """
    shared = [(old_classes.index(name), new) for new, name in enumerate(classes) if name in old_classes]
    same = list(old_classes) == list(classes)
    kept, by_class, fresh = [], [], []
    loaded: dict[str, Tensor] = {}
    for name, target in model.state_dict().items():
        source, rows = tensors.get(name), class_rows.get(name, 0)
        if source is None:
            fresh.append(name)
        elif (same or not rows) and source.shape == target.shape:
            loaded[name] = source
            kept.append(name)
        elif (
            rows
            and (pairs := [(0, 0)] if name in objectness else shared)
            and source.shape[1:] == target.shape[1:]
            # As many rows of each class, at most one of background: not so with other anchors or one box for all.
            and source.shape[0] - rows * len(old_classes) in (0, 1)
        ):
            groups = rows if name in by_anchor else 1
            loaded[name] = _copy_rows(source, target, pairs, rows, len(old_classes), len(classes), groups)
            by_class.append(name)
        else:
            fresh.append(name)
    model.load_state_dict(loaded, strict=False)
    return Transfer(kept, by_class, fresh, sorted(set(tensors) - set(model.state_dict())))


def _copy_rows(
    source: Tensor, target: Tensor, shared: list[tuple[int, int]], rows: int, old: int, new: int, groups: int = 1
) -> Tensor:
    """Copy the rows of shared classes, and those after the last class (background), from `source` into `target`.

    Args:
        source: rows of `old` classes, `rows` of each.
        target: rows of `new` classes; stays as it is.
        shared: (label in the source, label in the target) of each shared class.
        groups: 1, or `rows` where the rows of all classes are repeated as often, one of each.
    """
    if groups > 1:
        parts = zip(source.chunk(groups), target.chunk(groups), strict=True)
        return torch.cat([_copy_rows(own, fresh, shared, rows // groups, old, new) for own, fresh in parts])
    result = target.clone()
    for before, after in shared:
        result[after * rows : (after + 1) * rows] = source[before * rows : (before + 1) * rows]
    if source.shape[0] - old * rows == target.shape[0] - new * rows:
        result[new * rows :] = source[old * rows :]
    return result
