"""`train`: the arguments and the quick checks of a training; `brs_detr/train.py` is the training."""

from __future__ import annotations

import argparse
from dataclasses import replace

from brs_detr.config import load_config
from brs_detr.run.inputs import require_training_inputs

DESCRIPTION = """Train a detector: `brs-detr train CONFIG [a.b=value ...] [--resume | --overwrite]`.

`python train.py` and, for several devices, `accelerate launch train.py` or `accelerate launch -m brs_detr.train` take
the same arguments. `--dry-run` and `--profile` only try it.

Exit codes: 0 trained to the end; 2 a setting, dataset or checkpoint cannot be used; 3 a loss was not finite; and, saved
and ready for `--resume`: 71 a loader worker was killed; 74 the storage failed; 75 stopped by SIGTERM or Ctrl-C.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train`."""
    parser.add_argument("config", help="recipe: its name or its file, e.g. demo or configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", default=[], help="settings to change, e.g. optim.lr=1e-4")
    parser.add_argument("--resume", action="store_true", help="go on with the run in output_dir, if there is one")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start over although output_dir holds a run; with --resume, only if it has no state",
    )
    trial = parser.add_mutually_exclusive_group()
    trial.add_argument("--dry-run", action="store_true", help="two steps at the largest shape, then report memory")
    trial.add_argument("--profile", action="store_true", help="eight steps, then report where their time went")


def run(options: argparse.Namespace) -> int:
    """Check settings and paths, then train; returns the exit code."""
    config = load_config(options.config, options.overrides)
    resume, overwrite = options.resume or config.train.resume, options.overwrite or config.train.overwrite
    config = replace(config, train=replace(config.train, resume=resume, overwrite=overwrite))
    trial = "dry-run" if options.dry_run else "profile" if options.profile else None
    require_training_inputs(config, is_trial=trial is not None)
    from brs_detr.train import run_training  # torch takes seconds to import: only once all this is right

    return run_training(config, trial)
