"""From an official checkpoint to a weights file of ours and back, every tensor checked before anything is written."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Size, Tensor

from brs_detr import config as configuration
from brs_detr.checkpoints.architecture import Architecture, name_classes, recognize, settings_of
from brs_detr.checkpoints.keys import to_official, to_ours, why_dropped
from brs_detr.config import ModelConfig
from brs_detr.engine.checkpoint import CheckpointError, Weights, load_weights
from brs_detr.engine.storage import write_file
from brs_detr.models.backbones.weights_io import OfficialFile
from brs_detr.models.build import build_model


@dataclass(frozen=True)
class Report:
    """What became of the tensors.

    Attributes:
        architecture: what was recognized.
        matched: number of tensors carried over; numbers: how many numbers they hold.
        dropped: why -> official names.
        ours_alone: our names without an official tensor (there are none in a complete file).
        classes: where the names of the classes come from.
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
            f"matched: {self.matched} tensors with {self.numbers:,} numbers",
            f"ours alone: {', '.join(self.ours_alone) or 'none'}",
        ]
        for why, names in self.dropped.items():
            lines.append(f"dropped: {len(names)} tensors such as {names[0]}: {why}")
        if not self.dropped:
            lines.append("dropped: none")
        return "\n".join([*lines, f"classes: {self.classes}"])


def expected_shapes(settings: ModelConfig, num_classes: int) -> dict[str, Size]:
    """Name and shape of every tensor of the detector that a recipe builds, without the memory for it."""
    # freezing batch normalization looks at values, which a tensor on the meta device lacks
    backbone = dataclasses.replace(settings.backbone, pretrained=False, checkpoint=None, norm="batch")
    with torch.device("meta"):
        model = build_model(dataclasses.replace(settings, backbone=backbone), num_classes)
    return {
        name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")
    }


def from_official(file: OfficialFile, source: str, json_path: Path | None = None) -> tuple[Weights, Report]:
    """Our weights from an official checkpoint.

    Args:
        file: of `read_official`.
        source: its path, for messages.
        json_path: annotations that name the classes, where the file does not.

    Raises:
        CheckpointError: another architecture, missing or odd tensors, classes without names.
    """
    found = recognize(file.tensors, source)
    classes = name_classes(found.num_classes, file.meta, json_path, source)
    config = configuration.from_dict(settings_of(found), source)
    dropped: dict[str, list[str]] = {}
    for name in file.tensors:
        if why := why_dropped(name):
            dropped.setdefault(why, []).append(name)
    tensors, unknown = to_ours({name: value for name, value in file.tensors.items() if not why_dropped(name)})
    expected = expected_shapes(config.model, found.num_classes)
    require_same(tensors, unknown, expected, source)
    tensors = {name: tensors[name] for name in expected}
    epoch = file.meta.get("epoch")
    extra = {"converted_from": Path(source).name} | ({"epoch": epoch} if isinstance(epoch, int) else {})
    weights = Weights(tensors, classes.names, classes.ids, configuration.to_dict(config), extra)
    numbers = sum(value.numel() for value in tensors.values())
    alone = sorted(set(expected) - set(tensors))
    return weights, Report(found, len(tensors), numbers, dropped, alone, classes.remark)


def require_same(tensors: dict[str, Tensor], unknown: list[str], expected: dict[str, Size], source: str) -> None:
    """Refuse a state dict that does not fill the detector exactly.

    Raises:
        CheckpointError: with the first names of what is missing, unknown or of another shape.
    """
    missing = sorted(set(expected) - set(tensors))
    unknown = unknown + sorted(set(tensors) - set(expected))
    odd = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    faults = {"missing": missing, "unknown": unknown, "of another shape": odd}
    told = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in faults.items() if names]
    if told:
        raise CheckpointError(f"{source}: does not fill the detector that it names: {'; '.join(told)} tensors")


def export(source: Path, target: Path) -> int:
    """Write a weights file of ours as a checkpoint with official names; returns the number of tensors.

    Raises:
        CheckpointError: `source` is no weights file of ours, or has parts that the official model lacks.
    """
    weights = load_weights(source)
    tensors, unknown = to_official(weights.tensors)
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} tensors have no official name ({', '.join(unknown[:3])}); only detectors of the "
            "released architecture can be written so"
        )
    recognize(tensors, str(source))
    meta = {"CLASSES": tuple(weights.classes)}
    if isinstance(weights.extra.get("epoch"), int):
        meta["epoch"] = weights.extra["epoch"]
    content = io.BytesIO()  # written to a file, torch hides why the disk has refused
    torch.save({"meta": meta, "state_dict": tensors}, content)
    write_file(target, lambda file: file.write(content.getbuffer()))
    return len(tensors)
