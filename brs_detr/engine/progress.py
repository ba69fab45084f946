"""The progress of an epoch: a bar on a terminal, plain lines in a log file or pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm


def duration(seconds: float) -> str:
    """12 s, 3 min 04 s or 2 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Steps of one epoch.

    Args:
        title: e.g. "epoch 3/12".
        total: steps of the epoch.
        done: steps already done before this call (a resumed epoch).
        say: prints a line; used where there is no terminal.
        note: keeps a line in the log file; used where the bar shows it.
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
    ):
        self.title, self.total, self.done = title, total, done
        self.say, self.note, self.show = say, note, show
        on_terminal = show and sys.stderr.isatty()
        shape = "{desc} |{bar:12}| {n_fmt}/{total_fmt} {elapsed}{postfix}"  # room for the figures behind it
        options = {"total": total, "initial": done, "leave": False, "bar_format": shape}
        self.bar = tqdm(desc=title, **options) if on_terminal else None

    def step(self) -> None:
        """One step is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()

    def report(self, text: str) -> None:
        """Show the latest figures: behind the bar, or as a line of their own."""
        line = f"{self.title} step {self.done}/{self.total}: {text}"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            self.note(line)
        elif self.show:
            self.say(line)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


class Stopwatch:
    """Seconds since the last reset, split into waiting for data and the rest."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.start, self.data, self.images, self.steps = time.perf_counter(), 0.0, 0, 0

    def add(self, data_seconds: float, images: int) -> None:
        """Count one step."""
        self.data += data_seconds
        self.images += images
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means a step: images_per_s of this process, data_s, step_s (data included)."""
        elapsed, steps = time.perf_counter() - self.start, max(self.steps, 1)
        return {
            "images_per_s": round(self.images / max(elapsed, 1e-9), 3),
            "data_s": round(self.data / steps, 4),
            "step_s": round(elapsed / steps, 4),
        }
