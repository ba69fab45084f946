"""The `push` command: upload a run's weights to the Hugging Face hub, with a model card filled in from the run."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from brs_detr import config as configuration
from brs_detr.config import ConfigError
from brs_detr.engine.checkpoint import Weights, save_weights
from brs_detr.engine.logging import read_metrics
from brs_detr.engine.storage import write_text
from brs_detr.hub.huggingface import push
from brs_detr.hub.model_card import class_figures, model_card
from brs_detr.hub.sources import WEIGHTS
from brs_detr.run.output_dir import require_writable
from brs_detr.run.weights import EVALUATION, locate, read
from brs_detr.user_files import printable

WRITTEN = (WEIGHTS, "config.yaml", "curves.png", "README.md")


def run(options: argparse.Namespace) -> int:
    """Write the folder of a repository and upload it, or with --out only write it; returns the exit code."""
    file = locate(options.weights)
    weights = read(file)
    if options.out is not None:
        require_own_folder(options.out)
        require_writable(options.out, "--out")
        write_repository(options.out, weights, file, options.repository, options.license)
        print(f"{printable(options.out)}: written, not uploaded")
        return 0
    with tempfile.TemporaryDirectory(prefix="brs-detr-push-") as folder:
        write_repository(Path(folder), weights, file, options.repository, options.license)
        address = push(Path(folder), options.repository, private=options.private)
    print(f'{printable(file)}: uploaded, {address}\nload it with: load("hf://{options.repository}")')
    return 0


def require_own_folder(out: Path) -> None:
    """Refuse a folder with files that an earlier push has not written; its own are replaced.

    Raises:
        ConfigError: naming one of the files.
    """
    # without .git and .gitattributes of a clone
    held = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    others = held - set(WRITTEN) if {WEIGHTS, "README.md"} <= held else held
    if others:
        raise ConfigError(
            f"--out={printable(out)}: holds {printable(min(others))}, which push has not written. Name a new or empty "
            "folder."
        )


def write_repository(folder: Path, weights: Weights, file: Path, repository: str, license: str | None = None) -> None:
    """Write what a repository holds: weights, config, curves if the run has any, and the card.

    Args:
        folder: to write to.
        weights: content of `file`.
        file: of the weights; the run's other files lie beside it.
        repository: user/name.
        license: identifier of the hub.
    """
    weights = replace(weights, config=without_local_paths(weights.config))
    save_weights(folder / WEIGHTS, weights)
    write_text(folder / "config.yaml", configuration.dump(configuration.from_dict(weights.config, str(file))))
    metrics = file.parent / "metrics.jsonl"
    if metrics.is_file():
        from brs_detr.viz.plots import draw_curves  # here, since only this needs matplotlib

        draw_curves(read_metrics(metrics), folder / "curves.png")
    evaluation = file.parent / EVALUATION / "evaluation.json"
    classes = class_figures(weights, evaluation)
    if not classes and evaluation.is_file():
        print(
            f"{printable(evaluation)}: has other figures than {printable(file.name)} (of other weights, images, "
            "settings or another head), so the card has no AP of classes. Run eval again for it."
        )
    card = model_card(weights, repository, class_figures=classes, license=license, has_curves=metrics.is_file())
    write_text(folder / "README.md", card)


def without_local_paths(value: Any) -> Any:
    """Shorten absolute paths among settings to their last part: others need not know this machine's folders."""
    if isinstance(value, dict):
        return {name: without_local_paths(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_local_paths(own) for own in value]
    if isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return PureWindowsPath(value).name  # which takes both kinds of slashes
    return value
