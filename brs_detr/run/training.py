"""What a training is assembled from: its folder and log, its data, its detector and the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from brs_detr import config as configuration
from brs_detr.config import Config, ConfigError
from brs_detr.data.build import open_val_set
from brs_detr.data.coco import CocoDetection
from brs_detr.data.federated import describe_repeats
from brs_detr.data.loader import EpochBatches, build_train_loader
from brs_detr.data.watched_loader import WatchedLoader
from brs_detr.engine.batch_plan import BatchPlan, TrainingLength, plan_length
from brs_detr.engine.batch_search import free_memory, search_batch_size
from brs_detr.engine.checkpoint import Transfer, Weights, save_weights
from brs_detr.engine.compilation import compile_layers, require_compiler
from brs_detr.engine.diagnostics import largest_step
from brs_detr.engine.distributed import is_sharded, keep_known_layers, keep_scalars_whole
from brs_detr.engine.logging import RunLog
from brs_detr.engine.optim import build_optimizer, build_schedule
from brs_detr.engine.state import agreed_state, expect_first_state, read_metadata
from brs_detr.engine.storage import remove_partials, together, write_text
from brs_detr.engine.trainer import BEST, LAST, Trainer
from brs_detr.losses.balance import set_epoch_length
from brs_detr.models.detector import Detector
from brs_detr.ops.targets import check_targets
from brs_detr.run import setup
from brs_detr.run.anchors import choose_anchors
from brs_detr.run.dataset import (
    TrainSet,
    require_same_categories,
    val_loader,
    with_source,
    with_subset,
    worker_count,
)
from brs_detr.run.inputs import require_learning_backbone
from brs_detr.run.launch import describe_machine, start_accelerator, start_trackers
from brs_detr.run.output_dir import (
    changes_of_measure,
    check_output_dir,
    check_resumable,
    remove_run,
    require_same_data,
    require_shared_folder,
    require_state,
    tensorboard_files,
)
from brs_detr.run.validation import Validated, report_best
from brs_detr.viz.boxes import write_samples

Validate = Callable[[nn.Module], dict[str, Any]]
# files that only a training writes into its folder, unlike report.html and exports
WRITTEN = (BEST, LAST, "config.yaml", "metrics.jsonl", "log.txt", "overfit.json", "nonfinite-*.pt")


@dataclass(frozen=True)
class Run:
    """A training that is set up; `begin_run` makes the folder its own.

    Attributes:
        config: of the run; with `train.overfit_batches` its data are the subset.
        accelerator: of the launch.
        plan: how the total batch is split.
        log: to the console and to files.
        state: the saved state to resume from; None for a fresh start.
        settings: the content of config.yaml, in which `data` is not the subset.
        train_set: opens the training set.
    """

    config: Config
    accelerator: Accelerator
    plan: BatchPlan
    log: RunLog
    state: Path | None
    settings: str
    train_set: TrainSet = field(default_factory=TrainSet)

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.config.output_dir)


@dataclass(frozen=True)
class Data:
    """The datasets of a training, their loaders in this process, and what follows from them.

    Attributes:
        length: of the training.
        metadata: stored with every state.
        thresholds: minimum score of each class, written by the validation and stored with the weights.
        chosen: likewise "calibration", the map of scores of each head; of several heads "predict_with", the best one,
            the "head_thresholds" of each, and "ensemble", how their scores compare.
        validated: the last validation, for its report; empty before it and outside the main process.
    """

    train_set: CocoDetection
    val_set: CocoDetection
    train_loader: WatchedLoader
    val_loader: WatchedLoader
    batches: EpochBatches
    length: TrainingLength
    metadata: dict[str, Any]
    thresholds: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    validated: list[Validated] = field(default_factory=list)


def open_run(config: Config, trial: str | None = None) -> Run:
    """Start the accelerator, and open the run's folder and log; for a trial, in a folder of its own.

    Raises:
        ConfigError: the folder holds a run that is neither resumed nor overwritten, or the launch does not fit.
        CheckpointError: the state to resume from is damaged.
        CompilerError: layers are to be compiled, and cannot be here.
    """
    if trial is not None:
        fresh = replace(config.train, overwrite=True, resume=False)
        config = replace(config, output_dir=f"{config.output_dir}/{trial}", train=fresh)
    check_output_dir(config)
    accelerator = start_accelerator(config, trackers=trial is None)
    require_unsharded(config, accelerator)
    if config.train.compile != "none":
        require_compiler(accelerator.device)
    train_set = TrainSet()
    config, plan, state, log = _open_log(config, accelerator, train_set, is_trial=trial is not None)
    settings = configuration.dump(setup.without_flags(config))
    return Run(with_subset(config, accelerator), accelerator, plan, log, state, settings, train_set)


def _open_log(
    config: Config, accelerator: Accelerator, train_set: TrainSet, is_trial: bool
) -> tuple[Config, BatchPlan, Path | None, RunLog]:
    """Open the run's log, find the saved state to resume from (None for a fresh start) and choose the anchors."""
    folder, plan = Path(config.output_dir), setup.plan_batches(config, accelerator)
    require_shared_folder(config, accelerator)
    state, notes = agreed_state(folder / "state", accelerator) if config.train.resume else (None, [])
    require_state(config, state, accelerator)
    purposes = ("train",) if config.train.overfit_batches is not None else ("train", "val")
    config, recognized, _ = with_source(config, folder, accelerator, purposes)
    if state is None and not is_trial:  # a trial shows the cost of a step, which weights do not change
        require_learning_backbone(config)
    config, chosen = choose_anchors(config, None if state is None else read_metadata(state), accelerator, train_set)
    if state is not None:
        plan = setup.plan_batches(config, accelerator, stored_batch_size(read_metadata(state)))
        changes = check_resumable(config, plan, read_metadata(state), state, is_sharded(accelerator))
        if config.train.overwrite:
            notes.append(
                "train.overwrite: not used, since there is a state to resume. Leave out --resume to start over."
            )
        notes += [f"resumed from {state}", *(f"changed since: {change}" for change in changes)]
    accelerator.wait_for_everyone()
    log = RunLog(folder, accelerator)
    searched = state is None and config.train.per_device_batch_size == "auto"
    split = f"total batch {plan.total}, its split is searched for below" if searched else str(plan)
    for note in [describe_machine(accelerator), split, *recognized, *notes, *chosen]:
        log.say(note)
    return config, plan, state, log


def require_unsharded(config: Config, accelerator: Accelerator) -> None:
    """Raise if the launch shards the detector, for settings with which FSDP does not work.

    Raises:
        ConfigError: naming the first of them.
    """
    if not is_sharded(accelerator):
        return
    if config.train.ema_decay is not None:
        raise ConfigError("train.ema_decay: FSDP shards the weights to average. Set it to null.")
    if config.model.backbone.channels_last:
        raise ConfigError("model.backbone.channels_last: FSDP shards contiguous weights only. Set it to false.")
    if config.train.compile != "none":
        raise ConfigError("train.compile: layers that FSDP shards are not compiled. Set it to none.")


def stored_batch_size(metadata: dict[str, Any]) -> int | None:
    """Return the images that a process of a saved run held at once; None where its state does not say."""
    launch = metadata.get("launch")
    stored = launch.get("per_device") if isinstance(launch, dict) else None
    return stored if isinstance(stored, int) and stored > 0 else None


def choose_batch_size(run: Run) -> Run:
    """Search for the batch size of a process where the config says auto; a resumed run keeps the one that it had.

    Raises:
        ConfigError: not even one image fits, or the launch shards the detector.
        DataError: there is nothing to train on.
    """
    config, accelerator = run.config, run.accelerator
    if config.train.per_device_batch_size != "auto" or run.state is not None:
        return run
    if is_sharded(accelerator):
        raise ConfigError(
            "train.per_device_batch_size=auto: a detector that FSDP shards cannot be tried. Give a number, from "
            "--dry-run."
        )
    train_set = run.train_set(config)

    def build() -> tuple[nn.Module, Optimizer]:
        model = setup.build_detector(config, train_set.num_classes, initial_weights=False)
        setup.freeze(model, config)
        model.to(accelerator.device).train()
        return model, build_optimizer(config.optim, model)

    def shape(size: int) -> dict[str, Any]:
        largest = setup.largest_shape(config, setup.plan_batches(config, accelerator, size), train_set)
        return {name: value for name, value in largest.items() if name != "accumulate"}

    share, averaged = run.plan.total // run.plan.processes, config.train.ema_decay is not None
    found = search_batch_size(build, shape, accelerator, share, averaged=averaged)
    free_memory(accelerator.device)  # of the detector that was tried
    if found == 0:
        height, width = shape(1)["size"]
        raise ConfigError(
            f"train.per_device_batch_size=auto: not even one image of {width}x{height} fits into the memory of every "
            "device. Use smaller images (data.augment), a smaller model, or train.precision=bf16."
        )
    plan = setup.plan_batches(config, accelerator, found)
    how = "by the memory that one step saves" if accelerator.device.type == "cpu" else "by trying"
    run.log.say(f"{plan} (auto: {found} image(s) fit at once, found {how})")
    return replace(run, plan=plan)


def open_data(run: Run) -> Data:
    """Open the datasets and build their loaders.

    Raises:
        DataError: there is nothing to train or to evaluate on.
        ConfigError: the datasets' categories differ, or data or classes are not those of the run that is resumed.
    """
    config, log, masks = run.config, run.log, run.config.model.has_masks
    train_set = run.train_set(config)
    val_set = open_val_set(config.data, masks, config.eval.test_scales)
    log.say(f"{train_set.summary()}\n{val_set.summary()}")
    require_same_categories(train_set.classes, train_set.category_ids, val_set, train_set.json_path)
    metadata = setup.run_metadata(config, run.plan, train_set, val_set)
    if run.state is not None:
        for path in require_same_data(config, metadata, read_metadata(run.state), run.state):
            log.say(f"changed since: the annotations or images of {path}")
    train_loader = build_train_loader(
        train_set,
        run.plan.per_device,
        seed=config.seed,
        repeat_threshold=config.data.repeat_threshold,
        rank=run.accelerator.process_index,
        world_size=run.plan.processes,
        workers=worker_count(config),
        timeout=config.data.timeout,
    )
    if config.data.repeat_threshold is not None:
        log.say(describe_repeats(train_set.packed, train_set.classes, config.data.repeat_threshold))
    batches = EpochBatches(train_loader)
    length = plan_length(len(batches), run.plan, config.train)
    log.say(setup.describe_length(config, length))
    if warning := setup.shared_memory_warning(config, run.plan, train_set, val_set):
        log.say(warning)
    loader = val_loader(val_set, config, run.accelerator)
    return Data(train_set, val_set, train_loader, loader, batches, length, metadata)


def begin_run(run: Run, train_set: CocoDetection) -> None:
    """Make the folder that of this run, once nothing can refuse it any more; every process calls it.

    Until then it may hold a run that is to be overwritten. A fresh start draws samples of the training images.

    Raises:
        StorageError: in every process: the folder cannot be written to.
        ConfigError: in every process: a tracker cannot start.
    """

    def begin() -> None:
        if run.state is None:
            write_samples(train_set, run.folder / "train_samples.png", 16)  # first: an image may be unreadable
        tracked = tensorboard_files(run.folder)
        start_trackers(run.config, run.accelerator)  # before anything is removed: one may have no network
        if run.state is None:
            if run.config.train.overwrite:
                remove_run(run.folder, tracked)
            expect_first_state(run.folder / "state")
        remove_partials(run.folder, WRITTEN)
        run.log.begin(None if run.state is None else read_metadata(run.state))
        write_text(run.folder / "config.yaml", run.settings)

    together(run.accelerator, begin)


def prepare_model(run: Run, train_set: CocoDetection) -> tuple[nn.Module, AcceleratedOptimizer, ModelEmaV3 | None]:
    """Build detector and optimizer as Accelerate prepares them, and the averaged detector (None without EMA).

    A resumed run fetches and reads no initial weights, since its state is loaded next.
    """
    config, accelerator, log = run.config, run.accelerator, run.log
    fresh = run.state is None
    model, transfer = initial_detector(config, train_set.classes, fresh)
    setup.freeze(model, config)
    for line in setup.describe_model(config, model, transfer):
        log.say(line)
    model.to(accelerator.device)
    decay = config.train.ema_decay
    if is_sharded(accelerator):
        keep_scalars_whole(model, accelerator)
        log.say(keep_known_layers(model, accelerator))
    ema = None if decay is None else ModelEmaV3(model, decay=decay, use_warmup=True)
    if config.train.compile == "layers":
        log.say(f"{compile_layers(model)} transformer layers are compiled when they first run, which takes a while")
    prepared, optimizer = accelerator.prepare(model, build_optimizer(config.optim, model))
    return prepared, optimizer, ema


def initial_detector(config: Config, classes: Sequence[str], fresh: bool = True) -> tuple[Detector, Transfer | None]:
    """Build the detector of a training with the weights it starts from, and report what `train.init_from` gave.

    Args:
        config: of the run.
        classes: names of the classes.
        fresh: False for a resumed run, whose weights are those of its state.
    """
    # Weights of a detector hold the backbone's, so its pretrained ones need not be fetched: there may be no network.
    own = fresh and config.train.init_from is None
    model = setup.build_detector(config, len(classes), initial_weights=own)
    transfer = setup.load_initial_weights(model, config, classes) if fresh else None
    if transfer is not None and any(is_pretrained(name) for name in transfer.fresh):  # another backbone
        model = setup.build_detector(config, len(classes))
        transfer = setup.load_initial_weights(model, config, classes)
    return model, transfer


def is_pretrained(name: str) -> bool:
    """Return True for a tensor of the backbone that pretrained weights have: no counts of batches, no offsets."""
    added = name.endswith(".num_batches_tracked") or ".conv_offset." in name
    return name.startswith("backbone.") and not added


def dry_run(run: Run, data: Data, model: nn.Module, optimizer: AcceleratedOptimizer) -> str:
    """Take two steps at the largest shape that the data can have, and describe their memory."""
    shape = setup.largest_shape(run.config, run.plan, data.train_set)
    return largest_step(model, optimizer, run.accelerator, **shape)


def build_trainer(
    run: Run,
    data: Data,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    ema: ModelEmaV3 | None,
    validate: Validate,
) -> Trainer:
    """Build the trainer, and load the state of a resumed run into it."""
    config, train_set = run.config, data.train_set
    stored = configuration.to_dict(setup.for_weights_file(config))

    def save(name: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        metadata = {
            **metadata,
            "thresholds": data.thresholds,
            **data.chosen,
            "validated_on": data.metadata["data"]["val"],
        }
        save_weights(run.folder / name, Weights(tensors, train_set.classes, train_set.category_ids, stored, metadata))
        if name == BEST and config.eval.report and data.validated:
            report_best(run, data, metadata)

    set_epoch_length(model, len(data.batches))
    trainer = Trainer(
        accelerator=run.accelerator,
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(config.train, data.length),
        batches=data.batches,
        folder=run.folder,
        log=run.log,
        config=config.train,
        length=data.length,
        accumulate=run.plan.accumulate,
        seed=config.seed,
        clip_norm=config.optim.clip_norm,
        metadata=data.metadata,
        validate=validate,
        save=save,
        ema=ema,
        check_targets=partial(check_targets, num_classes=train_set.num_classes),
    )
    if run.state is not None:
        trainer.resume(run.state)
        forget_other_measure(
            trainer, changes_of_measure(config, data.metadata["data"], read_metadata(run.state), run.state)
        )
    for loader in (data.train_loader, data.val_loader):
        loader.interrupted = lambda: trainer.asked_to_stop
    return trainer


def forget_other_measure(trainer: Trainer, changes: Sequence[str]) -> None:
    """Forget the best AP of a resumed run, and warn, if the validation has changed: a harder one would never beat it.

    Args:
        trainer: with the state of the run.
        changes: what has changed since; empty keeps the AP.
    """
    position = trainer.position
    if changes and position.best is not None:
        trainer.log.say(
            f"warning: AP is measured differently from now on ({'; '.join(changes)}), so the best one so far, "
            f"{position.best:.4f}, no longer counts. The weights of the next validation are saved as the best ones, "
            "whatever their AP."
        )
        position.best, position.worse = None, 0
