"""The project from Python: `load`, which is also `brs_detr.load`, `train` and `evaluate`.

    from brs_detr.api import evaluate, load, train

    result = train("demo", {"train.epochs": 3})
    print(evaluate(result.folder).stats["AP50"])
    found = load(result.folder).predict("image.jpg")

What a command refuses with exit code 2 raises here: `exit_codes.Failure` is the base of these errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from brs_detr.config import Config, ConfigError, apply_overrides, load_config
from brs_detr.hub.sources import local_path
from brs_detr.run.inputs import ordered_scores, require_evaluation_inputs, require_training_inputs

if TYPE_CHECKING:  # torch takes seconds to import: only once settings and paths are right
    from brs_detr.evaluate import Evaluation
    from brs_detr.predictor import Predictor

Overrides: TypeAlias = "Sequence[str] | Mapping[str, Any]"


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves.

    Attributes:
        folder: of the run.
        finished: False where a stop signal ended it; `train(..., resume=True)` continues it.
        weights: file of the best validation; None if there was no validation.
        epoch: of the best validation.
        metrics: its figures: AP, AP50, AP75, ..., each in [0, 1].
    """

    folder: Path
    finished: bool
    weights: Path | None = None
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        state = "" if self.finished else " (stopped early)"
        if self.weights is None:
            return f"{self.folder}{state}: no validation"
        shown = ", ".join(f"{name} {self.metrics[name]:.3f}" for name in ("AP", "AP50", "AP75") if name in self.metrics)
        return f"{self.weights}{state}: epoch {self.epoch}, {shown}"


def load(source: str | PathLike[str], *, device: str | None = None, overrides: Overrides = ()) -> Predictor:
    """Load a detector to predict with.

    Args:
        source: run folder (its best weights, else its last), weights file, official Co-DETR `.pth`, `.onnx`, the name
            of a published checkpoint (`hub/published.py`), or `hf://user/repository`.
        device: such as "cpu" or "cuda:1"; None: a GPU if there is one.
        overrides: settings to change, as `["eval.predict_with=roi"]` or `{"eval.predict_with": "roi"}`.

    Raises:
        Failure: there is no such file, it cannot be used, or a setting cannot.
    """
    path = local_path(source)
    from brs_detr.predictor import Predictor

    return Predictor.load(path, device=device, overrides=as_words(overrides))


def train(
    recipe: Config | str | PathLike[str],
    overrides: Overrides = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainingResult:
    """Train a detector as a recipe says, in this process.

    Args:
        recipe: a config, a recipe's file, or its name (`"demo"`).
        overrides: settings to change, as `["train.epochs=3"]` or `{"train.epochs": 3}`.
        resume: go on with the run in `output_dir`, if there is one.
        overwrite: start over although `output_dir` holds a run.

    Raises:
        Failure: a setting, dataset or checkpoint cannot be used, a loss was not finite, or the storage failed.
        ValueError: this is not the main thread, where Python handles the signals that stop a training.
    """
    words = as_words(overrides)
    config = apply_overrides(recipe, words) if isinstance(recipe, Config) else load_config(Path(recipe), words)
    resume, overwrite = resume or config.train.resume, overwrite or config.train.overwrite
    config = replace(config, train=replace(config.train, resume=resume, overwrite=overwrite))
    require_training_inputs(config)
    from brs_detr.engine.checkpoint import read_extra
    from brs_detr.train import train as train_here

    with _own_accelerator():
        finished = train_here(config) == 0
    folder = Path(config.output_dir)
    best = folder / "best.safetensors"
    if not best.is_file():
        return TrainingResult(folder, finished)
    extra = read_extra(best)
    return TrainingResult(folder, finished, best, extra.get("epoch"), extra.get("metrics", {}))


def evaluate(
    source: str | PathLike[str],
    overrides: Overrides = (),
    *,
    out: str | PathLike[str] | None = None,
    images: int = 0,
    score_thresholds: Sequence[float] = (),
) -> Evaluation:
    """Evaluate weights on the val split of their config, or on that of `overrides`.

    Args:
        source: as for `load`, except an exported file.
        overrides: settings to change, as `["data.root=/data/coco"]` or `{"data.root": "/data/coco"}`.
        out: folder to write tables and curves to; None: `evaluation` beside the weights.
        images: number of images to draw there.
        score_thresholds: also evaluate the detections above each of these scores.

    Returns:
        The results; their `stats` has COCO's figures, and printing them shows the table that `brs-detr eval` prints.

    Raises:
        Failure: the weights, a setting, an argument or the dataset cannot be used.
    """
    if images < 0:
        raise ConfigError(f"images={images}: must be at least 0.")
    scores, words = ordered_scores(score_thresholds), as_words(overrides)
    require_evaluation_inputs(Path(source), words)
    path = local_path(source)
    from brs_detr.evaluate import evaluate as evaluate_here

    with _own_accelerator():
        return evaluate_here(path, words, None if out is None else Path(out), images, scores)


def as_words(overrides: Overrides) -> list[str]:
    """Write overrides as `section.setting=value`, as on a command line.

    Raises:
        ConfigError: a value has no form there.
    """
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Mapping):
        return list(overrides)
    words = []
    for name, value in overrides.items():
        try:  # what JSON writes is YAML, as which the value of a setting is read
            words.append(f"{name}={json.dumps(value, default=_as_json)}")
        except TypeError:
            raise ConfigError(
                f"{name}: {type(value).__name__} is no value of a setting. Give text or a number."
            ) from None
    return words


def _as_json(value: Any) -> str | int | float | bool:
    """Return the text of a path, or the number of a NumPy scalar.

    Raises:
        TypeError: it is neither.
    """
    if getattr(value, "ndim", None) == 0:  # NumPy itself is not imported here
        number: int | float | bool = value.item()
        return number
    return fspath(value)


@contextmanager
def _own_accelerator() -> Iterator[None]:
    """Let the Accelerator inside have settings of its own, not those of an earlier one in this process."""
    from accelerate.state import AcceleratorState

    try:
        yield
    finally:
        AcceleratorState._reset_state()
