"""Logging of a run: log.txt, metrics.jsonl, trackers, and the progress of an epoch.

Loss terms stay on the device until they are reported, so that logging does not synchronize every step. Progress is a
bar on a terminal, and plain lines in a log file or pipe.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from brs_detr.engine.storage import describe_fault, write_text
from brs_detr.losses.gradient_ratio import watch_gradients

SHOWN = ("AP", "AP50", "AP75")  # of the figures of a validation, besides the AP of masks and of each head


class RunLog:
    """log.txt, metrics.jsonl and Accelerate's trackers of one run; silent on all but the main process.

    Until `begin` is called, lines of log.txt are held back: the files may be of a run that a start overwrites, if
    nothing refuses it. From then on, a line that cannot be written does not end the run: a warning is printed once on
    stderr, and the next line is tried again. A folder that was removed is created again.

    Args:
        folder: the run's folder.
        accelerator: of the launch; its trackers, if any were initialized, get every metric too.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.text_path, self.metrics_path = folder / "log.txt", folder / "metrics.jsonl"
        self.held: list[str] | None = []  # lines of log.txt from before the beginning; None after it
        self.torn: set[Path] = set()  # files whose last line may be incomplete
        self.warned: set[str] = set()  # subjects of warnings printed so far

    def begin(self, resumed_at: dict[str, Any] | None = None) -> None:
        """Make the files those of this run, and write the lines that were held back.

        Args:
            resumed_at: {"step", "epoch"} completed by the resumed state: later lines of metrics.jsonl are of steps and
                validations that will be repeated, and are dropped; None for a fresh run, which starts with empty files.

        Raises:
            StorageError: the files cannot be written.
        """
        if not self.main:
            return
        if resumed_at is None:
            write_text(self.metrics_path, "")
            write_text(self.text_path, "")
        else:
            kept = [line for line in read_metrics(self.metrics_path) if not _is_later(line, resumed_at)]
            write_text(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))
        held, self.held = self.held, None
        self._append(self.text_path, "".join(held or []))

    def say(self, text: str) -> None:
        """Print a message and append it to log.txt, without breaking a progress bar."""
        if not self.main:
            return
        with contextlib.suppress(OSError):  # stdout may be a file on a full disk
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        self.note(text)

    def note(self, text: str) -> None:
        """Append a message to log.txt only."""
        if not self.main:
            return
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        if self.held is not None:
            self.held.append(line)
        else:
            self._append(self.text_path, line)

    def metrics(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line `{"kind": ..., "step": ..., **values}` and send its numbers to the trackers.

        Args:
            kind: "train", "val", ...
            step: optimizer steps done.
            values: JSON values; numbers and dictionaries of numbers reach the trackers.
        """
        if not self.main:
            return
        self._append(self.metrics_path, json.dumps({"kind": kind, "step": step, **values}) + "\n")
        flat: dict[str, float] = {}
        for name, value in values.items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{kind}/{name}{'/' if key else ''}{key}": v for key, v in inner if isinstance(v, (int, float))}
        self._track(lambda: self.accelerator.log(flat, step=step))

    def images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Send images, by name (H, W, 3) uint8, to the trackers that take some: TensorBoard, Weights & Biases."""
        if not self.main:
            return
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                batches = {name: image[None] for name, image in images.items()}
                self._track(partial(tracker.log_images, batches, step, dataformats="NHWC"))
            elif tracker.name == "wandb":
                lists = {name: [image] for name, image in images.items()}
                self._track(partial(tracker.log_images, lists, step))

    def end(self) -> None:
        """Flush and close the trackers; every process calls it."""
        self._track(self.accelerator.end_training)

    def _append(self, path: Path, text: str) -> None:
        """Append to a file of the run; a failure is a warning."""
        begin = "\n" if path in self.torn else ""
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True)
                self._warn("folder", f"{path.parent}: was removed while the run was writing to it; created again.")
            with path.open("a", encoding="utf-8") as file:
                file.write(begin + text)
            self.torn.discard(path)
        except OSError as error:
            self.torn.add(path)
            fact, advice = describe_fault(path.parent, error)
            self._warn(path.name, f"{path.name} misses lines: {fact}. {advice}; the run continues meanwhile.")

    def _track(self, work: Callable[[], object]) -> None:
        """Call a tracker; whatever it raises is a warning, since no tracker is worth ending a training."""
        try:
            work()
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self._warn("trackers", f"train.trackers: metrics are missing ({reason}). The run continues without them.")

    def _warn(self, about: str, text: str) -> None:
        """Print a warning on stderr, once per subject: log.txt may be what cannot be written."""
        if about not in self.warned:
            self.warned.add(about)
            with contextlib.suppress(OSError):
                tqdm.write(f"warning: {text}", file=sys.stderr)


class _ToRunLog(logging.Handler):
    """Hands the records of this process to a run's log, and those of loader workers forked from it to stderr."""

    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.WARNING)
        self.log, self.process = log, os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as a line of the log."""
        if os.getpid() != self.process:  # a fork may have been made while a thread held the console's lock
            logging.lastResort.handle(record)  # type: ignore[union-attr]
            return
        self.log.say(f"{record.levelname.lower()}: {record.getMessage()}")


@contextlib.contextmanager
def warnings_in(log: RunLog) -> Iterator[None]:
    """Let what the package warns of through `logging` reach a run's log inside, and not only stderr.

    Lower parts, such as the detectors, know no run. In all but the main process, whose log is silent, nothing changes.
    """
    logger, handler = logging.getLogger(__package__.partition(".")[0]), _ToRunLog(log)
    if log.main:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _is_later(line: dict[str, Any], resumed_at: dict[str, Any]) -> bool:
    """Return True if a line was written after the state that the run resumes from."""
    # A state may be saved between the last step of an epoch and its validation, so the step alone does not decide. Nor
    # does the epoch: a run whose length is in steps counts fewer epochs once they have become longer.
    step, resumed_step = line["step"], resumed_at["step"]
    unseen = line["kind"] == "val" and line["epoch"] > resumed_at["epoch"]
    # A skipped step is logged by its index, the number of steps done before it.
    return bool(step > resumed_step or (step == resumed_step and (unseen or line["kind"] == "skipped")))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a metrics.jsonl; lines cut short by a kill or a full disk are skipped.

    Every line returned has "kind" and "step", and a validation's also "epoch".
    """
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and _has_step(line):
                lines.append(line)
    return lines


def _has_step(line: dict[str, Any]) -> bool:
    numbers = [line.get("step"), *([line.get("epoch")] if line.get("kind") == "val" else [])]
    return isinstance(line.get("kind"), str) and all(type(number) in (int, float) for number in numbers)


class LossMeter:
    """Running means of loss terms, kept on the device; the host reads them only when `mean` is called."""

    def __init__(self) -> None:
        self.pending: list[tuple[tuple[str, ...], Tensor]] = []

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add the scalar terms of one batch, detached."""
        stacked = torch.stack([term.detach().float().reshape(()) for term in terms.values()])
        self.pending.append((tuple(terms), stacked))

    def share(self, accelerator: Accelerator) -> None:
        """Replace each term by its mean over the processes, since only the main one's state is saved; called by all."""
        if accelerator.num_processes == 1 or not self.pending:
            return
        names, values = zip(*self.pending, strict=True)
        merged = torch.cat([value.to(accelerator.device) for value in values])
        means = accelerator.reduce(merged, reduction="mean").split([len(keys) for keys in names])
        self.pending = list(zip(names, means, strict=True))

    def state(self) -> list[list[Any]]:
        """Return the terms not reported yet as plain values, saved so that a resumed run reports the same means."""
        return [[list(names), values.tolist()] for names, values in self.pending]

    def set_state(self, pending: list[list[Any]]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError, TypeError: it is not a list of names with as many numbers.
        """
        terms = [(tuple(names), torch.tensor(values, dtype=torch.float32)) for names, values in pending]
        if any(values.shape != (len(names),) or not all(isinstance(n, str) for n in names) for names, values in terms):
            raise ValueError("names and values of the loss terms differ in number")
        self.pending = terms

    def mean(self, accelerator: Accelerator) -> dict[str, float]:
        """Average every term over the batches added since the last call and over all processes, and reset."""
        # Sorted, so that all processes reduce the terms in the same order.
        names = sorted({name for keys, _ in self.pending for name in keys})
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for keys, values in self.pending:
            for name, value in zip(keys, values.to(accelerator.device).unbind(), strict=True):
                sums[name] = sums[name] + value if name in sums else value
                counts[name] = counts.get(name, 0) + 1
        self.pending = []
        if not names:
            return {}
        means = torch.stack([sums[name] / counts[name] for name in names]).to(accelerator.device)
        return dict(zip(names, accelerator.reduce(means, reduction="mean").tolist(), strict=True))


def grouped(terms: dict[str, float]) -> dict[str, float]:
    """Sum terms by the part of their name before the first dot, for a short progress line."""
    groups: dict[str, float] = {}
    for name, value in terms.items():
        part = name.split(".", 1)[0]
        groups[part] = groups.get(part, 0.0) + value
    return groups


def json_number(value: float) -> float | None:
    """Convert a number to what JSON can represent: NaN and infinities become null."""
    return value if math.isfinite(value) else None


def duration(seconds: float) -> str:
    """Format a duration: 12 s, 3 min 04 s or 2 h 05 min."""
    rounded = max(0, round(seconds))
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def training_line(loss: float, terms: dict[str, float], lr: float, speed: dict[str, float], remaining: int) -> str:
    """Format the progress of a training: loss, rate, speed and time left.

    Args:
        loss: sum of the terms.
        terms: means of the loss terms.
        lr: learning rate.
        speed: as `Stopwatch.read` returns it.
        remaining: steps until the end.
    """
    parts = " ".join(f"{name} {value:.3g}" for name, value in grouped(terms).items())
    return (
        f"loss {loss:.4g} ({parts}) lr {lr:.2g} {speed['images_per_s']:.3g} images/s "
        f"step {speed['step_s']:.3g} s (data {speed['data_s']:.2g} s) ETA {duration(remaining * speed['step_s'])}"
    )


def validation_line(
    epoch: int, epochs: int, metrics: dict[str, float], best: float | None, better: bool, head: str | None = None
) -> str:
    """Format the figures of a validation.

    Args:
        epoch, epochs: epochs trained, and those of the training.
        metrics: of the validation.
        best: highest AP so far; None before the first validation with one.
        better: this validation has the highest AP.
        head: the best of several heads.
    """
    mark = " (best so far)" if better else f" (best {math.nan if best is None else best:.4f})"
    shown = " ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name in SHOWN or name.endswith("_AP"))
    shown += f", best head {head}" if head is not None else ""
    if missing := metrics.get("images_left_out"):
        shown += f" on {metrics['images']:,} of {metrics['images'] + missing:,} images"
    return f"epoch {epoch}/{epochs} validation: {shown}{mark}"


class RatioMeter:
    """The ratio of negative to positive gradient magnitude of every head, by way of a `LossMeter`.

    Args:
        model: whose objectives are watched from now on; None measures nothing.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.sums = {} if model is None else watch_gradients(model)

    def take(self, like: Tensor) -> dict[str, Tensor]:
        """Return what a step's gradients sum to, as terms of a `LossMeter`; zeros, on `like`'s device, if it had none.

        All processes have the same terms then, as the meter needs.
        """
        found = {}
        for name, sums in self.sums.items():
            taken = sums.take()
            found[f"negatives of {name}"], found[f"positives of {name}"] = (
                like.new_zeros(2) if taken is None else taken
            ).unbind()
        return found

    def pop(self, means: dict[str, float]) -> dict[str, float | None]:
        """Move the means of these terms out of all means: negatives over positives by head, null without positives.

        A ratio of means and not a mean of ratios, which a step without objects would make infinite. Means of what is
        not watched are dropped: a resumed run may have pending ones of before `train.gradient_ratio` was turned off.
        """
        found = {}
        for name in self.sums:
            negatives, positives = (means.pop(f"{kind} of {name}", math.nan) for kind in ("negatives", "positives"))
            found[name] = json_number(negatives / (positives or math.nan))
        for name in [name for name in means if name.startswith(("negatives of ", "positives of "))]:
            del means[name]
        return found


class Progress:
    """Progress of one epoch.

    Args:
        title: e.g. "epoch 3/12".
        total: steps of the epoch.
        done: steps done before (of a resumed epoch).
        say: prints a line; used without a terminal.
        note: writes a line to the log file; used when the bar shows it.
        show: False on all but the main process.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int,
        say: Callable[[str], None],
        note: Callable[[str], None],
        show: bool = True,
    ) -> None:
        self.title, self.total, self.done = title, total, done
        self.say, self.note, self.show = say, note, show
        on_terminal = show and sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None
        if on_terminal:
            # a short bar leaves room for the losses after it
            layout = "{desc} |{bar:12}| {n_fmt}/{total_fmt} {elapsed}{postfix}"
            self.bar = tqdm(desc=title, total=total, initial=done, leave=False, bar_format=layout)

    def step(self) -> None:
        """Count one step."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()

    def report(self, text: str) -> None:
        """Show the latest losses: after the bar, or as a line of their own."""
        line = f"{self.title} step {self.done}/{self.total}: {text}"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            self.note(line)
        elif self.show:
            self.say(line)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


class Stopwatch:
    """Seconds since the last reset, split into waiting for data and the rest."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again from 0."""
        self.start, self.data, self.images, self.steps = time.perf_counter(), 0.0, 0, 0

    def add(self, data_seconds: float, images: int) -> None:
        """Count one step."""
        self.data += data_seconds
        self.images += images
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Return means per step: images_per_s of this process, data_s, step_s (data included)."""
        elapsed, steps = time.perf_counter() - self.start, max(self.steps, 1)
        return {
            "images_per_s": round(self.images / max(elapsed, 1e-9), 3),
            "data_s": round(self.data / steps, 4),
            "step_s": round(elapsed / steps, 4),
        }
