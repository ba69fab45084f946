"""`data=FOLDER`: replace the dataset argument of a run by the paths that it stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from brs_detr.config import Config
from brs_detr.data.dataset_source import open_source
from brs_detr.data.issues import DataError
from brs_detr.exit_codes import Failure

FOLDER = "dataset"  # in the folder of a run or evaluation: the jsons of a dataset of another format


def with_source(
    config: Config, folder: Path, accelerator: Accelerator, purposes: tuple[str, ...] = ("train", "val")
) -> tuple[Config, list[str]]:
    """Open `data.source`, if it is given, and set the paths of section `data` to what it holds.

    The main process reads and writes; the others take over its result, or its error.

    Args:
        config: of the run.
        folder: of the run or evaluation, where converted annotations are written.
        accelerator: of the launch.
        purposes: as of `open_source`.

    Returns:
        The config, unchanged without `data.source`, and lines for the log.

    Raises:
        DataError: in every process: the dataset is not recognized or lacks a split.
    """
    if config.data.source is None:
        return config, []
    result: list[Any] = [None, [], ""]
    failure = None
    if accelerator.is_main_process:
        try:
            opened = open_source(config.data, folder / FOLDER, purposes)
            result = [opened.settings(config.data), opened.describe(), ""]
        except Failure as error:
            failure, result = error, [None, [], str(error)]
    data, lines, sentence = broadcast_object_list([result])[0]
    if sentence:
        raise failure or DataError(sentence)
    return replace(config, data=data), lines
