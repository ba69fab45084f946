"""Quick checks of the files that a run reads, before torch is imported and any device is started."""

from __future__ import annotations

import os
from pathlib import Path

from brs_detr.config import Config, ConfigError

_DEMO = "datasets/demo"  # data.root of configs/demo.yaml


def require_training_inputs(config: Config) -> None:
    """Refuse a training whose annotation files or weights to start from are missing.

    Raises:
        ConfigError: naming the file and the setting.
    """
    data, train, backbone = config.data, config.train, config.model.backbone
    splits = ("train",) if train.overfit_batches is not None else ("train", "val")
    for split in splits:
        path = Path(data.root, getattr(data, f"{split}_json"))
        if _is_missing(path):
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
    if backbone.checkpoint is not None and _is_missing(Path(backbone.checkpoint)):
        raise ConfigError(f"model.backbone.checkpoint: there is no file {backbone.checkpoint}")
    if train.init_from is not None:
        require_weights(Path(train.init_from), "train.init_from=")


def require_weights(path: Path, setting: str = "") -> None:
    """Refuse a path of weights where nothing is.

    Args:
        path: of a run folder or weights file.
        setting: beginning of the error, for a path that a setting gives.

    Raises:
        ConfigError: naming the path.
    """
    if _is_missing(path):
        raise ConfigError(
            f"{setting}{path}: neither a weights file nor a run folder with best.safetensors or last.safetensors"
        )


def _is_missing(path: Path) -> bool:
    """Check that a path does not exist; one that cannot be looked at is left to the reader, who says why."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False
