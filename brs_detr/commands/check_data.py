"""The `check-data` command: check the dataset of a COCO json, or the training and validation sets of a config."""

from __future__ import annotations

import argparse
from functools import partial
from itertools import islice
from pathlib import Path

from brs_detr.config import Config, ConfigError, apply_overrides, load_config
from brs_detr.data import check
from brs_detr.data.build import build_eval_transforms, build_train_transforms
from brs_detr.data.check import Source
from brs_detr.recipes import ENDINGS, find_recipe
from brs_detr.user_files import printable


def run(options: argparse.Namespace) -> int:
    """Check a json, or the training and validation sets of a config, and return the exit code."""
    limits, target = None, Path(options.target)
    if target.is_dir():
        raise ConfigError(about_folder(target))
    if not target.suffix and not target.exists():
        options.target = str(find_recipe(target))
    if Path(options.target).suffix not in ENDINGS:
        limits = apply_overrides(Config(), options.overrides).data
    return check.run(options, partial(sources_of, overrides=options.overrides), limits)


def about_folder(folder: Path) -> str:
    """Say what to write instead of a folder: the json in it, the conversion of another format, or a recipe."""
    jsons = sorted(
        path for pattern in ("*.json", "*/*.json", "*/*.json.gz") for path in islice(folder.glob(pattern), 99)
    )
    if jsons:
        shown = ", ".join(printable(path) for path in jsons[:3]) + (", ..." if len(jsons) > 3 else "")
        return f"{folder}: this is a folder. Name an annotation file (there is {shown}), its images with --images."
    formats = {"voc": ("Annotations", "*.xml", "*/*.xml"), "yolo": ("labels", "data.yaml", "*/labels", "obj.data")}
    for name, patterns in formats.items():
        if any(next(folder.glob(pattern), None) for pattern in patterns):
            return (
                f"{folder}: this is a folder, perhaps of a {name.upper()} dataset. Convert it first: "
                f"`brs-detr convert-dataset {name} {folder} OUT`"
            )
    return f"{folder}: this is a folder. Name the annotation file (COCO json) and give this folder with --images."


def sources_of(recipe: str, overrides: list[str]) -> list[Source]:
    """Return the datasets of a config, with the transforms that training and validation use."""
    config: Config = load_config(recipe, overrides)
    root, data = Path(config.data.root), config.data
    train = (str(root / data.train_json), str(root / data.train_images))
    val = (str(root / data.val_json), str(root / data.val_images))
    limits = {"limits": config.data, "masks": config.model.has_masks}
    train_options = {"keep_empty": data.keep_empty, "min_side": data.min_side, **limits}
    return [
        Source(*train, build_train_transforms(config.data), options=train_options),
        Source(*val, build_eval_transforms(config.data), train=False, options=limits),
    ]
