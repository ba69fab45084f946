"""Atomic writing to a disk that may be full, read-only or disconnected, with errors that say what to do.

Files appear under their name only when complete; an incomplete one is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from brs_detr.exit_codes import ExitCode, Failure

TOKEN_BYTES = 4  # random, in the name of an unfinished file: two processes may write the same file at the same time
PARTIAL_BYTES = len("..partial") + 2 * TOKEN_BYTES + 1  # by which the name of an unfinished file is longer
FULL = (errno.ENOSPC, errno.EDQUOT)
_REASONS = {
    errno.ENOSPC: "not enough room on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would become larger than this process may write (ulimit -f)",
    errno.EROFS: "the disk is read-only",
    errno.EIO: "the disk reports an input/output error",
    errno.ESTALE: "the network disk has lost this folder",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}
_ADVICE = {
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room there",
    errno.EFBIG: "Raise the limit with `ulimit -f unlimited`",
}


class NonFiniteError(Failure, RuntimeError):
    """A loss, gradient or weight became NaN or infinite; the message says where."""

    code = ExitCode.NOT_FINITE


class StorageError(Failure, OSError):
    """A file cannot be written; the message names the folder, the reason, the free space and what to do."""

    code = ExitCode.STORAGE

    def __str__(self) -> str:
        return str(self.strerror)


def is_storage_fault(error: OSError) -> bool:
    """Return True if an error is of the disk, rather than of a path or a file's content."""
    return isinstance(error, StorageError) or error.errno in _ADVICE or error.errno == errno.EROFS


def describe_fault(place: Path, error: OSError, needed: int | None = None) -> tuple[str, str]:
    """Return two sentences: why the disk cannot be written to, and what to do.

    Args:
        place: the folder that was written to; it need not exist.
        error: of the operating system.
        needed: total bytes to be written, if known.
    """
    number = error.errno or errno.EIO
    reason = _REASONS.get(number, os.strerror(number).lower())
    space = free_space(place)
    space += f", {_size(needed)} needed" if needed is not None and number in FULL else ""
    return f"{place}: cannot be written to: {reason} ({space})", _ADVICE.get(number, "Fix that, or use another folder")


def storage_error(place: Path, error: OSError, needed: int | None = None) -> StorageError:
    """Build an error for the user from `describe_fault`."""
    fact, advice = describe_fault(place, error, needed)
    text = f"{fact}. {advice}, then run the same command again (a training with --resume)."
    return StorageError(error.errno or errno.EIO, text)


def free_space(place: Path) -> str:
    """Return the free space of the disk on which a folder is, or would be, as text."""
    # The nearest parent that exists: the folder itself may not have been created yet.
    for folder in (place, *place.absolute().parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(folder)
            return f"{_size(usage.free)} of {_size(usage.total)} free"
    return "free space unknown"


@contextlib.contextmanager
def writing(place: Path, needed: int | None = None) -> Iterator[None]:
    """Turn errors of the operating system inside into a `StorageError` about the folder `place`.

    Raises:
        StorageError: see `describe_fault`, which takes `needed`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by a library about a file's content
            raise
        raise storage_error(place, error, needed) from None


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: a crash at any moment leaves the old file or the new one, never a partial one.

    Args:
        path: its folder is created if necessary.
        write: called with the file, open for writing.

    Raises:
        StorageError: the file cannot be written; no partial file is left.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(TOKEN_BYTES)}.partial")
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                write(file)
            publish(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def publish(partial: Path, path: Path) -> None:
    """Flush a finished file to disk and rename it to `path` atomically.

    Raises:
        StorageError: the disk is full.
    """
    with writing(path.parent):
        # Flushed before it is renamed: after a power failure the name must not refer to an empty file.
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that renamed files keep their new names after a power failure."""
    with contextlib.suppress(OSError):  # not every file system supports it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    write_file(path, lambda file: file.write(text.encode()))


def remove_partials(folder: Path, patterns: Sequence[str]) -> None:
    """Remove the unfinished files that a killed process has left in a folder.

    Args:
        folder: where they are.
        patterns: names of files, as `Path.glob` takes them, that no other process writes there.
    """
    token = "[0-9a-f]" * (2 * TOKEN_BYTES)
    for pattern in patterns:
        # without a token: of earlier versions
        for partial in (*folder.glob(f".{pattern}.{token}.partial"), *folder.glob(f".{pattern}.partial")):
            if partial.is_file():
                with contextlib.suppress(OSError):
                    partial.unlink()


def together(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Call `work` in the main process and raise its errors in every process, so that no process waits for another.

    Raises:
        Failure: raised by `work`.
    """
    errors: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            work()
        except Failure as error:
            errors = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(errors)
    if errors[0] is not None:
        raise errors[0]


def _size(count: int) -> str:
    """Format a number of bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
