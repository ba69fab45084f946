"""The `check-data` command: check the dataset of a COCO json, or the training and validation sets of a config."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from brs_detr.commands.anchor_report import describe_anchors
from brs_detr.commands.first_recipe import Dataset, first_recipe
from brs_detr.config import Config, ConfigError, apply_overrides, load_config
from brs_detr.data import check
from brs_detr.data.anchor_fit import boxes_of
from brs_detr.data.build import build_eval_transforms, build_train_transforms
from brs_detr.data.check import Source
from brs_detr.data.coco import CocoDetection
from brs_detr.data.config import Limits
from brs_detr.data.image_search import usual_folder
from brs_detr.data.issues import DataError
from brs_detr.recipes import ENDINGS, find_recipe
from brs_detr.user_files import printable


def run(options: argparse.Namespace) -> int:
    """Check a json, or the training and validation sets of a config, and return the exit code."""
    target = Path(options.target)
    if target.is_dir():
        raise ConfigError(about_folder(target))
    if not target.suffix and not target.exists():
        options.target = str(find_recipe(target))
    if Path(options.target).suffix in ENDINGS:
        config = load_config(options.target, options.overrides)
        return check.run(options, lambda _: sources_of(config), describe=partial(anchors_of, config))
    limits = apply_overrides(Config(), options.overrides).data
    return check.run(options, limits=limits, describe=recipe_for)


def anchors_of(config: Config, dataset: CocoDetection) -> str:
    """Describe how well the anchors of a recipe fit its training set."""
    return describe_anchors(config, boxes_of(dataset.packed))


def recipe_for(dataset: CocoDetection) -> str:
    """Describe the recipe to start from with a json, and the command line that trains it."""
    root, annotations = os.path.abspath(dataset.image_dir), Path(dataset.json_path).absolute()
    if held_out(annotations.name):
        return "this looks like a validation set; check the training set for the recipe to start from"
    paths = {"data.root": root, "data.train_json": str(annotations), "data.train_images": "."}
    val, notes = validation_of(annotations, dataset.limits), []
    if val is None:
        val = ("VAL.json", "VAL_IMAGES")
        notes = ["no validation json was found beside it: replace VAL.json and VAL_IMAGES by yours"]
    paths |= {"data.val_json": val[0], "data.val_images": val[1]}
    packed = dataset.packed
    fullest = int(np.diff(packed.offsets).max(initial=0))
    return "\n".join([first_recipe(Dataset(boxes_of(packed), len(packed), fullest, paths)), *notes])


def held_out(name: str) -> bool:
    """Check whether the name of a json says that it is not to be trained on."""
    words = re.split(r"[^a-z]+", name.lower())
    return "train" not in name.lower() and not {"val", "valid", "validation", "test"}.isdisjoint(words)


def validation_of(train: Path, limits: Limits) -> tuple[str, str] | None:
    """Find the validation json beside that of training, by its name, and its images: absolute paths."""
    for word in ("val", "valid", "validation", "test"):
        path = train.with_name(train.name.replace("train", word))
        if "train" in train.name and path.is_file():
            with contextlib.suppress(DataError):  # its images may be anywhere: then it is left to the user
                return str(path), os.path.abspath(usual_folder(path, check.file_names(path, limits)))
    return None


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


def sources_of(config: Config) -> list[Source]:
    """Return the datasets of a config, with the transforms that training and validation use."""
    root, data = Path(config.data.root), config.data
    train = (str(root / data.train_json), str(root / data.train_images))
    val = (str(root / data.val_json), str(root / data.val_images))
    limits = {"limits": config.data, "masks": config.model.has_masks}
    train_options = {"keep_empty": data.keep_empty, "min_side": data.min_side, **limits}
    return [
        Source(*train, build_train_transforms(config.data), options=train_options),
        Source(*val, build_eval_transforms(config.data), train=False, options=limits),
    ]
