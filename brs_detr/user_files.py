"""Open files named by the user safely: regular files only, up to a maximum size, with names that are safe to print.

A name may lead to anything: an endless pipe, a device, a sparse file of eight gigabytes, a name that contains terminal
escape codes. Every part of the package may use this module; it imports no other part.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import stat
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

TEXT_BYTES = 2**28  # maximum size of a text file of labels, class names or paths
MODEST_BYTES = 2**24  # maximum size of a file that describes one image or one dataset: VOC's xml, a yaml

_MIN_BOMB_BYTES = 10**8  # gzip may unpack to this size at any ratio
_MAX_GZIP_RATIO = 100  # json with hundreds of thousands of similar entries is packed to about a tenth
_CHUNK = 2**24
_FILE_TYPES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class UserFileError(ValueError):
    """A file that is not read; the message says why, without the file name, which the caller adds."""


class NotRegularFileError(UserFileError):
    """The file is a pipe, a device or a socket."""


def is_missing(path: Path) -> bool:
    """Check that a path does not exist; one that cannot be looked at is left to the reader, who says why."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def open_regular(path: str | Path, max_bytes: int | None = None, setting: str = "") -> BinaryIO:
    """Open a file for reading if it is regular, after following links; a pipe is refused without blocking.

    Args:
        path: path of the file.
        max_bytes: maximum size; None for no limit.
        setting: setting that raises the limit, named in the error; "" if there is no such setting.

    Raises:
        NotRegularFileError: the file is a pipe, a device or a socket.
        UserFileError: the file is too large.
        OSError: as `open` does, also for a folder.
    """
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 (the caller closes it)
    try:
        # fstat of the open file, not stat of the path, which may have been replaced in between
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            kind = _FILE_TYPES.get(stat.S_IFMT(status.st_mode), "something else")
            raise NotRegularFileError(f"it is {kind}, not a regular file")
        require_at_most(status.st_size, max_bytes, setting)
    except BaseException:
        file.close()
        raise
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    """Open with O_NONBLOCK (where it exists): opening a pipe otherwise waits for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def require_at_most(size: int, max_size: int | None, setting: str = "", unit: str = "bytes") -> None:
    """Refuse a size above a limit; None for no limit.

    Raises:
        UserFileError: the size is too large; the message names the setting that raises the limit.
    """
    if max_size is not None and size > max_size:
        limit = f"{setting}={max_size}; raise the setting to read it" if setting else f"{max_size:,} {unit}"
        raise UserFileError(f"it has {size:,} {unit}, more than {limit}")


def read_file(path: str | Path, max_bytes: int | None = None, setting: str = "") -> bytes:
    """Read a regular file; arguments and errors as for `open_regular`.

    Raises:
        UserFileError: also if the file is longer than the file system says, as those under /proc are.
    """
    with open_regular(path, max_bytes, setting) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
    if len(content) > size:
        raise UserFileError("it grew while it was being read")
    return content


def read_start(path: str | Path, count: int) -> bytes:
    """Read the first `count` bytes of a regular file of any size; errors as for `open_regular`."""
    with open_regular(path) as file:
        return file.read(count)


def unpack_gzip(content: bytes, max_bytes: int | None = None, setting: str = "") -> bytes:
    """Unpack gzip, but stop at a maximum size, or at the compression ratio of a decompression bomb.

    Raises:
        UserFileError: it unpacks to more than `max_bytes` (see `open_regular`), or to more than a hundred times its
            size.
        OSError, EOFError, zlib.error: it is truncated or damaged.
    """
    parts: list[bytes] = []
    size = 0
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
        while part := stream.read(_CHUNK):
            parts.append(part)
            size += len(part)
            require_at_most(size, max_bytes, setting, "bytes unpacked")
            if size > max(_MIN_BOMB_BYTES, _MAX_GZIP_RATIO * len(content)):
                raise UserFileError(
                    f"its {len(content):,} bytes unpack to more than {_MAX_GZIP_RATIO} times as many; unpack it with "
                    "gunzip if that is intended"
                )
    return b"".join(parts)


def require_unpacked(path: str | Path) -> None:
    """Refuse a PyTorch file (a zip) with compressed members: torch.save writes none, and a few bytes can be many GB.

    Raises:
        UserFileError: the file has compressed members.
        OSError: the file cannot be opened.
    """
    with open_regular(path) as file:
        try:
            members = zipfile.ZipFile(file).infolist() if zipfile.is_zipfile(file) else []
        except (zipfile.BadZipFile, NotImplementedError, ValueError):  # damaged: torch.load reports it
            members = []
        size = os.fstat(file.fileno()).st_size
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise UserFileError("its tensors are compressed, which torch.save does not do; save it again with torch.save")


def printable(text: object) -> str:
    r"""Escape the characters that are not printable, so that the text is one line, safe for terminals and files.

    These are newlines, escape codes, marks that change the writing direction, and bytes of a file name that are not
    UTF-8 (`\xfc`).
    """
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else _code(c) for c in text)


def _code(character: str) -> str:
    """Return the escape sequence of a character, as in a Python string."""
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # a surrogate, in which Python stores a byte of a file name that is not UTF-8
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def forgive_output() -> None:
    """Make stdout and stderr escape characters that their encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def complain(error: Exception | str) -> None:
    """Print an error for the user; stderr may be a file on the very disk that is full."""
    with contextlib.suppress(OSError):
        print(f"error: {printable(error)}", file=sys.stderr)


def end_output(code: int) -> int:
    """Flush what was printed, and return the exit code: Python would end with 120 where stdout's disk is full."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code
