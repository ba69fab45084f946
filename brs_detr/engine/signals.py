"""Stop signals: SIGTERM and Ctrl-C request a stop after the current step."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def stop_signals(request: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into calls of `request`; a second Ctrl-C ends the process at once.

    Args:
        request: called with the signal, SIGINT or SIGTERM, at any time while the block runs.

    Raises:
        KeyboardInterrupt: at a Ctrl-C more than two seconds after the first signal.
    """
    own, requested_at = os.getpid(), math.inf

    def handle(number: int, _: Any) -> None:
        nonlocal requested_at
        if os.getpid() != own:  # A loader's worker ends with this process, and must not end before it.
            return
        # torchrun forwards a Ctrl-C that the terminal has already sent to every process: that is no second one.
        if number == signal.SIGINT and time.monotonic() > requested_at + 2:
            raise KeyboardInterrupt
        request(signal.Signals(number))
        requested_at = min(requested_at, time.monotonic())

    former = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
