"""Writing to a disk that may be full, read-only or gone: whole files or none, and one sentence that says what is wrong.

Files appear under their name only when complete; what could not be written to its end is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from brs_detr.models.backbones.weights_io import CheckpointError

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
_MENDS = {
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room there",
    errno.EFBIG: "Raise the limit with `ulimit -f unlimited`",
}


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight became NaN or infinite; the message says where."""


class StorageError(OSError):
    """Something could not be written; the message names the folder, the reason, the free space and the mend."""

    def __str__(self) -> str:
        return str(self.strerror)


def is_storage_fault(error: OSError) -> bool:
    """Is an error the disk's, rather than that of a wrong path or a foreign file."""
    return isinstance(error, StorageError) or error.errno in _MENDS or error.errno == errno.EROFS


def describe_fault(place: Path, error: OSError, needed: int | None = None) -> tuple[str, str]:
    """What is wrong with the disk, and what to do.

    Args:
        place: the folder that was written to; it need not exist.
        error: what the operating system said.
        needed: bytes to be written altogether, where that is known.
    """
    number = error.errno or errno.EIO
    reason = _REASONS.get(number, os.strerror(number).lower())
    space = free_space(place)
    space += f", {_size(needed)} needed" if needed is not None and number in FULL else ""
    return f"{place}: cannot be written to: {reason} ({space})", _MENDS.get(number, "Mend that, or use another folder")


def storage_error(place: Path, error: OSError, needed: int | None = None) -> StorageError:
    """`describe_fault` as an error for the user."""
    fact, mend = describe_fault(place, error, needed)
    text = f"{fact}. {mend}, then run the same command again (a training with --resume)."
    return StorageError(error.errno or errno.EIO, text)


def free_space(place: Path) -> str:
    """The free space of the disk on which a folder lies, or would lie."""
    for folder in (place, *place.absolute().parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(folder)
            return f"{_size(usage.free)} of {_size(usage.total)} free"
    return "free space unknown"


@contextlib.contextmanager
def writing(place: Path, needed: int | None = None) -> Iterator[None]:
    """Turn what the operating system refuses inside into a `StorageError` about the folder `place`.

    Raises:
        StorageError: see `describe_fault`, which takes `needed`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a library, about a file's content
            raise
        raise storage_error(place, error, needed) from None


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file; a crash at any moment leaves the former file or the new one, never half of one.

    Args:
        path: its folder is made where there is none.
        write: called with the file, open for writing.

    Raises:
        StorageError: it could not be written; nothing is left of it.
    """
    partial = path.with_name(f".{path.name}.partial")
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
    """Flush a finished file to disk and give it its name in one atomic step.

    Raises:
        StorageError: the disk has no room for it.
    """
    with writing(path.parent):
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk: after a power failure too, a file that was renamed has its new name."""
    with contextlib.suppress(OSError):  # not every file system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically.

    Raises:
        StorageError: it could not be written.
    """
    write_file(path, lambda file: file.write(text.encode()))


def remove_partials(folder: Path) -> None:
    """Remove the unfinished files that a process which was killed has left in a folder."""
    for partial in folder.glob(".*.partial"):
        if partial.is_file():
            with contextlib.suppress(OSError):
                partial.unlink()


def together(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Do `work` in the main process; what it raises is raised in every process, so that none waits for another.

    Raises:
        StorageError, NonFiniteError, CheckpointError: raised by `work`.
    """
    found: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            work()
        except (StorageError, NonFiniteError, CheckpointError) as error:
            found = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[0] is not None:
        raise found[0]


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
