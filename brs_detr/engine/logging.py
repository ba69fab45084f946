"""What a run says: a log file, metrics.jsonl for programs, trackers when asked.

Loss terms stay on the device until they are reported, so logging costs no synchronisation a step.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from brs_detr.engine.checkpoint import write_text


class RunLog:
    """log.txt, metrics.jsonl and Accelerate's trackers of one run; silent on all but the main process.

    Args:
        folder: the run's folder.
        accelerator: of the launch; its trackers, where any were initialised, get every metric too.
        resumed_at: {"step", "epoch"} completed when the run goes on: later lines of metrics.jsonl are of steps and
            validations that will be repeated, and are dropped; None for a fresh run, which starts empty files.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, resumed_at: dict[str, Any] | None = None):
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.text_path, self.metrics_path = folder / "log.txt", folder / "metrics.jsonl"
        if not self.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        lines = read_metrics(self.metrics_path) if resumed_at is not None else []
        kept = [json.dumps(line) + "\n" for line in lines if not _is_later(line, resumed_at)]
        write_text(self.metrics_path, "".join(kept))
        if resumed_at is None:
            self.text_path.write_text("", encoding="utf-8")

    def say(self, text: str) -> None:
        """Print a message and append it to log.txt, without breaking a progress bar."""
        if not self.main:
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        self.note(text)

    def note(self, text: str) -> None:
        """Append a message to log.txt only."""
        if not self.main:
            return
        with self.text_path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line `{"kind": ..., "step": ..., **values}` and hand its numbers to the trackers.

        Args:
            kind: "train", "val", ...
            step: optimiser steps done.
            values: JSON values; numbers and dictionaries of numbers reach the trackers.
        """
        if not self.main:
            return
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        flat = {}
        for name, value in values.items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{kind}/{name}{'/' if key else ''}{key}": v for key, v in inner if isinstance(v, (int, float))}
        self.accelerator.log(flat, step=step)


def _is_later(line: dict[str, Any], place: dict[str, Any]) -> bool:
    # a state may be saved between the last step of an epoch and its validation, so the step alone does not tell
    return line["step"] > place["step"] or (line["kind"] == "val" and line["epoch"] > place["epoch"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


class LossMeter:
    """Sums loss terms on the device; the host sees them only when `mean` is asked."""

    def __init__(self) -> None:
        self.pending: list[tuple[tuple[str, ...], Tensor]] = []

    def add(self, terms: dict[str, Tensor]) -> None:
        """Remember the scalar terms of one batch, detached."""
        stacked = torch.stack([term.detach().float().reshape(()) for term in terms.values()])
        self.pending.append((tuple(terms), stacked))

    def share(self, accelerator: Accelerator) -> None:
        """Replace each term by its mean over the processes, for only the main one's state is saved; called by all."""
        if accelerator.num_processes == 1 or not self.pending:
            return
        names, values = zip(*self.pending, strict=True)
        merged = torch.cat([value.to(accelerator.device) for value in values])
        means = accelerator.reduce(merged, reduction="mean").split([len(keys) for keys in names])
        self.pending = list(zip(names, means, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What is not reported yet; saved with the run, so that a resumed one reports the same means."""
        return {"pending": [(list(names), values.cpu()) for names, values in self.pending]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called by Accelerate when it loads."""
        self.pending = [(tuple(names), values) for names, values in state["pending"]]

    def mean(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean of every term over the batches added since the last call and over all processes; starts afresh."""
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
    """Sums of terms by the part of their name before the first dot, for a short progress line."""
    groups: dict[str, float] = {}
    for name, value in terms.items():
        part = name.split(".", 1)[0]
        groups[part] = groups.get(part, 0.0) + value
    return groups


def json_number(value: float) -> float | None:
    """A number as JSON can hold it: NaN and infinities become null."""
    return value if math.isfinite(value) else None
