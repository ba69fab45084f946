"""Convert an official checkpoint to a weights file and back; all tensors are checked before a file is written.

Settings that the tensors do not show are those of the released configs: eight attention heads, GroupNorm with 32
groups, and the Bucketed Rank & Sort loss if the RoI classifier has no background column. How a Co-DINO was trained is
in `released.py`.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from brs_detr import config as configuration
from brs_detr.checkpoints.architecture import EVA_PART, HEADS, Architecture, name_classes, recognize
from brs_detr.checkpoints.keys import original_swin, rotation_tables, to_official, to_ours, why_dropped
from brs_detr.checkpoints.released import (
    FINE_TUNED_DETECTIONS,
    Augmentation,
    ReleasedRecipe,
    trained_settings,
    training_of,
)
from brs_detr.config_io import merge
from brs_detr.engine.checkpoint import Weights, load_weights
from brs_detr.engine.storage import write_file
from brs_detr.exit_codes import CheckpointError
from brs_detr.models.backbones.weights_io import OfficialFile
from brs_detr.models.build import build_model
from brs_detr.models.model_config import ModelConfig

LARGE_QUERIES = 900
DINO_DETECTIONS = 300


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
        training: what the tensors do not show; None: they show everything.
    """

    architecture: Architecture
    matched: int
    numbers: int
    dropped: dict[str, list[str]]
    ours_alone: list[str]
    classes: str
    training: ReleasedRecipe | None = None

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
        if self.training is not None:
            lines.append(f"augmentation: {self.training}")
        return "\n".join([*lines, f"classes: {self.classes}"])


def settings_of(architecture: Architecture) -> dict[str, Any]:
    """Build the config of an architecture, for `config.from_dict`, as differences from the R50 BRS-DETR defaults.

    A Co-DINO is taken for one trained with DETR's augmentation, as the tensors do not show it.
    """
    swin, dino = architecture.backbone.startswith("swin"), architecture.dino
    names = ("dim", "levels", "points", "encoder_layers", "decoder_layers", "ffn_dim", "queries")
    model: dict[str, Any] = {name: getattr(architecture, name) for name in names}
    model |= {
        "heads": HEADS,
        "detections_per_image": 300 if architecture.queries >= LARGE_QUERIES else 100,
        "backbone": {
            "name": architecture.backbone,
            "drop_path": architecture.drop_path,
            "frozen_stages": 0 if swin or architecture.windows else 1,
        },
        "roi": {"fc_dim": architecture.fc_dim},
        "atss": {"centerness": architecture.centerness, "stacked_convs": architecture.stacked_convs},
    }
    train: dict[str, Any] = {}
    optim: dict[str, Any] = {"weight_decay": 0.05 if swin and not dino else 1e-4}
    evaluation: dict[str, Any] = {"predict_with": "decoder"}  # as the released models, whose other heads are auxiliary
    if dino or architecture.softmax:
        train = {"lr_steps": [11], "lr_gamma": 0.1}
    if dino:
        model["name"] = "co_dino" if architecture.softmax else "brs_dino"  # whose own defaults are the released ones
        model["detections_per_image"] = evaluation["max_detections"] = DINO_DETECTIONS
        if not architecture.denoising:
            model["denoising"] = {"loss": "none"}
        optim["sampling_offsets_lr_factor"] = 1.0
        evaluation["nms"] = {"kind": "soft", "iou": 0.8}
        if not architecture.softmax:
            evaluation["nms"]["min_score"] = 0.0  # ranking losses give scores no scale, so none is too low to keep
    elif architecture.softmax:
        model["name"] = "co_detr"  # likewise
    # antialias: the released weights were trained on images downscaled without a low-pass filter
    settings = {"data": {"antialias": False}, "model": model, "optim": optim, "train": train, "eval": evaluation}
    if architecture.windows is not None:
        merge(settings, vit_settings(architecture, *architecture.windows))
    return settings


def vit_settings(architecture: Architecture, window: int, global_every: int) -> dict[str, Any]:
    """Build what a ViT-L adds to the settings of a Co-DINO, for `merge`."""
    roi: dict[str, Any] = {"stacked_convs": architecture.roi_convs, "class_agnostic": architecture.class_agnostic}
    if architecture.roi_convs:
        roi["coder_stds"] = [0.05, 0.05, 0.1, 0.1]
    model: dict[str, Any] = {
        "backbone": {"levels": [4, 8, 16, 32, 64], "window_size": window, "global_every": global_every},
        "roi": roi,
        "detections_per_image": FINE_TUNED_DETECTIONS,
    }
    if architecture.denoising:
        model["denoising"] = {"queries": 300, "box_noise": 0.4}
    return {
        "model": model,
        "optim": {"lr": 5e-5, "weight_decay": 0.01, "backbone_lr_factor": 1.0, "backbone_layer_decay": 0.8},
        "train": {"lr_steps": [7], "warmup_steps": 500, "warmup_start": 0.01, "ema_decay": 0.9999},
        "eval": {"max_detections": FINE_TUNED_DETECTIONS},
    }


def expected_shapes(settings: ModelConfig, num_classes: int) -> dict[str, Size]:
    """Return name and shape of every tensor of a config's detector, without allocating memory for it."""
    # freezing batch normalization reads values, which tensors on the meta device do not have
    backbone = dataclasses.replace(settings.backbone, pretrained=False, checkpoint=None, norm="batch")
    with torch.device("meta"):
        model = build_model(dataclasses.replace(settings, backbone=backbone), num_classes)
    return {
        name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")
    }


def from_official(
    file: OfficialFile,
    source: str,
    json_path: Path | None = None,
    augmentation: Augmentation | None = None,
    canvas: int | None = None,
    *,
    names_required: bool = True,
) -> tuple[Weights, Report]:
    """Convert an official checkpoint to weights of this project.

    Args:
        file: content of the checkpoint, from `read_official`.
        source: its path, for messages.
        json_path: annotations that name the classes if the file does not.
        augmentation: of a Co-DINO's training, if its name does not say it.
        canvas: side in pixels of its canvas, if it was trained with LSJ; None: that of the released models.
        names_required: refuse classes without names.

    Raises:
        CheckpointError: the architecture is another one, tensors are missing or unexpected, classes have no names, or
            the augmentation is not known.
    """
    official = original_swin(file.tensors)
    architecture = recognize(official, source)
    classes = name_classes(architecture.num_classes, file.meta, json_path, source, required=names_required)
    settings = settings_of(architecture)
    dropped: dict[str, list[str]] = {}
    for name in official:
        if why := why_dropped(name):
            dropped.setdefault(why, []).append(name)
    tensors, unknown = to_ours({name: value for name, value in official.items() if not why_dropped(name)})
    expected = expected_shapes(configuration.from_dict(settings, source).model, architecture.num_classes)
    require_same(tensors, unknown, expected, source)
    if training := training_of(architecture, source, augmentation, canvas):
        merge(settings, trained_settings(training))
    config = configuration.to_dict(configuration.from_dict(settings, source))
    tensors = {name: tensors[name] for name in expected}  # in the order of the model, as trained weights are saved
    epoch = file.meta.get("epoch")
    extra = {"converted_from": Path(source).name} | ({"epoch": epoch} if isinstance(epoch, int) else {})
    weights = Weights(tensors, classes.names, classes.ids, config, extra)
    numbers = sum(value.numel() for value in tensors.values())
    alone = sorted(set(expected) - set(tensors))
    return weights, Report(architecture, len(tensors), numbers, dropped, alone, classes.remark, training)


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


def require_released(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse tensors with official names that could not be converted back.

    Raises:
        CheckpointError: they are of no released architecture.
    """
    architecture = recognize(tensors, str(source))
    settings = configuration.from_dict(settings_of(architecture), str(source)).model
    ours, unknown = to_ours({name: value for name, value in tensors.items() if not why_dropped(name)})
    try:
        require_same(ours, unknown, expected_shapes(settings, architecture.num_classes), str(source))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Only detectors of the released architecture can be converted; this one is nearest to "
            f"{architecture.family}."
        ) from None


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
    if EVA_PART in tensors:
        settings = configuration.from_dict(weights.config, str(source))
        tensors |= rotation_tables(tensors, settings.model.backbone, settings.data.test_canvas)
    require_released(tensors, source)
    meta: dict[str, Any] = {"CLASSES": tuple(weights.classes)}
    if isinstance(weights.extra.get("epoch"), int):
        meta["epoch"] = weights.extra["epoch"]
    content = io.BytesIO()  # in memory first: torch.save to a file hides the error of a full disk
    torch.save({"meta": meta, "state_dict": tensors}, content)
    write_file(target, lambda file: file.write(content.getbuffer()))
    return len(tensors)
