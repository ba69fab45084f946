"""Read files with retries, since a network storage may fail for a while; then the run is interrupted.

An error of the operating system says nothing about the file itself: a file server that restarts reports existing files
as missing. Only a file that was read and cannot be decoded is damaged.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from brs_detr.exit_codes import ExitCode, Interruption
from brs_detr.user_files import NotRegularFileError, printable, read_file

Result = TypeVar("Result")
FIRST_PAUSE, MAX_PAUSE = 0.1, 5.0  # seconds between two attempts; each pause is twice the one before
_BAD_PATH = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)  # permanent: no retry helps
_ABSENT = (errno.ENOENT, errno.EACCES, errno.EPERM)
_FAILING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_console = logging.getLogger(__name__)


class ReadError(Interruption):
    """A file that existed could not be read for so long that the run ends; the message names it."""

    code = ExitCode.STORAGE


def raise_storage_fault(error: Exception, path: str | Path) -> None:
    """Raise if an error says something about the storage, and not about a path or the content of a file.

    Args:
        error: of what was read or written.
        path: the file or folder, if the error names none.

    Raises:
        ReadError: the storage fails.
        OSError: the error itself, of a disk that is full or read-only: who knows what is written says what to do.
    """
    if not isinstance(error, OSError):
        return
    if error.errno in _NOT_WRITABLE:
        raise error
    if error.errno in _FAILING:
        raise ReadError(
            f"{error.filename or path}: the storage fails: {error.strerror}. Repair it, then start again; continue a "
            "training with --resume."
        ) from error


def read_bytes(path: str | Path, max_bytes: int | None, setting: str, retry_seconds: float | None) -> bytes:
    """Read a regular file, with retries.

    Args:
        path: the file.
        max_bytes, setting: maximum size, and the setting that allows more, see `user_files.open_regular`.
        retry_seconds: how long to retry when the storage fails; None raises the first error.

    Raises:
        ReadError: the storage still failed after that time.
        UserFileError: the file is too large; without retries, also if it is not a regular file.
        OSError: the path cannot be that of a file, for instance because it is a folder.
    """
    if retry_seconds is None:
        return read_file(path, max_bytes, setting)
    return persist(lambda: read_file(path, max_bytes, setting), path, retry_seconds)


def persist(
    attempt: Callable[[], Result], path: str | Path, retry_seconds: float, *, from_the_start: bool = False
) -> Result:
    """Call `attempt` and return its result, with retries while the storage fails.

    Args:
        attempt: reads the file; errors other than those of the storage are raised at once.
        path: named in messages.
        retry_seconds: how long to retry.
        from_the_start: True if the file has never been read: a file that is absent or not regular is then an error
            of the dataset, and raised at once; otherwise the file has changed, which counts as a storage failure.

    Raises:
        ReadError: the storage still failed after that time.
    """
    deadline, pause = time.monotonic() + retry_seconds, FIRST_PAUSE
    problem: Exception
    while True:
        try:
            return attempt()
        except NotRegularFileError as error:
            if from_the_start:
                raise
            problem, reason = error, str(error)
        except OSError as error:
            # Pillow raises OSError without errno for damaged content
            if error.errno is None or error.errno in (*_BAD_PATH, *(_ABSENT if from_the_start else ())):
                raise
            problem, reason = error, error.strerror or str(error)
        if time.monotonic() + pause > deadline:
            tried = f", retried for {retry_seconds:g} s (data.retry_seconds)" if retry_seconds else ""
            raise ReadError(
                f"{path}: the storage cannot read this file: {reason}{tried}. Repair the storage or restore the "
                "file, then start again; continue a training with --resume."
            ) from problem
        if pause == FIRST_PAUSE:  # one warning per file, not one per attempt
            _console.warning("%s: %s. Retrying for %g s.", printable(path), reason, retry_seconds)
        time.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE)
