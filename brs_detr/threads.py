"""Settings of the whole process, such as a library's globals, that several threads change for a while."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator


def shared_by_threads(
    change: Callable[[], contextlib.AbstractContextManager[None]],
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a context manager for several threads at once: the first inside changes settings, the last restores them.

    Each of two threads that restored what it had found could leave the other's change for good.

    Args:
        change: context manager that changes settings of the process and restores them, the same ones each time.
    """
    lock, changed, inside = threading.Lock(), contextlib.ExitStack(), 0
    if hasattr(os, "register_at_fork"):  # a loader's worker must not begin with the lock that another thread held
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)

    @contextlib.contextmanager
    def shared() -> Iterator[None]:
        nonlocal inside
        with lock:
            if not inside:
                changed.enter_context(change())
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if not inside:
                    changed.close()

    return shared
