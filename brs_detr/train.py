"""The training, from top to bottom: `train`. Started by `brs-detr train`, `train.py` or `-m brs_detr.train`.

The arguments and the checks that need no torch are in `commands/train.py`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from timm.utils import ModelEmaV3

from brs_detr import config as configuration
from brs_detr.cli import run_command
from brs_detr.data.build import open_train_set, open_val_set
from brs_detr.data.image_io import ImageError
from brs_detr.data.issues import DataError
from brs_detr.data.loader import EpochBatches, build_eval_loader, build_train_loader
from brs_detr.engine.batch_plan import plan_length
from brs_detr.engine.checkpoint import CheckpointError, Weights, save_weights, write_text
from brs_detr.engine.diagnostics import largest_step, profile_steps
from brs_detr.engine.distributed import is_sharded, keep_known_layers, keep_scalars_whole
from brs_detr.engine.logging import RunLog
from brs_detr.engine.nonfinite import NonFiniteError
from brs_detr.engine.optim import build_optimizer, build_schedule
from brs_detr.engine.state import agreed_state, read_facts
from brs_detr.engine.storage import StorageError, is_storage_fault, remove_partials, storage_error
from brs_detr.engine.trainer import Trainer
from brs_detr.evaluate import validator
from brs_detr.exit_codes import ExitCode, Interruption
from brs_detr.losses.balance import set_epoch_length
from brs_detr.ops.targets import TargetError, check_targets
from brs_detr.run import setup
from brs_detr.run.launch import describe_machine, start_accelerator
from brs_detr.run.output_dir import (
    check_output_dir,
    check_resumable,
    remove_run,
    require_same_data,
    require_shared_folder,
)
from brs_detr.user_files import complain
from brs_detr.viz.boxes import write_samples


def run_training(config: configuration.Config, trial: str | None = None) -> int:
    """Call `train` with its arguments; turn what ends it early into a message and an exit code."""
    try:
        with _ready_to_stop():
            return train(config, trial)
    except Interruption as error:
        complain(error)
        return error.code
    except (configuration.ConfigError, DataError, ImageError, CheckpointError, NonFiniteError, TargetError) as error:
        complain(error)
        return ExitCode.NOT_FINITE if isinstance(error, NonFiniteError) else ExitCode.REFUSED
    except OSError as error:
        if not is_storage_fault(error):
            raise
        complain(error if isinstance(error, StorageError) else storage_error(Path(config.output_dir), error))
        return ExitCode.STORAGE


def train(config: configuration.Config, trial: str | None = None) -> int:
    """Train as the config says, or only try a "dry-run" or "profile" of it; returns the exit code."""
    if trial is not None:
        fresh = replace(config.train, overwrite=True, resume=False)
        config = replace(config, output_dir=f"{config.output_dir}/{trial}", train=fresh)
    check_output_dir(config)
    accelerator = start_accelerator(config, trackers=trial is None)
    plan = setup.plan_batches(config, accelerator)
    state, log = open_log(config, plan, accelerator)
    config = setup.with_subset(config, accelerator)

    process = {"rank": accelerator.process_index, "world_size": plan.processes, "workers": setup.worker_count(config)}
    masks = config.model.has_masks
    train_set, val_set = open_train_set(config.data, config.seed, masks), open_val_set(config.data, masks)
    log.say(f"{train_set.summary()}\n{val_set.summary()}")
    setup.require_same_categories(train_set.classes, train_set.category_ids, val_set, train_set.json_path)
    facts = setup.run_metadata(config, plan, train_set, val_set)
    if state is not None:
        require_same_data(config, facts["data"], read_facts(state), state)
    elif accelerator.is_main_process:
        if config.train.overwrite and not config.train.resume:
            remove_run(Path(config.output_dir))
        write_samples(train_set, Path(config.output_dir, "train_samples.png"), 16)
    process["timeout"] = config.data.timeout
    train_loader = build_train_loader(
        train_set, plan.per_device, seed=config.seed, repeat_threshold=config.data.repeat_threshold, **process
    )
    val_loader = build_eval_loader(val_set, config.eval.batch_size, **process)
    batches = EpochBatches(train_loader)
    length = plan_length(len(batches), plan, config.train)
    log.say(setup.describe_length(config, length))
    if warning := setup.shared_memory_warning(config, plan, train_set, val_set):
        log.say(warning)

    model, optimizer, ema = prepare_model(config, accelerator, train_set, log, fresh=state is None)
    if trial == "dry-run":
        log.say(largest_step(model, optimizer, accelerator, **setup.largest_shape(config, plan, train_set)))
        return ExitCode.OK

    thresholds: dict[str, float] = {}
    stored = configuration.to_dict(setup.for_weights_file(config))

    def save(name, tensors, facts):
        labels, facts = (train_set.classes, train_set.category_ids), {**facts, "thresholds": thresholds}
        save_weights(Path(config.output_dir, name), Weights(tensors, *labels, stored, facts))

    set_epoch_length(model, len(batches))
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(config.train, length),
        batches=batches,
        folder=Path(config.output_dir),
        log=log,
        config=config.train,
        length=length,
        accumulate=plan.accumulate,
        seed=config.seed,
        clip_norm=config.optim.clip_norm,
        metadata=facts,
        validate=validator(train_set.category_ids, val_set, val_loader, config, accelerator, log.say, thresholds),
        save=save,
        ema=ema,
        check_targets=partial(check_targets, num_classes=len(train_set.classes)),
    )
    if state is not None:
        trainer.resume(state)
    for loader in (train_loader, val_loader):
        loader.interrupted = lambda: trainer.asked_to_stop
    with contextlib.closing(train_loader), contextlib.closing(val_loader):
        if trial == "profile":
            log.say(profile_steps(trainer, Path(config.output_dir)))
            return ExitCode.OK
        finished = fit(trainer)
    for line in train_set.met_while_reading():
        log.say(f"training images: {line}")
    log.end()
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
def _ready_to_stop() -> Iterator[None]:
    """End at once on a stop signal outside the training: there is nothing to save."""

    def stop(*_) -> None:
        print("Received SIGTERM outside the training: nothing to save. Resume with --resume.", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def prepare_model(config: configuration.Config, accelerator, train_set, log: RunLog, *, fresh: bool) -> tuple:
    """Build detector and optimizer as Accelerate prepares them, and the averaged detector (None without EMA).

    Not `fresh`: a saved state is loaded next, so no initial weights are fetched or read.
    """
    model = setup.build_detector(config, train_set.num_classes, initial_weights=fresh)
    transfer = setup.load_initial_weights(model, config, train_set.classes) if fresh else None
    setup.freeze(model, config)
    for line in setup.describe_model(config, model, transfer):
        log.say(line)
    model.to(accelerator.device)
    decay = config.train.ema_decay
    if is_sharded(accelerator):
        keep_scalars_whole(model, accelerator)
        log.say(keep_known_layers(model, accelerator))
        if decay is not None:
            raise configuration.ConfigError("train.ema_decay: FSDP shards the weights to average. Set it to null.")
    ema = None if decay is None else ModelEmaV3(model, decay=decay, use_warmup=True)
    return *accelerator.prepare(model, build_optimizer(config.optim, model)), ema


def open_log(config: configuration.Config, plan, accelerator) -> tuple[Path | None, RunLog]:
    """Open the run's log and find the saved state to resume from (None for a fresh start): (state, log)."""
    folder = Path(config.output_dir)
    require_shared_folder(config, accelerator)
    state, notes = agreed_state(folder / "state", accelerator) if config.train.resume else (None, [])
    if state is not None:
        changes = check_resumable(config, plan, read_facts(state), state, is_sharded(accelerator))
        notes += [f"resumed from {state}", *(f"changed since: {change}" for change in changes)]
    accelerator.wait_for_everyone()
    log = RunLog(folder, accelerator, None if state is None else read_facts(state))
    for note in [describe_machine(accelerator), str(plan), *notes]:
        log.say(note)
    if accelerator.is_main_process:
        remove_partials(folder)
        write_text(folder / "config.yaml", configuration.dump(config))
    return state, log


main = partial(run_command, "train")  # the command line

if __name__ == "__main__":  # accelerate launch -m brs_detr.train
    sys.exit(main())
