"""The training loop.

A detector is any `model(images, targets) -> named loss terms`. The random numbers of a step are a function of (seed,
step, process), and every batch one of (seed, epoch, position), so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.profiler import record_function

from brs_detr.engine.batch_plan import TrainingLength
from brs_detr.engine.config import TrainConfig
from brs_detr.engine.distributed import (
    average_unsharded_gradients,
    clip_gradients,
    from_main,
    gradient_norm,
    is_sharded,
    raise_together,
    seed_step,
    share_buffers,
    sum_over_processes,
    to_device,
    unsharded_weights,
)
from brs_detr.engine.logging import (
    LossMeter,
    Progress,
    RatioMeter,
    RunLog,
    Stopwatch,
    grouped,
    json_number,
    training_line,
    validation_line,
)
from brs_detr.engine.nonfinite import RunningStatistics, finite, handle_failed_step
from brs_detr.engine.optim import Schedule, set_learning_rate
from brs_detr.engine.signals import stop_signals
from brs_detr.engine.snapshot import TrainerState, TrainingParts
from brs_detr.engine.state import load_state, save_state
from brs_detr.engine.storage import NonFiniteError, StorageError, together
from brs_detr.exit_codes import ExitCode, Failure, Interruption
from brs_detr.ops.images import Batch

BEST, LAST = "best.safetensors", "last.safetensors"


class Batches(Protocol):
    """The training batches of this process."""

    def __len__(self) -> int:
        """Return the number of batches of an epoch, the same in every process."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of epoch 0, 1, ... from position `start`; always the same ones."""


class Trainer:
    """Trainer of a prepared detector: steps, epochs, evaluations and saved states; `brs_detr/train.py` orders them.

    `asked_to_stop`: a signal has arrived; `stopped`: it has ended the training.

    Args:
        accelerator: of the launch.
        model: returned by `accelerator.prepare`.
        optimizer: returned by `accelerator.prepare`; its groups carry "initial_lr".
        schedule: factor on the learning rate by step.
        batches: of this process; not prepared.
        folder: the run's folder.
        log: of the run.
        config: section `train` of the settings.
        length: of the training.
        accumulate: batches of an optimizer step.
        seed: of the run.
        clip_norm: largest norm of the gradients; None does not clip.
        metadata: stored with every state, see `setup.run_metadata`.
        validate: called in every process with the module to evaluate (the averaged one under EMA); returns the metrics,
            among them "AP", in the main process and {} in the others; "head" names the head they are of. None: no
            validation.
        save: called in the main process with (file name, state dict, metadata) to write a weights file.
        ema: the averaged model, or None.
        check_targets: called with every batch's targets while they are still on the CPU; raises if they are invalid.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        schedule: Schedule,
        batches: Batches,
        folder: Path,
        log: RunLog,
        config: TrainConfig,
        length: TrainingLength,
        accumulate: int,
        seed: int,
        clip_norm: float | None,
        metadata: dict[str, Any],
        validate: Callable[[nn.Module], dict[str, Any]] | None,
        save: Callable[[str, dict[str, Tensor], dict[str, Any]], None],
        ema: ModelEmaV3 | None = None,
        check_targets: Callable[[Sequence[dict[str, Any]]], None] | None = None,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.schedule, self.batches, self.config, self.length = schedule, batches, config, length
        self.accumulate, self.seed, self.clip_norm, self.metadata = accumulate, seed, clip_norm, metadata
        self.folder, self.log, self.validate, self.save, self.ema = folder, log, validate, save, ema
        self.check_targets = check_targets
        self.meter, self.watch = LossMeter(), Stopwatch()
        self.ratios = RatioMeter(accelerator.unwrap_model(model) if config.gradient_ratio else None)
        self.epoch_sums: Counter[str] = Counter()
        self.position = TrainerState(steps_per_epoch=self.steps_per_epoch)
        self.statistics = RunningStatistics(model)
        self.asked_to_stop = self.stopped = False
        self.stop_signal = "a stop signal"  # its name, in the process that received it
        self.lr = 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimizer steps per epoch; the last may accumulate fewer batches."""
        return math.ceil(len(self.batches) / self.accumulate)

    @property
    def step_of_schedule(self) -> int:
        """Return the steps of this run's length that are done; not `position.step` if epochs had other numbers."""
        return self.position.epoch * self.steps_per_epoch + self.position.step_in_epoch

    def resume(self, state: Path) -> None:
        """Continue from a saved state; every process calls it, before the first epoch.

        Raises:
            CheckpointError: the state is damaged or of another detector.
        """
        for note in load_state(state, self._training()):
            self.log.say(note)
        if self.position.convert(self.steps_per_epoch, by_steps=self.config.steps is not None):
            self.log.say(
                f"an epoch has another number of optimizer steps now, {self.steps_per_epoch:,}: {self.position.epoch} "
                f"epochs and {self.position.step_in_epoch:,} steps are done; the learning rate goes on from there"
            )

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Run the epoch loop inside: whatever interrupts it, the state of the last completed step is saved.

        A stop signal ends the block early and sets `stopped`.

        Raises:
            Interruption: a process gets no more batches (the state is saved).
            StorageError: the state cannot be written.
        """
        with stop_signals(self._ask_to_stop):
            try:
                yield
            except Interruption as error:
                self.save_state()
                if error.code != ExitCode.INTERRUPTED:
                    raise Interruption(
                        f"{error} The state is saved at step {self.position.step}.", error.code
                    ) from error
                self.stopped = True
            if self.stopped:
                self.log.say(
                    f"Received {self.stop_signal}: checkpoint saved at step {self.position.step}. Resume with --resume."
                )

    def epochs(self) -> Iterator[int]:
        """Yield the remaining epochs, from 1: to the last, to a stop signal, or until AP no longer improves."""
        position, config = self.position, self.config
        if position.epoch >= self.length.epochs:
            self.log.say(
                f"this run is complete: {position.epoch} of {self.length.epochs} epochs. To train longer, raise "
                "train.epochs or train.steps and set train.allow_changes=true."
            )
            return
        self._forget_lost_best()
        while position.epoch < self.length.epochs:
            if config.patience is not None and position.worse >= config.patience:  # checked first, for resumed runs
                self.log.say(f"Early stopping: no improvement in {position.worse} validations.")
                return
            yield position.epoch + 1
            between = self.is_evaluated(position.epoch) and position.epoch < self.length.epochs
            if between and sum_over_processes(float(self.asked_to_stop), self.accelerator) > 0:
                self.stopped = True  # with the state saved after the evaluation
                return

    def is_evaluated(self, epoch: int) -> bool:
        """Return True if epoch 1, 2, ... ends with an evaluation."""
        return epoch % self.length.eval_every == 0 or epoch == self.length.epochs

    def train_epoch(self) -> None:
        """Train the rest of the current epoch.

        Raises:
            Interruption: on a stop signal, or if a process gets no more batches; the position is that of the last
                completed step, and nothing is saved yet.
            NonFiniteError: a loss or gradient was not finite and `on_nonfinite` is "stop", or too many were.
            StorageError: the state cannot be written.
        """
        position, config = self.position, self.config
        entered_at = position.step_in_epoch
        self.epoch_sums.clear()
        self.model.train()
        title = f"epoch {position.epoch + 1}/{self.length.epochs}"
        main = self.accelerator.is_main_process
        progress = Progress(title, self.steps_per_epoch, position.step_in_epoch, self.log.say, self.log.note, show=main)
        batches = self.batches.epoch(position.epoch, position.step_in_epoch * self.accumulate)
        self.watch.reset()
        try:
            for _ in range(position.step_in_epoch, self.steps_per_epoch):
                waiting = time.perf_counter()
                group = self._next_group(batches)
                self.watch.add(time.perf_counter() - waiting, sum(len(images) for images, _ in group))
                stop = self.step(group)
                position.step, position.step_in_epoch = position.step + 1, position.step_in_epoch + 1
                progress.step()
                if position.step % config.log_every == 0 or position.step_in_epoch == self.steps_per_epoch:
                    progress.report(self._report())
                if stop:
                    raise Interruption("Stop requested.", ExitCode.INTERRUPTED)
                if config.save_every and position.step % config.save_every == 0:
                    self.save_state()
        finally:
            progress.close()
        if entered_at == 0:  # the terms of the steps before a resume are not known
            self._warn_of_zero_losses()
        position.epoch, position.step_in_epoch = position.epoch + 1, 0

    def _next_group(self, batches: Iterator[Batch]) -> list[Batch]:
        """Return the batches of a step once every process has its own, so that no process waits inside a step.

        Raises:
            Interruption: in every process, if one was interrupted while it waited for data.
        """
        group, interruption = [], None
        try:
            group = list(islice(batches, self.accumulate))
        except Interruption as error:
            interruption = error
        raise_together(interruption, self.accelerator)
        return group

    def step(self, group: list[Batch]) -> bool:
        """Take one optimizer step over accumulated batches; return True if any process was asked to stop."""
        accelerator, position = self.accelerator, self.position
        seed_step(self.seed, position.step, accelerator.process_index)
        self.lr = set_learning_rate(self.optimizer, self.schedule.factor(self.step_of_schedule, position.step))
        self.statistics.keep()
        all_terms = []
        for index, (images, targets) in enumerate(group):
            last = index + 1 == len(group)
            if self.check_targets is not None:
                self.check_targets(targets)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                # Accelerate puts the forward pass under autocast itself, but not that of a sharded model.
                with accelerator.autocast(), record_function("step: forward"):
                    terms = self.model(images.to(accelerator.device), to_device(targets, accelerator.device))
                with record_function("step: backward"):
                    # The mean over accumulated batches, as DDP takes it over processes: independent of the split.
                    accelerator.backward(torch.stack(list(terms.values())).sum() / len(group))
            all_terms.append({name: term.detach() for name, term in terms.items()})
        if is_sharded(accelerator):
            average_unsharded_gradients(self.model)
        accelerator.unscale_gradients()
        norm = gradient_norm(self.model).to(accelerator.device, torch.float32)
        magnitudes = self.ratios.take(norm)
        healthy, stop = self._agree(all_terms, norm)
        if healthy:
            position.skipped_in_a_row = 0
            if self.clip_norm is not None:
                clip_gradients(self.model, norm, self.clip_norm)
            with record_function("step: optimizer"):
                self.optimizer.step()
            if self.ema is not None:
                self.ema.update(accelerator.unwrap_model(self.model), step=position.step)
            for terms in all_terms:
                self.meter.add({**terms, "gradient_norm": norm, **magnitudes})
        else:
            self._not_finite(group, all_terms)
            if accelerator.scaler is not None and accelerator.scaler.is_enabled():
                accelerator.scaler.update()  # ends the scaler's step, which unscaling the gradients has begun
        self.optimizer.zero_grad()
        return stop

    def _agree(self, all_terms: list[dict[str, Tensor]], norm: Tensor) -> tuple[bool, bool]:
        """Return (is_finite, stop_requested), agreed across ranks with a single all-reduce."""
        total = torch.stack([value.float() for terms in all_terms for value in terms.values()]).sum()
        # Under fp16 the scaler handles an overflowing gradient: it skips the step and halves its scale. Once the scale
        # is 1, a gradient that still overflows would be skipped for ever, so it counts as not finite.
        scaler = self.accelerator.scaler
        scaled = scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1
        bad = ~finite(total, total if scaled else norm) | ~torch.isfinite(self.statistics.largest(total))
        flags = torch.stack([bad.float(), torch.full_like(total, float(self.asked_to_stop))])
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags, reduction="sum")
        failed, stops = flags.tolist()
        return failed == 0, stops > 0

    def _not_finite(self, group: list[Batch], all_terms: list[dict[str, Tensor]]) -> None:
        """Diagnose a failed step, and raise or skip it as the settings say."""
        accelerator, config, position = self.accelerator, self.config, self.position
        stop = config.on_nonfinite == "stop"
        what = handle_failed_step(
            all_terms,
            group,
            accelerator.unwrap_model(self.model),
            self.statistics,
            accelerator=accelerator,
            step=position.step,
            folder=self.folder if stop or position.skipped == 0 else None,  # the first one only: it may be gigabytes
            seed=self.seed,
            metadata=self.metadata,
        )
        position.skipped += 1
        position.skipped_in_a_row += 1
        max_skipped = min(config.max_skipped, self.length.epochs * self.steps_per_epoch)
        if stop:
            advice = "To skip such steps, set train.on_nonfinite=skip."
        elif position.skipped_in_a_row >= max_skipped:
            advice = (
                f"{max_skipped} steps in a row were skipped (train.max_skipped). Lower optim.lr, or check the images."
            )
        else:
            self.log.say(f"step {position.step}: {what}; skipped ({position.skipped} so far)")
            self.log.metrics("skipped", position.step, {"reason": what, "count": position.skipped})
            return
        accelerator.wait_for_everyone()  # a launcher kills all processes as soon as one has ended
        raise NonFiniteError(f"step {position.step}: {what}. {advice}")

    def _report(self) -> str:
        """Log the means since the last report; return them as a short line."""
        terms, speed = self.meter.mean(self.accelerator), self.watch.read()
        self.watch.reset()
        speed["images_per_s"] *= self.accelerator.num_processes
        norm, ratios = terms.pop("gradient_norm", math.nan), self.ratios.pop(terms)
        loss, position = sum(terms.values()) if terms else math.nan, self.position
        remaining = self.length.epochs * self.steps_per_epoch - self.step_of_schedule
        epoch = position.epoch + position.step_in_epoch / self.steps_per_epoch
        values: dict[str, Any] = {"epoch": epoch, "lr": self.lr}
        values |= {"loss": json_number(loss), "gradient_norm": json_number(norm), **speed, "terms": terms}
        values |= {"gradient_ratio": ratios} if ratios else {}
        if torch.cuda.is_available():
            values["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.log.metrics("train", position.step, values)
        self.epoch_sums.update(grouped(terms))
        return training_line(loss, terms, self.lr, speed, remaining)

    def _warn_of_zero_losses(self) -> None:
        """Warn of heads whose loss was zero for an entire epoch: no anchor was positive, so they learn nothing."""
        silent = [name for name, value in self.epoch_sums.items() if value == 0]
        if silent:
            self.log.say(
                f"warning: {', '.join(silent)} loss was zero throughout epoch {self.position.epoch + 1}: no "
                "anchor matched any ground truth. Check anchor and image sizes (see train_samples.png)."
            )

    def evaluate(self) -> None:
        """Evaluate, and save the evaluated weights as the last ones, and as the best ones if they are.

        After an error the position is again that of the epoch's last step, so that a resumed run begins with this
        evaluation. The state is saved then, unless another process may go on.

        Raises:
            Interruption: before the end; the state is not saved yet.
            StorageError: the weights cannot be written.
        """
        position = self.position
        before = dataclasses.replace(position, epoch=position.epoch - 1, step_in_epoch=self.steps_per_epoch)
        try:
            self._evaluate()
        except Exception as error:
            vars(position).update(vars(before))
            # Saving waits for all processes. A StorageError is of `together`, which raises it in all of them.
            everywhere = self.accelerator.num_processes == 1 or isinstance(error, StorageError)
            if everywhere and not isinstance(error, Interruption):
                with contextlib.suppress(Failure):  # the first error says what to do
                    self.save_state()
                    self.log.say(f"validation failed: state saved at step {position.step}. Resume with --resume.")
            raise

    def _evaluate(self) -> None:
        accelerator, position = self.accelerator, self.position
        self._forget_lost_best()
        module = self.ema.module if self.ema is not None else accelerator.unwrap_model(self.model)
        if accelerator.num_processes > 1:
            share_buffers(module)
        with unsharded_weights(module, accelerator):
            metrics = dict(self.validate(module)) if self.validate is not None else {}
        weights = module.state_dict() if self.ema is not None else accelerator.get_state_dict(self.model)
        score = from_main(metrics.get("AP", math.nan), accelerator)
        better = not math.isnan(score) and (position.best is None or score > position.best)
        position.best, position.worse = (score, 0) if better else (position.best, position.worse + 1)
        if metrics:
            self.log.metrics("val", position.step, {"epoch": position.epoch, **metrics})
            head = metrics.pop("head", None)  # the weights file has it by another name
            self.log.say(validation_line(position.epoch, self.length.epochs, metrics, position.best, better, head))
        facts = {"epoch": position.epoch, "step": position.step, "metrics": metrics}
        names = (LAST, BEST) if better or self.validate is None else (LAST,)
        together(accelerator, lambda: [self.save(name, weights, facts) for name in names])

    def _forget_lost_best(self) -> None:
        """Warn if the best weights were deleted; the weights of the next validation are then the best that exist."""
        position = self.position
        lost = position.best is not None and not (self.folder / BEST).is_file()
        if from_main(float(lost), self.accelerator):
            self.log.say(
                f"warning: {self.folder / BEST} is gone, whose AP was {position.best:.4f}. The weights of the next "
                "validation are saved as the best ones, whatever their AP."
            )
            position.best, position.worse = None, 0

    def _training(self) -> TrainingParts:
        average = self.ema.module if self.ema is not None else None
        return TrainingParts(self.accelerator, self.model, self.optimizer, average, self.position, self.meter)

    def save_state(self) -> None:
        """Save a state from which the run can be resumed; every process calls it.

        Raises:
            StorageError: it cannot be written; the previous state stays.
        """
        self.meter.share(self.accelerator)
        if is_sharded(self.accelerator):  # all continue with the saved batch statistics, as a resumed run does
            share_buffers(self.model)
        for note in save_state(self.folder / "state", self._training(), self.metadata):
            self.log.say(note)

    def _ask_to_stop(self, number: signal.Signals) -> None:
        if number == signal.SIGINT and not self.asked_to_stop:
            self.log.say("Received SIGINT: stopping after this step. Press Ctrl-C again to end without saving.")
        self.stop_signal, self.asked_to_stop = number.name, True
