"""Datasets, detector, weights, optimizer and schedule from a config: what training, evaluation and commands share."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from brs_detr import config as configuration
from brs_detr.config import Config, ConfigError
from brs_detr.config_io import leaves
from brs_detr.data.build import build_eval_transforms, build_train_transforms
from brs_detr.data.coco import CocoDetection
from brs_detr.data.config import LSJConfig
from brs_detr.data.shared_memory import shortage
from brs_detr.engine.batch_plan import FEW_STEPS, BatchPlan, TrainingLength, split_batch_size
from brs_detr.engine.checkpoint import (
    Transfer,
    Weights,
    load_matching,
    rows_per_class,
)
from brs_detr.engine.optim import count_parameters
from brs_detr.evaluation.calibration import Calibration
from brs_detr.models.backbones.timm_backbone import plain_name
from brs_detr.models.build import build_model, sampling_here
from brs_detr.models.config import BRSDINOConfig
from brs_detr.models.detector import Detector
from brs_detr.models.ensemble import Ensemble
from brs_detr.models.model_config import ModelConfig
from brs_detr.models.rcnn_config import MaskRCNNConfig
from brs_detr.run.anchors import require_chosen_anchors
from brs_detr.run.dataset import worker_count
from brs_detr.run.inputs import is_random_and_frozen
from brs_detr.run.weights import locate, read

# beginnings of the settings that the figures of a validation depend on
METRIC_SETTINGS = (
    *("model.", "eval.max_detections", "eval.nms", "eval.predict_with", "eval.score_threshold", "eval.test_"),
    *("data.test_", "data.antialias"),
)
# full names of those among them that act in training alone; kernels and layout (channels_last) round differently
TRAINING_SETTINGS = (
    *(f"model.backbone.{name}" for name in ("pretrained", "checkpoint", "frozen_stages", "drop_path")),
    *("model.backbone.activation_checkpointing", "model.backbone.channels_last", "model.deformable_attention"),
    *("model.max_aux_queries", "model.mask.max_masks", "model.atss.topk", "model.head.topk"),
    *(f"model.roi.{name}" for name in ("max_rois", "sample", "add_ground_truth", "low_quality", "min_iou")),
    # validations and evaluations have limits of their own, rpn.test_proposals
    *(f"model.rpn.{name}" for name in ("proposals", "proposals_before_nms", "sample", "allowed_border", "prior")),
)
# parts of the names of further ones, the losses': a resumed run may change them, and the figures of its validations are
# comparable all the same
LOSS_SETTINGS = ("objective.", "matcher.", "denoising.", "loss")
# beginnings of the settings in which a resumed run may differ, since they do not change the training's numbers
FREE_SETTINGS = (
    "output_dir",
    "data.source",
    "data.root",  # its content is compared instead, as are the annotations and the file names of the images
    "data.train_",
    "data.val_",
    "data.workers",
    "data.timeout",
    "data.retry_seconds",
    "data.max_json_bytes",
    "data.allow_outside_images",  # the images it allows are compared with all others
    "train.resume",
    "train.overwrite",
    "train.allow_changes",
    "train.log_every",
    "train.gradient_ratio",
    "train.save_every",
    "train.trackers",
    "train.on_nonfinite",
    "train.max_skipped",
    "eval.batch_size",
    "eval.calibrate",  # the map of scores is fitted and stored either way
    "eval.report",
)


def changes_figures(change: str) -> bool:
    """Return True if a line of `config.differences` is of a setting that the figures of given weights depend on."""
    name = change.partition(":")[0]
    return name.startswith(METRIC_SETTINGS) and name not in TRAINING_SETTINGS


def changes_measure(change: str) -> bool:
    """Return True if a line of `config.differences` makes the figures of a run's validations incomparable."""
    name = change.partition(":")[0]
    return changes_figures(change) and not any(part in name for part in LOSS_SETTINGS)


def changes_training(change: str) -> bool:
    """Return True if a line of `config.differences` is of a setting that the numbers of a training depend on."""
    return not change.startswith(FREE_SETTINGS)


def run_metadata(config: Config, plan: BatchPlan, train_set: CocoDetection, val_set: CocoDetection) -> dict[str, Any]:
    """Collect the metadata stored with every state, with which a resumed run is compared."""
    # Annotations by fingerprint and not by path: the dataset may have moved.
    return {
        "config": configuration.to_dict(without_flags(config)),
        "launch": dataclasses.asdict(plan),
        "data": {"train": train_set.fingerprint(), "val": val_set.fingerprint()},
        "classes": train_set.classes,
    }


def without_flags(config: Config) -> Config:
    """Return the config that a run's files hold: `--resume` and `--overwrite` are of one start, not of those after it.

    A start from the stored file would otherwise remove the run without being asked.
    """
    return dataclasses.replace(config, train=dataclasses.replace(config.train, resume=False, overwrite=False))


def build_detector(config: Config, num_classes: int, *, initial_weights: bool = True) -> Detector:
    """Build the detector, seeded; with `initial_weights=False` without pretrained weights, as others are loaded next.

    Raises:
        ConfigError: the backbone does not exist or does not match the settings, or its weights are not available.
    """
    backbone = config.model.backbone
    if not initial_weights:
        backbone = dataclasses.replace(backbone, pretrained=False, checkpoint=None)
    torch.manual_seed(config.seed)
    try:
        model = build_model(dataclasses.replace(config.model, backbone=backbone), num_classes)
    except (ValueError, RuntimeError, OSError, EOFError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        # Name the setting, unless the reason does.
        subject = "" if "model.backbone" in reason else f"model.backbone.name={backbone.name}: "
        if backbone.checkpoint and backbone.checkpoint not in reason:
            subject = f"model.backbone.checkpoint={backbone.checkpoint}: "
        raise ConfigError(subject + reason) from error
    try:
        model.predict_with, model.nms = config.eval.predict_with, config.eval.nms
        model.test_flip, model.test_scales = config.eval.test_flip, config.eval.test_scales
        model.test_canvas = config.data.test_canvas
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return model


def load_initial_weights(model: Detector, config: Config, classes: Sequence[str]) -> Transfer | None:
    """Load `train.init_from`, if given, into a fresh detector; the weights may be of a run with other classes.

    Returns:
        A report by tensor name; None without `train.init_from`.
    """
    if config.train.init_from is None:
        return None
    weights = read(locate(config.train.init_from), names_required=False)
    rows: dict[str, int] = {}
    own = model.state_dict()
    # Of the same classes, too: softmax has a row of background, and sigmoids have none.
    differ = any(name in own and own[name].shape != tensor.shape for name, tensor in weights.tensors.items())
    if differ or weights.classes != list(classes):
        rows = rows_per_class(model, build_detector(config, len(classes) + 1, initial_weights=False))
    return load_matching(model, weights.tensors, weights.classes, classes, rows, model.objectness, model.by_anchor)


def restore(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[Detector, Weights, Config, Path]:
    """Load the detector of a run folder or weights file, ready to predict.

    Args:
        path: run folder (its best weights, else its last), weights file, official `.pth`, or a name of weights.
        overrides: `a.b=value` applied to the stored config.

    Returns:
        The model in evaluation mode on the CPU, the file's content, the config, and the file's path.

    Raises:
        CheckpointError: there is no usable file.
        SourceError, DownloadError: the name is not known, or its file cannot be downloaded.
        ConfigError: the overrides are invalid, the backbone is not in timm's list, or the weights do not match.
    """
    file = locate(path)
    weights = read(file)
    config = configuration.apply_overrides(configuration.from_dict(weights.config, str(file)), overrides)
    require_chosen_anchors(config, file)
    if not any(text.lstrip("-").startswith("model.backbone.name=") for text in overrides):
        require_known_backbone(config, file)
    model = build_detector(config, len(weights.classes), initial_weights=False)
    own = model.state_dict()
    shapes = {n: (tuple(t.shape), tuple(own[n].shape)) for n, t in weights.tensors.items() if n in own}
    differ = [
        f"{name} {ours} in the file, {theirs} in the model" for name, (ours, theirs) in shapes.items() if ours != theirs
    ]
    if differ:
        raise ConfigError(
            f"{file}: {len(differ)} tensors have another shape than the model's ({'; '.join(differ[:2])}). "
            "Check the overridden model settings."
        )
    missing, unexpected = model.load_state_dict(weights.tensors, strict=False)
    if missing or unexpected:
        raise ConfigError(
            f"{file}: the model has {len(missing)} tensors that the file lacks ({', '.join(missing[:3])} ...), "
            f"the file {len(unexpected)} that the model lacks ({', '.join(unexpected[:3])} ...). "
            "Check the overridden model settings."
        )
    if config.eval.predict_with == "auto":
        model.predict_with = best_head(weights, model.heads, file)
    if model.predict_with == "ensemble":
        model.ensemble = stored_ensemble(weights, model.heads, file)
    return model.eval(), weights, config, file


def best_head(weights: Weights, heads: tuple[str, ...], file: Path) -> str:
    """Return the head that was the best one in the validation of the weights; "auto" where it did not compare heads.

    Raises:
        ConfigError: what it learned of the heads is damaged.
    """
    chosen = weights.extra.get("predict_with")
    if chosen == "ensemble":  # the training measured all heads joined; `auto` asks for one
        return next(iter(stored_ensemble(weights, heads, file).ap))
    return chosen if chosen in heads else "auto"


def stored_ensemble(weights: Weights, heads: tuple[str, ...], file: Path) -> Ensemble:
    """Read what the validation of the weights learned of the heads.

    Raises:
        ConfigError: no validation scored all heads, or what it learned is damaged.
    """
    if "ensemble" not in weights.extra:
        raise ConfigError(
            f"{file}: eval.predict_with=ensemble needs weights whose validation scored all heads. Train with "
            f"eval.predict_with=auto or ensemble, or use one of {', '.join(heads)}."
        )
    try:
        return Ensemble.restore(weights.extra["ensemble"], heads)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}. Use one of {', '.join(heads)} as eval.predict_with.") from None


def stored_calibrations(weights: Weights, file: Path) -> dict[str, Calibration]:
    """Read the maps of scores to precision that a validation has stored with its weights, by head; none if it did not.

    Raises:
        ConfigError: they are damaged.
    """
    stored = weights.extra.get("calibration", {})
    try:
        if not isinstance(stored, dict):
            raise ValueError("the calibration is not one of this program")
        return {head: Calibration.from_dict(content, len(weights.classes)) for head, content in stored.items()}
    except ValueError as error:
        raise ConfigError(f"{file}: {error}. Use raw scores: eval.calibrate=false.") from None


def calibration_of(model: Detector, weights: Weights, config: Config, file: Path) -> tuple[Calibration | None, str]:
    """Choose the map for the head that predicts; with None, the second value says why scores are not calibrated."""
    if not config.eval.calibrate:
        return None, "scores are raw, as eval.calibrate=false asks"
    if found := stored_calibrations(weights, file).get(model.predict_with):
        return found, ""
    return None, (
        f"scores are not calibrated: {file} holds no map for head {model.predict_with}. Compare them with each other "
        "only; a validation with enough true positives stores the map"
    )


def unused_nms(model: Detector, config: Config) -> str:
    """Say that `eval.nms` has no effect on the head that predicts; "" where it has, or is none."""
    kind, head = config.eval.nms.kind, model.predict_with
    if kind == "none" or head not in model.heads or head in model.overlapping or config.eval.joins_views:
        return ""
    others = " or ".join(model.overlapping)
    return (
        f"eval.nms.kind={kind}: has no effect on head {head}, which suppresses by model.{head}.nms_iou. Set that, or "
        f"eval.predict_with={others}."
    )


def require_known_backbone(config: Config, file: Path) -> None:
    """Raise if the config in a weights file names a backbone outside timm's list: it could be anyone's.

    Raises:
        ConfigError: the name is of a hub or a folder.
    """
    name = config.model.backbone.name
    if ":" in name:
        raise ConfigError(
            f"{file}: its backbone {name} is looked up elsewhere, which a weights file must not request. Add timm's "
            "name of the network, e.g. model.backbone.name=resnet50."
        )


def for_weights_file(config: Config) -> Config:
    """Return the config to store in a weights file, with timm's own name of the backbone: it needs no look-up."""
    config, backbone = without_flags(config), config.model.backbone
    try:
        backbone = dataclasses.replace(backbone, name=plain_name(backbone.name))
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"model.backbone.name={backbone.name}: {' '.join(str(error).split())}") from error
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))


def describe_length(config: Config, length: TrainingLength) -> str:
    """Describe the length in a line for the log, with a warning if there are too few steps to learn anything."""
    if length.steps >= FEW_STEPS or config.train.overfit_batches is not None:
        return str(length)
    return (
        f"{length}\nwarning: {length.steps} optimizer steps is very short; detectors usually need thousands. "
        f"Raise train.epochs={length.epochs}, or use train.steps=5000 train.schedule=cosine train.eval_every=null."
    )


def freeze(model: nn.Module, config: Config) -> None:
    """Freeze the parameters whose names begin with an entry of `train.freeze`.

    Raises:
        ConfigError: an entry matches no parameter.
    """
    for prefix in config.train.freeze:
        parts = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not parts:
            known = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(f"train.freeze: no parameter's name begins with {prefix}; the parts are {known}.")
        for parameter in parts:
            parameter.requires_grad_(False)


def plan_batches(config: Config, accelerator: Accelerator, chosen: int | None = None) -> BatchPlan:
    """Split the total batch over the processes of the launch.

    Args:
        config: of the run.
        accelerator: of the launch.
        chosen: images of a process at once where the config says auto; None: not yet known, as many as there are.

    Raises:
        ConfigError: it cannot be split evenly.
    """
    most = config.train.per_device_batch_size
    try:
        return split_batch_size(
            config.train.total_batch_size, chosen if most == "auto" else most, accelerator.num_processes
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def shared_memory_warning(
    config: Config, plan: BatchPlan, train_set: CocoDetection, val_set: CocoDetection
) -> str | None:
    """Return a warning if this machine has less shared memory than the loader workers may need, else None."""
    shape = largest_shape(config, plan, train_set)
    resize = build_eval_transforms(config.data, config.eval.test_scales)
    # of an image all scales are in its batch
    resized = [sum(map(math.prod, resize.output_sizes(h, w))) for h, w in np.unique(val_set.packed.image_sizes, axis=0)]
    # In bytes: images reach the main process as uint8 RGB, and in training with a bitmap of each object.
    fullest = np.sort(np.diff(train_set.packed.offsets))[-shape["batch_size"] :].sum() if shape["masks"] else 0
    batches = (
        (3 * shape["batch_size"] + int(fullest)) * math.prod(shape["size"]),
        3 * config.eval.batch_size * max(resized),
    )
    return shortage(worker_count(config), max(batches), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def largest_shape(config: Config, plan: BatchPlan, dataset: CocoDetection) -> dict[str, Any]:
    """Compute the arguments of `largest_step`: the largest batch of the augmentation, with the most objects.

    A single image uses its own maximum size; a batch is padded to the largest height and width.
    """
    transforms = build_train_transforms(config.data)
    image_sizes = np.unique(dataset.packed.image_sizes, axis=0).tolist()
    sizes = sorted({size for size_hw in image_sizes for size in transforms.largest_sizes(*size_hw)})
    largest = max(sizes, key=math.prod)
    if plan.per_device > 1 and len(dataset) > 1:
        largest = (max(h for h, _ in sizes), max(w for _, w in sizes))
    most, augment = int(np.diff(dataset.packed.offsets).max()), config.data.augment
    pasted = augment.max_pasted if isinstance(augment, LSJConfig) and dataset.masks else 0
    return {
        "batch_size": plan.per_device,
        "accumulate": plan.accumulate,
        "size": largest,
        "num_objects": most + min(most, pasted),
        "num_classes": dataset.num_classes,
        "masks": config.model.has_masks,
    }


def describe_model(config: Config, model: nn.Module, transfer: Transfer | None) -> list[str]:
    """Describe the model in lines for the log: size, what was loaded, warnings of frozen parts without weights."""
    total, trainable = count_parameters(model)
    lines = [f"{describe_detector(config.model)}: {total:,} parameters, {trainable:,} trained"]
    if transfer is not None:
        lines.append(f"{config.train.init_from}: {transfer}")
    backbone = config.model.backbone
    if is_random_and_frozen(config):  # a trial, or a run of before such starts were refused
        lines.append(
            "warning: parts of the random backbone are frozen and will not learn. A training is not started so."
        )
    # Weights of a classifier have no offsets, only those of a detector may.
    if min(backbone.deformable_stages, default=math.inf) <= backbone.frozen_stages and transfer is None:
        lines.append(
            f"warning: model.backbone.deformable_stages={list(backbone.deformable_stages)} includes frozen stages, "
            "whose offsets stay at zero and masks at 0.5. Leave them out, or lower model.backbone.frozen_stages."
        )
    return lines


def describe_detector(config: ModelConfig) -> str:
    """Describe a detector's name, losses and, where it has any, implementation of deformable attention."""
    losses = dict.fromkeys(value for name, value in leaves(config) if name.endswith("objective.loss"))
    text = f"{config.name} with loss {', '.join(losses)}"
    if isinstance(config, MaskRCNNConfig):
        text += f", masks by {config.mask.resolved(config.roi.objective).loss}"
    if isinstance(config, BRSDINOConfig):
        text += f", denoising queries by {config.denoising.loss}"
    attention = getattr(config, "deformable_attention", None)
    return text if attention is None else f"{text}, deformable attention by {sampling_here(attention)}"
