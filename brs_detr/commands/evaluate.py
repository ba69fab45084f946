"""`eval`: the arguments and the quick checks of an evaluation; `brs_detr/evaluate.py` is the evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path

from brs_detr.commands.arguments import WEIGHTS, at_least_zero
from brs_detr.config import ConfigError, check_overrides, override_names
from brs_detr.hub.sources import local_path, require_source
from brs_detr.run.inputs import ordered_scores, require_evaluation_inputs

DESCRIPTION = """Evaluate trained weights: `brs-detr eval RUN_OR_CHECKPOINT [a.b=value ...] [--out FOLDER]`.

`python eval.py` and, for several devices, `accelerate launch eval.py` or `accelerate launch -m brs_detr.evaluate` take
the same arguments. Nothing but the weights file is needed: classes and config travel inside it. An exported .onnx is
evaluated in onnxruntime and its figures are set beside those of the detector it was made from.

Exit codes: 0 evaluated; 2 a setting, dataset or checkpoint cannot be used; 74 the storage failed.
"""

FREE_IN_EXPORTS = (
    *(
        "data.root",
        "data.source",
        "data.val_",
        "data.workers",
        "data.timeout",
        "data.retry_seconds",
        "data.max_",
        "data.allow_",
    ),
    *("eval.batch_size", "eval.max_detections", "eval.score_threshold"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `eval`."""
    parser.add_argument("weights", type=Path, help=WEIGHTS)
    parser.add_argument("overrides", nargs="*", default=[], help="settings to change, e.g. data.root=/data/coco")
    parser.add_argument("--out", type=Path, help="folder to write to (default: evaluation/ beside the weights)")
    parser.add_argument(
        "--score-thresholds",
        type=score_list,
        default=(),
        metavar="S,S,...",
        help="also evaluate the detections above each of these scores, e.g. 1e-4,1e-3,1e-2,.1,.4,.6,.8",
    )
    parser.add_argument("--images", type=at_least_zero, default=12, help="example images to draw (default 12; 0: none)")


def score_list(text: str) -> tuple[float, ...]:
    """Parse scores in [0, 1) with commas between them; returns them in ascending order."""
    try:
        return ordered_scores(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a list of scores in [0, 1). Write it as 1e-3,.1,.5.") from None


def run(options: argparse.Namespace) -> int:
    """Check names and paths, then evaluate; returns the exit code."""
    if options.weights.suffix == ".onnx":
        return evaluate_export(options)
    require_evaluation_inputs(options.weights, options.overrides)
    weights = local_path(options.weights)
    from brs_detr.evaluate import run_evaluation  # torch takes seconds to import: only once all this is right

    return run_evaluation(weights, options.overrides, options.out, options.images, options.score_thresholds)


def evaluate_export(options: argparse.Namespace) -> int:
    """Check the settings of an evaluation of an exported file, then evaluate it.

    Raises:
        SourceError: there is no such file.
        ConfigError: a setting is fixed in the file.
    """
    require_source(options.weights)
    check_overrides(options.overrides)
    for name in override_names(options.overrides):
        if name != "data" and not name.startswith(FREE_IN_EXPORTS):
            raise ConfigError(
                f"{name}: is fixed in an exported file. Leave it out, or export again with this setting; "
                "data=FOLDER, data.root, data.val_*, eval.batch_size and eval.max_detections can be chosen."
            )
    if options.score_thresholds:
        raise ConfigError("--score-thresholds: is for weights files. Leave it out.")
    from brs_detr.commands.evaluate_export import run_evaluation

    return run_evaluation(options.weights, options.overrides, options.out, options.images)
