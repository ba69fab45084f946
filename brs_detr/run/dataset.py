"""The datasets of a run: what `data=FOLDER` stands for, what is read of it and how often, and its loaders."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from brs_detr.config import Config, ConfigError
from brs_detr.data.annotations import categories_differ
from brs_detr.data.build import masks_to_read, open_train_set
from brs_detr.data.coco import CocoDetection
from brs_detr.data.dataset_source import open_source
from brs_detr.data.formats.coco import remove_unfinished
from brs_detr.data.json_file import as_int, coerce_numbers, load_json
from brs_detr.data.loader import build_eval_loader
from brs_detr.data.watched_loader import WatchedLoader
from brs_detr.engine.storage import write_text, writing
from brs_detr.exit_codes import Failure

FOLDER = "dataset"  # in the folder of a run or evaluation: the jsons of a dataset of another format


def with_source(
    config: Config, folder: Path, accelerator: Accelerator, purposes: tuple[str, ...] = ("train", "val")
) -> tuple[Config, list[str], bool]:
    """Open `data.source`, if it is given, and set the paths of section `data` to what it holds.

    The main process reads and writes; the others take over its result, or its error.

    Args:
        config: of the run.
        folder: of the run or evaluation, where converted annotations are written.
        accelerator: of the launch.
        purposes: as of `open_source`.

    Returns:
        The config, unchanged without `data.source`, lines for the log, and `Opened.divided`.

    Raises:
        DataError: in every process: the dataset is not recognized or lacks a split.
        ReadError, StorageError: in every process: it cannot be read, or what is converted cannot be written.
    """
    if config.data.source is None:
        return config, [], True
    result: list[Any] = [None, [], True, None]
    if accelerator.is_main_process:
        target = folder / FOLDER
        try:
            with writing(target):
                if "train" in purposes:  # of a training that was killed; evaluations may be writing at the same time
                    remove_unfinished(target)
                opened = open_source(config.data, target, purposes)
            result = [opened.settings(config.data), opened.describe(), opened.divided, None]
        except Failure as error:
            result = [None, [], True, error]
    data, lines, divided, failure = broadcast_object_list([result])[0]
    if failure is not None:
        raise failure
    return replace(config, data=data), lines, divided


def with_source_of_evaluation(config: Config, out: Path, accelerator: Accelerator) -> tuple[Config, bool]:
    """Call `with_source` for the val split, print what was recognized, and return the config and `Opened.divided`.

    Args:
        config: of the evaluation.
        out: its folder.
        accelerator: of the launch.

    Raises:
        DataError, ReadError, StorageError: as `with_source`.
    """
    config, recognized, divided = with_source(config, out, accelerator, ("val",))
    if accelerator.is_main_process and recognized:
        print("\n".join(recognized))
    return config, divided


class TrainSet:
    """Opens the training set of a run, and keeps it for those who need it next: a large json takes a minute to read."""

    def __init__(self) -> None:
        self._settings: Any = None
        self._opened: CocoDetection | None = None

    def __call__(self, config: Config) -> CocoDetection:
        """Return the training set of a config.

        Raises:
            DataError: there is nothing to train on.
        """
        settings = (config.data, config.seed, config.model.has_masks)
        if self._opened is None or settings != self._settings:
            self._opened, self._settings = open_train_set(*settings), settings
        return self._opened


def val_loader(dataset: CocoDetection, config: Config, accelerator: Accelerator) -> WatchedLoader:
    """Build the loader of this process's part of a dataset to evaluate."""
    return build_eval_loader(
        dataset,
        config.eval.batch_size,
        workers=worker_count(config),
        timeout=config.data.timeout,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def worker_count(config: Config) -> int:
    """Return the number of loader workers: that of the config, but at most one per core."""
    # Of the cores that this process may use, which a scheduler can restrict; batches do not depend on the number.
    return min(
        config.data.workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def require_same_categories(
    classes: Sequence[str], category_ids: Sequence[int], dataset: CocoDetection, owner: str
) -> None:
    """Raise if a dataset's categories differ from those of `owner` (the training set, a checkpoint).

    Raises:
        ConfigError: naming the ids that differ.
    """
    differ = categories_differ((category_ids, classes), (dataset.category_ids, dataset.classes))
    if differ:
        raise ConfigError(
            f"{dataset.json_path}: its categories are not those of {owner}: {differ}. Give both the same `categories`."
        )


def with_subset(config: Config, accelerator: Accelerator) -> Config:
    """Apply `train.overfit_batches`: train and validate on the first images of the training set.

    A detector that cannot overfit a few batches has a bug; without the setting the config is returned unchanged.

    Raises:
        DataError: the annotation file is missing or is not a dataset.
    """
    if config.train.overfit_batches is None:
        return config
    data = config.data
    target = Path(config.output_dir, "overfit.json").resolve()
    if accelerator.is_main_process:
        images = config.train.overfit_batches * config.train.total_batch_size
        path, limit = Path(data.root, data.train_json), data.max_json_bytes
        content = load_json(path, limit, "keep" if masks_to_read(data, config.model.has_masks) else "drop")
        write_subset(content, target, images)
    accelerator.wait_for_everyone()
    # An evaluation of its weights reads the subset, and not the dataset it was taken from
    own = replace(data, source=None, val_fraction=None)
    subset = replace(own, train_json=str(target), val_json=str(target), val_images=data.train_images)
    return replace(config, data=subset)


def write_subset(data: dict[str, Any], target: Path, count: int) -> int:
    """Write a COCO json with the first images of another that have objects.

    Args:
        data: content of a COCO json.
        target: file to write.
        count: largest number of images.

    Returns:
        The number of images written.
    """
    images, annotations = ([e for e in data[key] if isinstance(e, dict)] for key in ("images", "annotations"))
    for entry in [*images, *annotations]:  # as the dataset reads them: numbers may be written as text
        coerce_numbers(entry, ("id", "image_id", "iscrowd"))
    occupied = {as_int(annotation.get("image_id")) for annotation in annotations if not annotation.get("iscrowd")}
    occupied.discard(None)
    images = [image for image in images if as_int(image.get("id")) in occupied][:count]
    ids = {as_int(image["id"]) for image in images}
    annotations = [annotation for annotation in annotations if as_int(annotation.get("image_id")) in ids]
    write_text(target, json.dumps({**data, "images": images, "annotations": annotations}))
    return len(images)
