"""The `check-data` command: check the dataset of a COCO json, or the training and validation sets of a config."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from brs_detr.config import Config, apply_overrides, load_config
from brs_detr.data import check
from brs_detr.data.check import Source
from brs_detr.run.setup import limits_of, train_transforms, val_transforms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check-data`."""
    check.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", help="settings to change, e.g. data.root=/data/coco")


def run(options: argparse.Namespace) -> int:
    """Check a json, or the training and validation sets of a config, and return the exit code."""
    limits = None
    if Path(options.target).suffix not in (".yaml", ".yml"):
        limits = limits_of(apply_overrides(Config(), options.overrides))
    return check.run(options, partial(sources_of, overrides=options.overrides), limits)


def sources_of(recipe: str, overrides: list[str]) -> list[Source]:
    """Return the datasets of a config, with the transforms that training and validation use."""
    config: Config = load_config(recipe, overrides)
    root, data = Path(config.data.root), config.data
    train = (str(root / data.train_json), str(root / data.train_images))
    val = (str(root / data.val_json), str(root / data.val_images))
    limits = {"limits": limits_of(config)}
    train_options = {"keep_empty": data.keep_empty, "min_side": data.min_side, **limits}
    return [
        Source(*train, train_transforms(config), options=train_options),
        Source(*val, val_transforms(config), train=False, options=limits),
    ]
