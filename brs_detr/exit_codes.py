"""The exit codes of the scripts and commands, and the exception that ends a run with one of them.

From 64 on they are those of BSD's sysexits.h; a scheduler may start a job again that ended with one of these.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the end of a process means."""

    OK = 0
    REFUSED = 2  # a setting, dataset or checkpoint cannot be used
    NOT_FINITE = 3  # a loss or gradient was not finite
    LOADER_WORKER_KILLED = 71  # a loader worker was killed, mostly for lack of memory; the state is saved
    STORAGE = 74  # files cannot be read or written: a storage that fails or hangs, a full disk
    INTERRUPTED = 75  # told to stop by SIGTERM or Ctrl-C; the state is saved


class Interruption(Exception):
    """The run cannot go on now, but the same command with `--resume` may, later; `code` is the exit code.

    A data loader hands on a worker's error as its traceback with the message at the end: only that is kept.

    Args:
        message: what happened and what to do.
        code: the exit code, where it is not the class's own.
    """

    code = ExitCode.INTERRUPTED

    def __init__(self, message: str, code: ExitCode | None = None) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())
        self.code = type(self).code if code is None else code
