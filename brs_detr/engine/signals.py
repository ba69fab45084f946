"""Stop signals: SIGTERM and Ctrl-C ask the training to stop after the step under way."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def stop_signals(ask: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into calls of `ask`; a second Ctrl-C ends the process at once.

    Args:
        ask: called with the signal, SIGINT or SIGTERM, at any time while the block runs.

    Raises:
        KeyboardInterrupt: at a Ctrl-C more than two seconds after the first signal.
    """
    own, asked_at = os.getpid(), math.inf

    def handle(number: int, _: Any) -> None:
        nonlocal asked_at
        if os.getpid() != own:  # a loader's worker: it ends with this process, and must not end before
            return
        # torchrun passes on a Ctrl-C that the terminal has sent already: not a second one
        if number == signal.SIGINT and time.monotonic() > asked_at + 2:
            raise KeyboardInterrupt
        ask(signal.Signals(number))
        asked_at = min(asked_at, time.monotonic())

    former = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
