"""Quick checks of the files that a run reads, before torch is imported and any device is started."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from brs_detr.config import Config, ConfigError, apply_overrides, check_overrides, dataset_overrides
from brs_detr.data.layouts import recognize
from brs_detr.hub.sources import local_path, require_source
from brs_detr.user_files import is_missing

OTHERS = {
    ".json": "this is a json, not a weights file. Give a run folder, a .safetensors or an official .pth.",
    ".yaml": "this is a recipe, not a weights file. Give a run folder, a .safetensors or an official .pth.",
    ".onnx": "this is an exported file, not a weights file. Give the weights that it was made from.",
}
"""What the user has probably mixed up, by the ending of a file."""
_DEMO = "datasets/demo"  # data.root of configs/demo.yaml


def require_training_inputs(config: Config, is_trial: bool = False) -> None:
    """Refuse a training whose annotation files or weights to start from are missing, or whose backbone cannot learn.

    Args:
        config: of the training.
        is_trial: a few steps to see what they cost; its backbone need not learn.

    Raises:
        ConfigError: naming the file and the setting.
        DataError: `data.source` is no dataset.
    """
    data, train, backbone = config.data, config.train, config.model.backbone
    splits = ["train"] if train.overfit_batches is not None else ["train", "val"]
    if data.source is not None:
        recognize(data.source)
        splits = []
    for split in splits:
        path = Path(data.root, getattr(data, f"{split}_json"))
        if is_missing(path):
            make = f", or make it with `brs-detr make-dataset {_DEMO}`" if data.root == _DEMO else ""
            raise ConfigError(
                f"{path}: this annotation file does not exist. Set data.root and data.{split}_json{make}."
            )
        if path.is_dir():
            raise ConfigError(
                f"{path}: this is a folder, not an annotation file. Set data.{split}_json to a COCO json."
            )
    if train.resume:  # a saved state is read instead, if there is one
        return
    if backbone.checkpoint is not None and is_missing(Path(backbone.checkpoint)):
        raise ConfigError(f"model.backbone.checkpoint: there is no file {backbone.checkpoint}")
    if train.init_from is not None:
        require_source(train.init_from, "train.init_from=")
        if advice := OTHERS.get(Path(train.init_from).suffix.lower()):
            raise ConfigError(f"train.init_from={train.init_from}: {advice}")
        local_path(train.init_from)  # downloads a name at its first use
    if not is_trial:
        require_learning_backbone(config)


def require_evaluation_inputs(weights: Path, overrides: Sequence[str]) -> None:
    """Refuse an evaluation of weights that do not exist, or with settings or a dataset that cannot be used.

    Args:
        weights: as the user gives them.
        overrides: `a.b=value`; whether they fit, the stored config has to say.

    Raises:
        SourceError: there are no such weights.
        ConfigError: a setting, or a file of torch.export.
        DataError: `data=` is no dataset.
    """
    require_source(weights)
    if weights.suffix == ".pt2":
        raise ConfigError(f"{weights}: a file of torch.export is not evaluated. Give its weights, or an .onnx.")
    check_overrides(overrides)
    source = apply_overrides(Config(), dataset_overrides(overrides)).data.source
    if source is not None:
        recognize(source)


def ordered_scores(scores: Iterable[float]) -> tuple[float, ...]:
    """Return score thresholds in ascending order, each once.

    Raises:
        ConfigError: one is not in [0, 1).
    """
    ordered = tuple(sorted(set(scores)))
    if not all(0 <= score < 1 for score in ordered):  # a NaN compares as False
        raise ConfigError(f"score_thresholds={list(ordered)}: not all lie in [0, 1). Give scores such as [0.001, 0.5].")
    return ordered


def require_learning_backbone(config: Config) -> None:
    """Refuse to start a training from a random backbone with frozen norms or stages, which would stay random.

    Raises:
        ConfigError: naming the settings to change.
    """
    if not is_random_and_frozen(config):
        return
    backbone = config.model.backbone
    frozen = ["model.backbone.norm=frozen"] if backbone.norm == "frozen" else []
    frozen += [f"model.backbone.frozen_stages={backbone.frozen_stages}"] if backbone.frozen_stages else []
    raise ConfigError(
        f"model.backbone.pretrained=false: its weights are random, and {' and '.join(frozen)} would keep part of them "
        "so. Set model.backbone.norm=batch (or group) and model.backbone.frozen_stages=0, or give it weights: "
        "model.backbone.pretrained=true, model.backbone.checkpoint=FILE or train.init_from=FILE. The recipe "
        "brs_detr_small_cpu starts from random weights."
    )


def is_random_and_frozen(config: Config) -> bool:
    """Check whether a fresh start would have a random backbone of which norms or stages are frozen."""
    backbone = config.model.backbone
    is_random = not (backbone.pretrained or backbone.checkpoint or config.train.init_from)
    return is_random and (backbone.norm == "frozen" or backbone.frozen_stages > 0)
