"""The `check-data` command: check the dataset of a COCO json, or the training and validation sets of a config."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from brs_detr.commands.anchor_report import describe_anchors
from brs_detr.commands.arguments import dataset_setting
from brs_detr.commands.first_recipe import Dataset, Surroundings, choose_recipe, first_recipe, look_around
from brs_detr.config import Config, ConfigError, apply_overrides, load_config, override_names
from brs_detr.config_io import leaves
from brs_detr.data import check
from brs_detr.data.anchor_fit import boxes_of
from brs_detr.data.build import build_eval_transforms, build_train_transforms, masks_to_read
from brs_detr.data.check import Source, source_of_json
from brs_detr.data.coco import CocoDetection
from brs_detr.data.config import DataConfig, Limits
from brs_detr.data.dataset_source import open_source
from brs_detr.data.image_search import usual_folder
from brs_detr.data.issues import DataError
from brs_detr.data.layouts import is_yolo_yaml, recognize
from brs_detr.data.transforms import EvalTransforms
from brs_detr.recipes import ENDINGS, find_recipe

CANNOT_BE_DIVIDED = (
    "no validation set was found, and one image with objects cannot be divided: annotate more images for a command"
)


def run(options: argparse.Namespace) -> int:
    """Check a dataset, or the training and validation sets of a config, and return the exit code."""
    target = Path(options.target)
    if not target.suffix and not target.exists():
        options.target = str(find_recipe(target))
        target = Path(options.target)
    with tempfile.TemporaryDirectory(prefix="brs-detr-") as folder:  # for jsons of a dataset of another format
        if is_dataset(target, options.overrides):
            return check_folder(options, target, Path(folder))
        if target.suffix in ENDINGS:
            config = with_paths(load_config(options.target, options.overrides), Path(folder))
            return check.run(options, lambda _: sources_of(config), describe=partial(anchors_of, config))
        return check_json(options)


def is_dataset(target: Path, overrides: Sequence[str]) -> bool:
    """Check for what `data=` takes: no recipe, and no json to be checked alone."""
    to_divide = any(word.lstrip("-").startswith("data.val_fraction=") for word in overrides)
    is_yolo = target.suffix == ".data" or (target.suffix in ENDINGS and is_yolo_yaml(target))
    return target.is_dir() or is_yolo or (to_divide and target.suffix not in ENDINGS)


def check_json(options: argparse.Namespace) -> int:
    """Check a json as a training with the recipe that is proposed for it opens it."""
    start = start_from(options.overrides)
    sources = partial(source_of_json, images=options.images, config=start.data)
    return check.run(options, lambda target: [sources(target)], describe=partial(recipe_for, start))


def check_folder(options: argparse.Namespace, target: Path, folder: Path) -> int:
    """Check what a dataset argument names; jsons are written to `folder` where it is of another format."""
    if options.images:
        raise ConfigError(f"--images: the images of {target} are found with it. Leave it out.")
    start = start_from([*options.overrides, dataset_setting(target)])
    data = start.data
    try:
        opened = open_source(data, folder)
    except DataError:  # perhaps a split is missing: what is there can be checked all the same
        only = "val" if set(recognize(target).jsons) & {"val", "test"} else "train"
        opened = open_source(data, folder, (only,))
    print("\n".join(opened.describe(kept=False)) + "\n")
    sources = []
    for purpose, split in opened.splits.items():
        source = source_of_json(str(split.json), str(split.images), data)
        sources.append(source if purpose == "train" else replace(source, transforms=EvalTransforms(), train=False))
    return check.run(options, lambda _: sources, describe=partial(recipe_for_folder, start, "val" in opened.splits))


class Start(NamedTuple):
    """What a check without a recipe goes by.

    Attributes:
        here: what the choice of a recipe depends on.
        data: section `data` of that recipe, with the settings of the command line.
        given: settings of the command line that the proposed command repeats.
    """

    here: Surroundings
    data: DataConfig
    given: Mapping[str, object]


def start_from(overrides: Sequence[str]) -> Start:
    """Read the recipe that will be proposed, as far as it decides what is trained on."""
    here = look_around()
    name, _ = choose_recipe(0, here)  # the one for many images leaves out the same ones
    data = apply_overrides(load_config(name), overrides).data
    names = set(override_names(overrides))
    sizes = ("data.augment.", "data.test_")  # proposed from the boxes, and of no effect on the check
    return Start(here, data, {k: v for k, v in leaves(data, "data.") if k in names and not k.startswith(sizes)})


def with_paths(config: Config, folder: Path) -> Config:
    """Replace the dataset argument of a config, if it has one, by the paths that it stands for."""
    if config.data.source is None:
        return config
    opened = open_source(config.data, folder)
    print("\n".join(opened.describe(kept=False)) + "\n")
    return replace(config, data=opened.settings(config.data))


def anchors_of(config: Config, dataset: CocoDetection) -> str:
    """Describe how well the anchors of a recipe fit its training set."""
    return describe_anchors(config, boxes_of(dataset.packed), dict(enumerate(dataset.classes)))


def recipe_for_folder(start: Start, has_val: bool, dataset: CocoDetection) -> str:
    """Describe the recipe to start from with a dataset argument, and the command line that trains it."""
    paths: dict[str, object] = {"data": str(start.data.source)}
    if not has_val:
        if not can_be_divided(dataset):
            return CANNOT_BE_DIVIDED
        paths["data.val_fraction"] = 0.1
    return first_recipe(facts_of(dataset, {**paths, **start.given}), start.here)


def facts_of(dataset: CocoDetection, paths: Mapping[str, object]) -> Dataset:
    """Return what the choice of a recipe needs to know of a training set."""
    packed = dataset.packed
    rows = np.repeat(np.arange(len(packed)), np.diff(packed.offsets))[~packed.iscrowd]
    names = map(packed.file_name, range(len(packed)))
    counts = dict(zip(names, np.bincount(rows, minlength=len(packed)).tolist(), strict=True))
    return Dataset(boxes_of(packed), len(packed), counts, paths, dict(enumerate(dataset.classes)))


def recipe_for(start: Start, dataset: CocoDetection) -> str:
    """Describe the recipe to start from with a json, and the command line that trains it."""
    root, annotations = os.path.abspath(dataset.image_dir), Path(dataset.json_path).absolute()
    if held_out(annotations.name):
        return "this looks like a validation set; check the training set for the recipe to start from"
    paths: dict[str, object] = {"data.root": root, "data.train_json": str(annotations), "data.train_images": "."}
    val, notes = validation_of(annotations, dataset.limits), []
    if val is not None:
        paths |= {"data.val_json": val[0], "data.val_images": val[1]}
    elif is_argument(dataset):
        if not can_be_divided(dataset):
            return CANNOT_BE_DIVIDED
        paths = {"data": str(annotations), "data.val_fraction": 0.1}
        notes = ["no validation json was found beside it: a tenth of its images is held out"]
    else:
        paths |= {"data.val_json": "VAL.json", "data.val_images": "VAL_IMAGES"}
        notes = ["no validation json was found beside it: replace VAL.json and VAL_IMAGES by yours"]
    return "\n".join([first_recipe(facts_of(dataset, {**start.given, **paths}), start.here), *notes])


def is_argument(dataset: CocoDetection) -> bool:
    """Check whether `data=` takes the json of a dataset and finds its images."""
    names = [dataset.file_name(index) for index in range(len(dataset))]
    try:
        recognize(dataset.json_path)
        found = usual_folder(dataset.json_path, names)
    except DataError:
        return False
    return os.path.realpath(found) == os.path.realpath(dataset.image_dir)


def can_be_divided(dataset: CocoDetection) -> bool:
    """Check whether there can be an object on both sides of a split."""
    return int((np.diff(dataset.packed.offsets) > 0).sum()) >= 2


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


def sources_of(config: Config) -> list[Source]:
    """Return the datasets of a config, with the transforms that training and validation use."""
    root, data = Path(config.data.root), config.data
    train = (str(root / data.train_json), str(root / data.train_images))
    val = (str(root / data.val_json), str(root / data.val_images))
    masks = config.model.has_masks
    limits = {"limits": config.data, "masks": masks}
    read = {**limits, "masks": masks_to_read(data, masks)}
    train_options = {"keep_empty": data.keep_empty, "min_side": data.min_side, **read}
    return [
        Source(*train, build_train_transforms(data, masks), options=train_options),
        Source(*val, build_eval_transforms(config.data), train=False, options=limits),
    ]
