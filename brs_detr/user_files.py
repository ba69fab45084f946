"""Files that a user names: only regular ones are opened, up to a limit of bytes, and their names are printed safely.

A name may lead to anything: a pipe that never ends, a device, a file of eight gigabytes of nothing, a name with the
escape codes of a terminal in it. Every part of the package may use this module; it imports none of them.
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

TEXT_BYTES = 2**28  # of a text file of labels, class names or paths
MODEST_BYTES = 2**24  # of a file that describes one image or one dataset: VOC's xml, a yaml

_PACKED_ENOUGH = 10**8  # bytes that gzip may unpack to, whatever the ratio
_PACKED_RATIO = 100  # json with hundreds of thousands of alike entries packs to about a tenth
_CHUNK = 2**24
_OTHER_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class UserFileError(ValueError):
    """A file that is not read; the message says why, without the file's name, which the caller puts first."""


class NotRegularFileError(UserFileError):
    """It is a pipe, a device or a socket."""


def open_regular(path: str | Path, most: int | None = None, setting: str = "") -> BinaryIO:
    """Open a file for reading if it is a regular one, after following links; a pipe is refused without waiting for it.

    Args:
        path: of the file.
        most: largest size in bytes; None for no limit.
        setting: that the user may raise where the limit is too low, named in the error; "" where there is none.

    Raises:
        NotRegularFileError: it is a pipe, a device or a socket.
        UserFileError: it is too large.
        OSError: as `open` does, also for a folder.
    """
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 (it is handed on)
    try:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            kind = _OTHER_KINDS.get(stat.S_IFMT(found.st_mode), "something else")
            raise NotRegularFileError(f"it is {kind}, not a regular file")
        require_at_most(found.st_size, most, setting)
    except BaseException:
        file.close()
        raise
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def require_at_most(size: int, most: int | None, setting: str = "", unit: str = "bytes") -> None:
    """Refuse a size above a limit.

    Raises:
        UserFileError: it is; names the setting that raises the limit.
    """
    if most is not None and size > most:
        mend = f"more than {setting}={most}; raise the setting to read it" if setting else f"more than {most:,} {unit}"
        raise UserFileError(f"it has {size:,} {unit}, {mend}")


def read_file(path: str | Path, most: int | None = None, setting: str = "") -> bytes:
    """The content of a regular file; arguments and errors as for `open_regular`.

    Raises:
        UserFileError: also where the file is longer than the file system says, as those under /proc are.
    """
    with open_regular(path, most, setting) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
    if len(content) > size:
        raise UserFileError("it grew while it was being read")
    return content


def read_start(path: str | Path, count: int) -> bytes:
    """The first bytes of a regular file of any size; errors as for `open_regular`."""
    with open_regular(path) as file:
        return file.read(count)


def unpack_gzip(content: bytes, most: int | None = None, setting: str = "") -> bytes:
    """Unpack gzip, but stop at a limit of bytes, or where the content is packed as only a bomb is.

    Raises:
        UserFileError: it unpacks to more than `most` bytes (see `open_regular`), or to more than a hundred times its
            size.
        OSError, EOFError, zlib.error: it is cut short or damaged.
    """
    parts: list[bytes] = []
    size = 0
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
        while part := stream.read(_CHUNK):
            parts.append(part)
            size += len(part)
            require_at_most(size, most, setting, "bytes unpacked")
            if size > max(_PACKED_ENOUGH, _PACKED_RATIO * len(content)):
                raise UserFileError(
                    f"its {len(content):,} bytes unpack to more than {_PACKED_RATIO} times as many; unpack it with "
                    "gunzip if that is meant"
                )
    return b"".join(parts)


def require_unpacked(path: str | Path) -> None:
    """Refuse a PyTorch file (a zip) with packed members, which torch.save never writes: a few bytes could be many GB.

    Raises:
        UserFileError: it has some.
        OSError: it cannot be opened.
    """
    with open_regular(path) as file:
        try:
            members = zipfile.ZipFile(file).infolist() if zipfile.is_zipfile(file) else []
        except (zipfile.BadZipFile, NotImplementedError, ValueError):  # torch says what is wrong with it
            members = []
        size = os.fstat(file.fileno()).st_size
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise UserFileError("its tensors are compressed, which torch.save does not do; save it anew with torch.save")


def printable(text: object) -> str:
    """The text on one line that any terminal and file takes: a character that cannot be shown is written as its code.

    Newlines, escape codes, marks that turn the direction of writing, and bytes of a file name that are not UTF-8
    (`\\xfc`).
    """
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else _code(c) for c in text)


def _code(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def forgive_output() -> None:
    """Let stdout and stderr write what their encoding lacks as codes: no name of a file or class ends a program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def complain(error: Exception) -> None:
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
