"""Reading files from a storage that may fail for a while: it is asked again, and then the run is interrupted.

What the operating system reports is no word on the file itself: a file server that restarts reports files as missing
that are there a second later. Only a file that was read and cannot be decoded is damaged.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from brs_detr.exit_codes import ExitCode, Interruption

Result = TypeVar("Result")
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between two attempts; each pause is twice the one before
_OF_THE_NAME = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)  # no storage mends these
_console = logging.getLogger(__name__)


class StorageError(Interruption):
    """A file that was there could not be read for so long that the run ends; the message names it."""

    code = ExitCode.STORAGE


def read_bytes(path: str | Path, retry_seconds: float = 0.0) -> bytes:
    """The content of a file.

    Args:
        path: the file.
        retry_seconds: for how long to try again where the storage fails.

    Raises:
        StorageError: it failed until then.
        OSError: the path cannot be that of a file: it is a folder, for instance.
    """
    return persist(lambda: Path(path).read_bytes(), path, retry_seconds)


def persist(
    attempt: Callable[[], Result], path: str | Path, retry_seconds: float, final: Collection[int] = ()
) -> Result:
    """What `attempt` returns, tried again while the storage fails.

    Args:
        attempt: reads the file; any other error than the storage's is raised at once.
        path: named in messages.
        retry_seconds: for how long to try.
        final: further error numbers that are raised at once.

    Raises:
        StorageError: the storage failed until then.
    """
    deadline, pause = time.monotonic() + retry_seconds, FIRST_PAUSE
    while True:
        try:
            return attempt()
        except OSError as error:
            # Pillow's own errors have no number: they are about the content
            if error.errno is None or error.errno in (*_OF_THE_NAME, *final):
                raise
            reason = error.strerror or str(error)
            if time.monotonic() + pause > deadline:
                tried = f", tried for {retry_seconds:g} s (data.retry_seconds)" if retry_seconds else ""
                raise StorageError(
                    f"{path}: the storage does not give this file: {reason}{tried}. Mend the storage or restore the "
                    "file, then start again; a training goes on with --resume."
                ) from error
            if pause == FIRST_PAUSE:
                _console.warning("%s: %s; tried again for %g s.", path, reason, retry_seconds)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
