"""The training, from top to bottom: `train`. Started by `brs-detr train`, `train.py` or `-m brs_detr.train`.

The arguments and the checks that need no torch are in `commands/train.py`, what is assembled in `run/training.py`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from brs_detr.cli import run_command
from brs_detr.config import Config
from brs_detr.engine.diagnostics import profile_steps
from brs_detr.engine.logging import warnings_in
from brs_detr.engine.storage import is_storage_fault, storage_error
from brs_detr.engine.trainer import Trainer
from brs_detr.exit_codes import ExitCode, Failure
from brs_detr.run.output_dir import locks_released
from brs_detr.run.training import (
    Run,
    begin_run,
    build_trainer,
    choose_batch_size,
    dry_run,
    open_data,
    open_run,
    prepare_model,
)
from brs_detr.run.validation import validator
from brs_detr.user_files import complain


def run_training(config: Config, trial: str | None = None) -> int:
    """Call `train` with its arguments; turn what ends it early into a message and an exit code."""
    try:
        with _ready_to_stop() as begun:
            return train(config, trial, begun.set)
    except Failure as error:
        complain(error)
        return error.code
    except OSError as error:
        if not is_storage_fault(error):
            raise
        complain(storage_error(Path(config.output_dir), error))
        return ExitCode.STORAGE


@locks_released()
def train(config: Config, trial: str | None = None, begun: Callable[[], object] = lambda: None) -> int:
    """Train as the config says, or only try a "dry-run" or "profile" of it; returns the exit code.

    Args:
        config: of the run.
        trial: None for a training.
        begun: called once the folder is that of the training, no longer that of a run before.
    """
    run = open_run(config, trial)
    with warnings_in(run.log):
        return _train(choose_batch_size(run), trial, begun)


def _train(run: Run, trial: str | None, begun: Callable[[], object]) -> int:
    data = open_data(run)
    model, optimizer, ema = prepare_model(run, data.train_set)
    if trial == "dry-run":
        begin_run(run, data.train_set)
        run.log.say(dry_run(run, data, model, optimizer))
        return ExitCode.OK

    trainer = build_trainer(run, data, model, optimizer, ema, validator(run, data))
    begin_run(run, data.train_set)
    with contextlib.closing(data.train_loader), contextlib.closing(data.val_loader):
        if trial == "profile":
            run.log.say(profile_steps(trainer, run.folder))
            return ExitCode.OK
        begun()
        finished = fit(trainer)
    for line in data.train_set.met_while_reading():
        run.log.say(f"training images: {line}")
    run.log.end()
    return ExitCode.OK if finished else ExitCode.INTERRUPTED


def fit(trainer: Trainer) -> bool:
    """Train from the trainer's position to the end: an epoch, its evaluation, the saved state, the next epoch.

    Returns:
        True when the training is complete, False when a stop signal ended it early (the state is saved).

    Raises:
        Interruption: the batches of some process do not come (the state of the last completed step is saved).
        NonFiniteError: a loss or gradient was not finite and `train.on_nonfinite` is "stop", or too many were.
        StorageError: the state or the weights could not be written.
    """
    with trainer.interruptible():
        for epoch in trainer.epochs():
            trainer.train_epoch()
            if trainer.is_evaluated(epoch):
                trainer.evaluate()
                trainer.save_state()
    return not trainer.stopped


@contextlib.contextmanager
def _ready_to_stop() -> Iterator[Event]:
    """End at once on a stop signal outside the training: there is nothing to save.

    Yields:
        An event to set when the run has begun: from then on `--resume` continues it and not one before.
    """
    begun = Event()

    def stop(number: int, _: Any) -> None:
        advice = "Resume with --resume." if begun.is_set() else "Run the same command again."
        name = signal.Signals(number).name
        print(f"Received {name} outside the training: nothing to save. {advice}", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield begun
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


main = partial(run_command, "train")  # the command line

if __name__ == "__main__":  # accelerate launch -m brs_detr.train
    sys.exit(main())
