"""The training loop.

It knows a detector only by `model(images, targets) -> named loss terms`. Every random draw of a step follows from
(seed, step, process), every batch from (seed, epoch, position), so a resumed run repeats the one that was never killed.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.profiler import record_function

from brs_detr.engine.distributed import (
    average_whole_gradients,
    clip_gradients,
    gradient_norm,
    is_sharded,
    raise_together,
    seed_step,
    share_buffers,
    to_device,
    whole_weights,
)
from brs_detr.engine.logging import LossMeter, Progress, RunLog, Stopwatch, duration, grouped, json_number
from brs_detr.engine.nonfinite import (
    NonFiniteError,
    RunningStatistics,
    describe_reports,
    finite,
    inspect_step,
    save_batch,
)
from brs_detr.engine.optim import Schedule, set_learning_rate
from brs_detr.engine.signals import stop_signals
from brs_detr.engine.snapshot import TrainerState, Training
from brs_detr.engine.state import load_state, save_state
from brs_detr.engine.storage import StorageError, together
from brs_detr.exit_codes import ExitCode, Interruption
from brs_detr.ops.images import Batch

BEST, LAST = "best.safetensors", "last.safetensors"


class Batches(Protocol):
    """The training batches of this process."""

    def __len__(self) -> int:
        """Batches of an epoch, the same number in every process."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of epoch 0, 1, ... from the one at position `start`; the same ones whenever asked."""


@dataclass(frozen=True)
class Settings:
    """Numbers of the loop; see `TrainConfig` for their meaning. `facts` go into every saved state."""

    epochs: int
    accumulate: int
    seed: int
    clip_norm: float | None
    log_every: int
    eval_every: int
    save_every: int | None
    patience: int | None
    on_nonfinite: str
    max_skipped: int
    facts: dict[str, Any]


class Trainer:
    """Trains a prepared detector: steps, epochs, evaluations and saved states, which `brs_detr/train.py` puts in order.

    `asked_to_stop`: a signal has come; `stopped`: it has ended the training.

    Args:
        accelerator: of the launch.
        model: returned by `accelerator.prepare`.
        optimizer: returned by `accelerator.prepare`; its groups carry "initial_lr".
        schedule: factor on the learning rate by step.
        batches: of this process; not prepared.
        folder: the run's folder.
        log: where to report.
        settings: the loop's numbers.
        validate: called with the module to evaluate (the averaged one under EMA) in every process; returns the
            figures, among them "AP", in the main process and {} in the others. None: no validation.
        save: called in the main process with (file name, state dict, facts) to write a weights file.
        ema: the averaged model, or None.
        check_targets: called with every batch's targets while they still lie on the CPU; raises where they are wrong.
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
        settings: Settings,
        validate: Callable[[nn.Module], dict[str, float]] | None,
        save: Callable[[str, dict[str, Tensor], dict[str, Any]], None],
        ema: ModelEmaV3 | None = None,
        check_targets: Callable[[Sequence[dict[str, Any]]], None] | None = None,
    ):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.schedule, self.batches, self.settings = schedule, batches, settings
        self.folder, self.log, self.validate, self.save, self.ema = folder, log, validate, save, ema
        self.check_targets = check_targets
        self.meter, self.watch = LossMeter(), Stopwatch()
        self.epoch_sums: Counter[str] = Counter()
        self.position = TrainerState()
        self.statistics = RunningStatistics(model)
        self.asked_to_stop = self.stopped = False
        self.lr = 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last may hold fewer accumulated batches."""
        return math.ceil(len(self.batches) / self.settings.accumulate)

    def resume(self, state: Path) -> None:
        """Take up the training where a saved state left it; every process calls it, before the first epoch.

        Raises:
            CheckpointError: the state is damaged, or of another detector.
        """
        load_state(state, self._training())

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Run the epoch loop inside: whatever interrupts it, the state of the last completed step is saved.

        A stop signal ends the block early and sets `stopped`.

        Raises:
            Interruption: the batches of some process do not come (the state is saved).
            StorageError: the state could not be written.
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
                    f"Received a stop signal: checkpoint saved at step {self.position.step}. Resume with --resume."
                )

    def epochs(self) -> Iterator[int]:
        """Count the epochs that are left, from 1 on: to the last, to a stop signal, or until AP no longer improves."""
        position, settings = self.position, self.settings
        if position.epoch >= settings.epochs:
            self.log.say(
                f"this run is complete: {position.epoch} of {settings.epochs} epochs; to go on, "
                "raise its length and set train.allow_changes=true"
            )
            return
        self._forget_lost_best()
        while position.epoch < settings.epochs:
            if settings.patience is not None and position.worse >= settings.patience:  # first: also of a resumed run
                self.log.say(f"no better validation for {position.worse} times: training ends early")
                return
            yield position.epoch + 1
            if self.is_evaluated(position.epoch) and position.epoch < settings.epochs and self._told_to_stop():
                self.stopped = True  # with what was saved after the evaluation
                return

    def is_evaluated(self, epoch: int) -> bool:
        """Whether epoch 1, 2, ... ends with an evaluation."""
        return epoch % self.settings.eval_every == 0 or epoch == self.settings.epochs

    def train_epoch(self) -> None:
        """Train the rest of the epoch under way.

        Raises:
            Interruption: by a stop signal, or since the batches of some process do not come; the position is that of
                the last completed step, and nothing is saved yet.
            NonFiniteError: a loss or gradient was not finite and `on_nonfinite` is "stop", or too many were.
            StorageError: the state could not be written.
        """
        position, settings = self.position, self.settings
        self.model.train()
        title = f"epoch {position.epoch + 1}/{settings.epochs}"
        main = self.accelerator.is_main_process
        progress = Progress(title, self.steps_per_epoch, position.step_in_epoch, self.log.say, self.log.note, show=main)
        batches = self.batches.epoch(position.epoch, position.step_in_epoch * settings.accumulate)
        self.watch.reset()
        try:
            for _ in range(position.step_in_epoch, self.steps_per_epoch):
                waiting = time.perf_counter()
                group = self._next_group(batches)
                self.watch.add(time.perf_counter() - waiting, sum(len(images) for images, _ in group))
                stop = self.step(group)
                position.step, position.step_in_epoch = position.step + 1, position.step_in_epoch + 1
                progress.step()
                if position.step % settings.log_every == 0 or position.step_in_epoch == self.steps_per_epoch:
                    progress.report(self._report())
                if stop:
                    raise Interruption("Received a stop signal.", ExitCode.INTERRUPTED)
                if settings.save_every and position.step % settings.save_every == 0:
                    self.save_state()
        finally:
            progress.close()
        self._warn_of_silent_heads()
        position.epoch, position.step_in_epoch = position.epoch + 1, 0

    def _next_group(self, batches: Iterator[Batch]) -> list[Batch]:
        """The batches of a step, when every process has its own: none may wait within a step for one without.

        Raises:
            Interruption: in every process, where one was interrupted while it waited.
        """
        group, interruption = [], None
        try:
            group = list(islice(batches, self.settings.accumulate))
        except Interruption as error:
            interruption = error
        raise_together(interruption, self.accelerator)
        return group

    def step(self, group: list[Batch]) -> bool:
        """One optimizer step over accumulated batches; True when some process was told to stop."""
        accelerator, position = self.accelerator, self.position
        seed_step(self.settings.seed, position.step, accelerator.process_index)
        self.lr = set_learning_rate(self.optimizer, self.schedule.factor(position.step))
        self.statistics.keep()
        all_terms = []
        for index, (images, targets) in enumerate(group):
            last = index + 1 == len(group)
            if self.check_targets is not None:
                self.check_targets(targets)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                # Accelerate wraps the forward pass itself, but not of a sharded model
                with accelerator.autocast(), record_function("step: forward"):
                    terms = self.model(images.to(accelerator.device), to_device(targets, accelerator.device))
                with record_function("step: backward"):
                    # a mean over the accumulated batches: what DDP's mean over processes is, for the same reason
                    accelerator.backward(torch.stack(list(terms.values())).sum() / len(group))
            all_terms.append({name: term.detach() for name, term in terms.items()})
        if is_sharded(accelerator):
            average_whole_gradients(self.model)
        accelerator.unscale_gradients()
        norm = gradient_norm(self.model).to(accelerator.device, torch.float32)
        healthy, stop = self._agree(all_terms, norm)
        if healthy:
            position.skipped_in_a_row = 0
            if self.settings.clip_norm is not None:
                clip_gradients(self.model, norm, self.settings.clip_norm)
            with record_function("step: optimizer"):
                self.optimizer.step()
            if self.ema is not None:
                self.ema.update(accelerator.unwrap_model(self.model), step=position.step)
            for terms in all_terms:
                self.meter.add({**terms, "gradient_norm": norm})
        else:
            self._not_finite(group, all_terms)
            if accelerator.scaler is not None and accelerator.scaler.is_enabled():
                accelerator.scaler.update()  # ends the scaler's step, which unscaling the gradients has begun
        self.optimizer.zero_grad()
        return stop

    def _agree(self, all_terms: list[dict[str, Tensor]], norm: Tensor) -> tuple[bool, bool]:
        """Return (is_finite, stop_requested), agreed across ranks with a single all-reduce."""
        total = torch.stack([value.float() for terms in all_terms for value in terms.values()]).sum()
        # under fp16 an overflowing gradient is the scaler's business: it skips the step and halves its scale; what is
        # still not finite where gradients are no longer enlarged would be skipped for ever
        scaler = self.accelerator.scaler
        enlarged = scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1
        bad = ~finite(total, total if enlarged else norm) | ~torch.isfinite(self.statistics.largest(total))
        flags = torch.stack([bad.float(), torch.full_like(total, float(self.asked_to_stop))])
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags, reduction="sum")
        failed, stops = flags.tolist()
        return failed == 0, stops > 0

    def _not_finite(self, group: list[Batch], all_terms: list[dict[str, Tensor]]) -> None:
        accelerator, settings, step = self.accelerator, self.settings, self.position.step
        model = accelerator.unwrap_model(self.model)
        what, process = describe_reports(gather_object([inspect_step(all_terms, group, model)]))
        self.statistics.restore()
        self.position.skipped += 1
        self.position.skipped_in_a_row += 1
        if settings.on_nonfinite == "stop" or self.position.skipped == 1:
            several = accelerator.num_processes > 1
            mine, theirs = (
                self.folder / f"nonfinite-{step}{f'-process{rank}' if several else ''}.pt"
                for rank in (accelerator.process_index, process)
            )
            facts = {"process": accelerator.process_index, "facts": settings.facts, "seed": settings.seed}
            try:
                save_batch(mine, step=step, batches=group, model=model, **facts)
                what += f"; the batch is saved, see `python -m brs_detr replay {theirs}`"
            except StorageError as error:
                what += f"; the batch is not saved ({error})"
        if settings.on_nonfinite == "stop":
            accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended
            raise NonFiniteError(f"step {step}: {what}. To skip such steps and go on: train.on_nonfinite=skip")
        most = min(settings.max_skipped, settings.epochs * self.steps_per_epoch)
        if self.position.skipped_in_a_row >= most:
            accelerator.wait_for_everyone()
            raise NonFiniteError(
                f"step {step}: {what}. {most} steps in a row were skipped and nothing is learned any more; lower "
                "optim.lr, or look at the images (train.max_skipped is the number of steps)."
            )
        self.log.say(f"step {step}: {what}; skipped ({self.position.skipped} so far)")
        self.log.metrics("skipped", step, {"reason": what, "count": self.position.skipped})

    def _report(self) -> str:
        """Write the means since the last report to the log; returns them as a short line."""
        terms, speed = self.meter.mean(self.accelerator), self.watch.read()
        self.watch.reset()
        speed["images_per_s"] *= self.accelerator.num_processes
        norm = terms.pop("gradient_norm", math.nan)
        loss, position = sum(terms.values()) if terms else math.nan, self.position
        remaining = self.settings.epochs * self.steps_per_epoch - position.step
        values = {"epoch": position.epoch + position.step_in_epoch / self.steps_per_epoch, "lr": self.lr}
        values |= {"loss": json_number(loss), "gradient_norm": json_number(norm), **speed, "terms": terms}
        if torch.cuda.is_available():
            values["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.log.metrics("train", position.step, values)
        self.epoch_sums.update(grouped(terms))
        parts = " ".join(f"{name} {value:.3g}" for name, value in grouped(terms).items())
        return (
            f"loss {loss:.4g} ({parts}) lr {self.lr:.2g} {speed['images_per_s']:.3g} images/s "
            f"step {speed['step_s']:.3g} s (data {speed['data_s']:.2g} s) ETA {duration(remaining * speed['step_s'])}"
        )

    def _warn_of_silent_heads(self) -> None:
        """Say which heads had no loss in the whole epoch: nothing was ever assigned to them, and they learn nothing."""
        silent = [name for name, value in self.epoch_sums.items() if value == 0]
        if silent:
            self.log.say(
                f"warning: {', '.join(silent)} loss was zero for the whole of epoch {self.position.epoch + 1}: no "
                "anchor matched any ground truth. Check anchor and image sizes (see train_samples.png)."
            )
        self.epoch_sums.clear()

    def _told_to_stop(self) -> bool:
        """Is any process told to stop, the same answer in every process."""
        told = torch.tensor(float(self.asked_to_stop), device=self.accelerator.device)
        return self.accelerator.reduce(told, reduction="sum").item() > 0

    def evaluate(self) -> None:
        """Evaluate, keep the weights just evaluated as the last ones, and as the best ones where they are.

        Raises:
            Interruption: before the end; the position is again that of the epoch's last step, so that a resumed run
                begins with this evaluation.
            StorageError: the weights could not be written.
        """
        position = self.position
        try:
            self._evaluate()
        except Interruption:
            position.epoch, position.step_in_epoch = position.epoch - 1, self.steps_per_epoch
            raise

    def _evaluate(self) -> None:
        accelerator, position = self.accelerator, self.position
        self._forget_lost_best()
        module = self.ema.module if self.ema is not None else accelerator.unwrap_model(self.model)
        if accelerator.num_processes > 1:
            share_buffers(module)
        with whole_weights(module, accelerator):
            figures = self.validate(module) if self.validate is not None else {}
        weights = module.state_dict() if self.ema is not None else accelerator.get_state_dict(self.model)
        score = self._from_main(figures.get("AP", math.nan))
        better = not math.isnan(score) and (position.best is None or score > position.best)
        position.best, position.worse = (score, 0) if better else (position.best, position.worse + 1)
        if figures:
            self.log.metrics("val", position.step, {"epoch": position.epoch, **figures})
            best = math.nan if position.best is None else position.best
            mark = " (best so far)" if better else f" (best {best:.4f})"
            shown = " ".join(f"{name} {value:.4f}" for name, value in figures.items() if name in ("AP", "AP50", "AP75"))
            if missing := figures.get("images_left_out"):
                shown += f" on {figures['images']:,} of {figures['images'] + missing:,} images"
            self.log.say(f"epoch {position.epoch}/{self.settings.epochs} validation: {shown}{mark}")
        facts = {"epoch": position.epoch, "step": position.step, "metrics": figures}
        names = (LAST, BEST) if better or self.validate is None else (LAST,)
        together(accelerator, lambda: [self.save(name, weights, facts) for name in names])

    def _from_main(self, value: float) -> float:
        """The main process's value, in every process."""
        if self.accelerator.num_processes == 1:
            return value
        mine = torch.tensor([value if self.accelerator.is_main_process else 0.0], dtype=torch.float64)
        return self.accelerator.reduce(mine.to(self.accelerator.device), reduction="sum").item()

    def _forget_lost_best(self) -> None:
        """Where the best weights were deleted, say so; those validated next are then the best ones that there are."""
        position = self.position
        lost = position.best is not None and not (self.folder / BEST).is_file()
        if self._from_main(float(lost)):
            self.log.say(
                f"warning: {self.folder / BEST} is gone, whose AP was {position.best:.4f}; the weights of the next "
                "validation are kept as the best ones, whatever their AP"
            )
            position.best = None

    def _training(self) -> Training:
        average = self.ema.module if self.ema is not None else None
        return Training(self.accelerator, self.model, self.optimizer, average, self.position, self.meter)

    def save_state(self) -> None:
        """Save all that a resumed run needs; every process calls it.

        Raises:
            StorageError: it could not be written; the state before stays.
        """
        self.meter.share(self.accelerator)
        if is_sharded(self.accelerator):  # the main process's batch statistics are saved, and count for all from here
            share_buffers(self.model)
        for note in save_state(self.folder / "state", self._training(), self.settings.facts):
            self.log.say(note)

    def _ask_to_stop(self, number: signal.Signals) -> None:
        if number == signal.SIGINT and not self.asked_to_stop:
            self.log.say("stopping after this step; press Ctrl-C again to end without saving")
        self.asked_to_stop = True
