"""Convert an official checkpoint to a weights file and back; all tensors are checked before a file is written."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from brs_detr import config as configuration
from brs_detr.checkpoints.architecture import Architecture, name_classes, recognize, settings_of
from brs_detr.checkpoints.keys import to_official, to_ours, why_dropped
from brs_detr.engine.checkpoint import CheckpointError, Weights, load_weights
from brs_detr.engine.storage import write_file
from brs_detr.models.backbones.weights_io import OfficialFile
from brs_detr.models.build import build_model
from brs_detr.models.cnn_config import ModelConfig


@dataclass(frozen=True)
class Report:
    """Report of a conversion.

    Attributes:
        architecture: the recognized architecture.
        matched: number of converted tensors.
        numbers: number of values in them.
        dropped: official names by reason.
        ours_alone: our names without an official tensor (empty for a complete file).
        classes: source of the class names.
    """

    architecture: Architecture
    matched: int
    numbers: int
    dropped: dict[str, list[str]]
    ours_alone: list[str]
    classes: str

    def __str__(self) -> str:
        lines = [
            str(self.architecture),
            f"matched: {self.matched} tensors with {self.numbers:,} values",
            f"ours alone: {', '.join(self.ours_alone) or 'none'}",
        ]
        for why, names in self.dropped.items():
            lines.append(f"dropped: {len(names)} tensors such as {names[0]}: {why}")
        if not self.dropped:
            lines.append("dropped: none")
        return "\n".join([*lines, f"classes: {self.classes}"])


def expected_shapes(settings: ModelConfig, num_classes: int) -> dict[str, Size]:
    """Return name and shape of every tensor of a config's detector, without allocating memory for it."""
    # freezing batch normalization reads values, which tensors on the meta device do not have
    backbone = dataclasses.replace(settings.backbone, pretrained=False, checkpoint=None, norm="batch")
    with torch.device("meta"):
        model = build_model(dataclasses.replace(settings, backbone=backbone), num_classes)
    return {
        name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")
    }


def from_official(file: OfficialFile, source: str, json_path: Path | None = None) -> tuple[Weights, Report]:
    """Convert an official checkpoint to weights of this project.

    Args:
        file: content of the checkpoint, from `read_official`.
        source: its path, for messages.
        json_path: annotations that name the classes if the file does not.

    Raises:
        CheckpointError: the architecture is another one, tensors are missing or unexpected, or classes have no names.
    """
    architecture = recognize(file.tensors, source)
    classes = name_classes(architecture.num_classes, file.meta, json_path, source)
    config = configuration.from_dict(settings_of(architecture), source)
    dropped: dict[str, list[str]] = {}
    for name in file.tensors:
        if why := why_dropped(name):
            dropped.setdefault(why, []).append(name)
    tensors, unknown = to_ours({name: value for name, value in file.tensors.items() if not why_dropped(name)})
    expected = expected_shapes(config.model, architecture.num_classes)
    require_same(tensors, unknown, expected, source)
    tensors = {name: tensors[name] for name in expected}  # in the order of the model, as trained weights are saved
    epoch = file.meta.get("epoch")
    extra = {"converted_from": Path(source).name} | ({"epoch": epoch} if isinstance(epoch, int) else {})
    weights = Weights(tensors, classes.names, classes.ids, configuration.to_dict(config), extra)
    numbers = sum(value.numel() for value in tensors.values())
    alone = sorted(set(expected) - set(tensors))
    return weights, Report(architecture, len(tensors), numbers, dropped, alone, classes.remark)


def require_same(tensors: dict[str, Tensor], unknown: list[str], expected: dict[str, Size], source: str) -> None:
    """Refuse a state dict that does not match the detector exactly.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; the message has the first names.
    """
    missing = sorted(set(expected) - set(tensors))
    unknown = unknown + sorted(set(tensors) - set(expected))
    mismatched = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    groups = {"missing": missing, "unknown": unknown, "of another shape": mismatched}
    parts = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in groups.items() if names]
    if parts:
        raise CheckpointError(f"{source}: its tensors do not match the detector: {'; '.join(parts)}")


def export(source: Path, target: Path) -> int:
    """Write a weights file of this project as a checkpoint with official names, and return the number of tensors.

    Raises:
        CheckpointError: `source` is not a weights file of this project, or has parts that the official model lacks.
    """
    weights = load_weights(source)
    tensors, unknown = to_official(weights.tensors)
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} tensors have no official name ({', '.join(unknown[:3])}). Only detectors of the "
            "released architecture can be converted."
        )
    recognize(tensors, str(source))  # raises if the result could not be converted back
    meta: dict[str, Any] = {"CLASSES": tuple(weights.classes)}
    if isinstance(weights.extra.get("epoch"), int):
        meta["epoch"] = weights.extra["epoch"]
    content = io.BytesIO()  # in memory first: torch.save to a file hides the error of a full disk
    torch.save({"meta": meta, "state_dict": tensors}, content)
    write_file(target, lambda file: file.write(content.getbuffer()))
    return len(tensors)
