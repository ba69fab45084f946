"""Reading files from a storage that may fail for a while: it is asked again, and then the run is interrupted.

What the operating system reports is no word on the file itself: a file server that restarts reports files as missing
that are there a second later. Only a file that was read and cannot be decoded is damaged.
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
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between two attempts; each pause is twice the one before
_OF_THE_NAME = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)  # no storage mends these
_ABSENT = (errno.ENOENT, errno.EACCES, errno.EPERM)
_console = logging.getLogger(__name__)


class StorageError(Interruption):
    """A file that was there could not be read for so long that the run ends; the message names it."""

    code = ExitCode.STORAGE


def read_bytes(path: str | Path, most: int | None, setting: str, retry_seconds: float | None) -> bytes:
    """The content of a regular file.

    Args:
        path: the file.
        most, setting: its largest size, and the setting that allows more, see `user_files.open_regular`.
        retry_seconds: for how long to try again where the storage fails; None raises what the system says at once.

    Raises:
        StorageError: it failed until then.
        UserFileError: the file is too large; without retrying, also one that is no regular file.
        OSError: the path cannot be that of a file: it is a folder, for instance.
    """
    if retry_seconds is None:
        return read_file(path, most, setting)
    return persist(lambda: read_file(path, most, setting), path, retry_seconds)


def persist(
    attempt: Callable[[], Result], path: str | Path, retry_seconds: float, *, from_the_start: bool = False
) -> Result:
    """What `attempt` returns, tried again while the storage fails.

    Args:
        attempt: reads the file; any other error than the storage's is raised at once.
        path: named in messages.
        retry_seconds: for how long to try.
        from_the_start: the file has never been read, so one that is absent or no regular file is not the storage's
            fault; otherwise such a file was another before.

    Raises:
        StorageError: the storage failed until then.
    """
    deadline, pause = time.monotonic() + retry_seconds, FIRST_PAUSE
    while True:
        try:
            return attempt()
        except NotRegularFileError as error:
            if from_the_start:
                raise
            problem, reason = error, str(error)
        except OSError as error:
            # Pillow's own errors have no number: they are about the content
            if error.errno is None or error.errno in (*_OF_THE_NAME, *(_ABSENT if from_the_start else ())):
                raise
            problem, reason = error, error.strerror or str(error)
        if time.monotonic() + pause > deadline:
            tried = f", tried for {retry_seconds:g} s (data.retry_seconds)" if retry_seconds else ""
            raise StorageError(
                f"{path}: the storage does not give this file: {reason}{tried}. Mend the storage or restore the "
                "file, then start again; a training goes on with --resume."
            ) from problem
        if pause == FIRST_PAUSE:
            _console.warning("%s: %s; tried again for %g s.", printable(path), reason, retry_seconds)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
