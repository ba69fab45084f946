"""The exit codes of the scripts and commands, and the exceptions that end a run with one of them.

Codes from 64 on are those of BSD's sysexits.h; a scheduler may restart a job that ended with one of them.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit code of a script or command."""

    OK = 0
    REFUSED = 2  # a setting, dataset or checkpoint cannot be used
    NOT_FINITE = 3  # a loss or gradient was not finite
    LOADER_WORKER_KILLED = 71  # a loader worker was killed, usually for lack of memory; the state is saved
    STORAGE = 74  # files cannot be read or written: a disk that fails, hangs or is full
    INTERRUPTED = 75  # stopped by SIGTERM or Ctrl-C; the state is saved


class Failure(Exception):  # noqa: N818 (a base, which never names an error itself)
    """An error that its message explains: the program prints it and ends with its code, without a traceback."""

    code = ExitCode.REFUSED


class MissingPackageError(Failure, ImportError):
    """An optional package is not installed; the message has the command that installs it."""


class CheckpointError(Failure, ValueError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


class Interruption(Failure):
    """An event that ends the run, which the same command with `--resume` may continue later.

    A data loader passes on a worker's error as its traceback with the message at the end: only the message is kept.

    Args:
        message: what happened and what to do.
        code: the exit code, if it is not the class's own.
    """

    code = ExitCode.INTERRUPTED

    def __init__(self, message: str, code: ExitCode | None = None) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())
        self.code = type(self).code if code is None else code
