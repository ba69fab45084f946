"""Download a file once: with resume, a checksum and an atomic rename, and quick to give up where no network answers.

What has arrived is kept as FILE.part, so that the same command goes on from there. Only the standard library is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from brs_detr.exit_codes import ExitCode, Failure

PATIENCE = 4.0  # seconds for the connection: no network is reported in less than five
STALL = 30.0  # seconds without an answer, or a byte of it, after which the connection is given up
ATTEMPTS = 5  # in a row without a further byte
_CHUNK = 2**20
_LOCK_AGE = 120.0  # seconds after which the lock of a process that was killed no longer counts
_LOCK_RENEWALS = 6  # in that time, by its owner
_AGENT = "brs-detr"


class DownloadError(Failure, OSError):
    """A file that cannot be downloaded; the message says why and what to do."""

    def __init__(self, message: str, code: ExitCode = ExitCode.REFUSED, status: int | None = None) -> None:
        super().__init__(message)
        self.code, self.status = code, status

    def __str__(self) -> str:
        return str(self.args[0])


def cache_folder() -> Path:
    """Return where downloaded files are kept: $BRS_DETR_CACHE, else `brs_detr` in the platform's cache."""
    if own := os.environ.get("BRS_DETR_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "brs_detr"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "brs_detr" / "Cache"
    home = Path.home()
    return home / "Library" / "Caches" / "brs_detr" if sys.platform == "darwin" else home / ".cache" / "brs_detr"


def download(url: str, target: Path, sha256: str = "", *, advice: str = "", patience: float = PATIENCE) -> str:
    """Download a PyTorch or safetensors file, unless it is there.

    Several processes may ask for the same file: one downloads it, the others wait.

    Args:
        url: of the file.
        target: where it appears when it is complete and checked.
        sha256: its checksum or the first digits of it; "" if unknown.
        advice: what else the user can do, for the errors.
        patience: seconds for the connection.

    Returns:
        Its SHA-256; "" if it was there.

    Raises:
        DownloadError: no network, a refused or interrupted transfer, another content, or a folder without room.
    """
    host = urllib.parse.urlsplit(url).hostname or url
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if target.is_file():
                return ""
            part = target.with_name(f"{target.name}.part")
            _fetch(url, part, patience, advice)
            digest = _checked(part, sha256, host, advice)
            os.replace(part, target)
            _etag_file(part).unlink(missing_ok=True)
            return digest
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"{target.parent}: cannot be written to ({error.strerror or error}). Make room, or set BRS_DETR_CACHE to "
            "another folder.",
            ExitCode.STORAGE,
        ) from None


def read_page(url: str, max_bytes: int = 2**22, advice: str = "") -> str:
    """Return a web page as text; errors as for `download`."""
    with _opened(url, {}, PATIENCE, advice) as answer:
        return str(answer.read(max_bytes).decode("utf-8", "replace"))


def _fetch(url: str, part: Path, patience: float, advice: str) -> None:
    """Write the file to `part`, from where an earlier attempt has left it."""
    failures, reason = 0, ""
    while failures < ATTEMPTS:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_rest(url, part, before, patience if not failures else STALL, advice):
                return
            reason = "the connection ended early"
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        except DownloadError as error:
            if error.status != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            part.unlink(missing_ok=True)  # it has all of the file, or more: begin again
        after = part.stat().st_size if part.exists() else 0
        failures = 0 if after > before else failures + 1
        time.sleep(min(0.2 * 2**failures, 5.0) if failures else 0.0)
    size = part.stat().st_size if part.exists() else 0
    raise DownloadError(
        f"{url}: the transfer stopped after {size / 1e6:.1f} MB ({reason}). Run the same command again: it goes on "
        f"from there.{_after(advice)}"
    )


def _fetch_rest(url: str, part: Path, start: int, patience: float, advice: str) -> bool:
    """Append what is missing to `part`; returns False if the connection ended before the end."""
    validator = _read(_etag_file(part)) if start else ""
    # without a validator, what is there may be of another version of the file
    headers = {"Range": f"bytes={start}-", "If-Range": validator} if validator else {}
    with _opened(url, headers, patience, advice) as answer:
        resumed = answer.status == 206 and _first_byte(answer) == start
        expected = _total(answer, start if resumed else 0)
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        _etag_file(part).write_text("" if tag.startswith("W/") else tag, encoding="utf-8")
        with open(part, "ab" if resumed else "wb") as file:
            _copy(answer, file, start if resumed else 0, expected, part)
    return expected is None or part.stat().st_size >= expected


def _copy(answer: Any, file: BinaryIO, start: int, expected: int | None, part: Path) -> None:
    """Copy the body of an answer to a file, with a bar on a terminal."""
    with tqdm(
        total=expected, initial=start, desc=part.stem, unit="B", unit_scale=True, unit_divisor=1000, disable=None
    ) as bar:
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))


@contextlib.contextmanager
def _opened(url: str, headers: dict[str, str], patience: float, advice: str) -> Iterator[Any]:
    """Open an address, in a thread: the look-up of a name has no timeout, and can take minutes without a network.

    Raises:
        DownloadError: no answer in time, or a refusal.
    """
    outcome: list[Any] = []
    address, connected, answered = urllib.parse.urlsplit(url), threading.Event(), threading.Event()

    def ask() -> None:
        try:
            if not urllib.request.getproxies():  # a proxy is asked by the request itself
                port = address.port or (80 if address.scheme == "http" else 443)
                socket.create_connection((address.hostname or "", port), timeout=patience).close()
            connected.set()
            request = urllib.request.Request(url, headers={"User-Agent": _AGENT, **headers})
            outcome.append(urllib.request.urlopen(request, timeout=STALL))
        except Exception as error:
            outcome.append(error)
        connected.set()
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    if connected.wait(patience):
        answered.wait(STALL)
    host = urllib.parse.urlsplit(url).hostname or url
    waited = STALL if connected.is_set() else patience
    answer = outcome[0] if outcome else TimeoutError(f"no answer within {waited:g} s")
    if isinstance(answer, urllib.error.HTTPError):
        raise DownloadError(
            f"{url}: {host} refuses ({answer.code} {answer.reason}).{_after(advice)}", status=answer.code
        )
    if isinstance(answer, Exception):
        reason = getattr(answer, "reason", answer)
        raise DownloadError(f"{url}: {host} cannot be reached ({reason}). Connect to the network.{_after(advice)}")
    with answer:
        yield answer


def _checked(part: Path, sha256: str, host: str, advice: str) -> str:
    """Check a complete file, and return its SHA-256; what is wrong is removed.

    Raises:
        DownloadError: it is a web page, damaged, or another file.
    """
    with open(part, "rb") as file:
        start = file.read(512).lstrip().lower()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    fault = ""
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"{")):
        fault = "a web page or message came instead of the file"
    elif sha256 and not digest.startswith(sha256.lower()):
        fault = f"its SHA-256 is {digest}, not {sha256}"
    elif not sha256:
        fault = _fault_of_zip(part)
    if fault:
        part.unlink(missing_ok=True)
        _etag_file(part).unlink(missing_ok=True)
        raise DownloadError(f"{host}: the file is not what was asked for ({fault}). It was removed.{_after(advice)}")
    return digest


def _fault_of_zip(path: Path) -> str:
    """Return what is wrong with a PyTorch file by the checksums inside; "" for older files, which have none."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return ""
    try:
        with zipfile.ZipFile(path) as members:
            damaged = members.testzip()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError):
        return "it is cut short or damaged"
    return f"its part {damaged} is damaged" if damaged else ""


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keep other processes from downloading the same file; works on every platform and on network disks.

    Raises:
        OSError: the lock of a process that was killed may not be removed, or none may be created.
    """
    lock = target.with_name(f".{target.name}.lock")
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # its owner has just removed it
                if time.time() - lock.stat().st_mtime > _LOCK_AGE:
                    lock.unlink()
                    continue
            time.sleep(0.2)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_LOCK_AGE / _LOCK_RENEWALS):
            with contextlib.suppress(OSError):
                os.utime(lock)

    # in a thread: to check a large file on a slow disk takes minutes, without a step between
    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        lock.unlink(missing_ok=True)


def _etag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _first_byte(answer: Any) -> int | None:
    """Return where a partial answer begins."""
    words = (answer.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
    return int(words) if words.isdigit() else None


def _total(answer: Any, start: int) -> int | None:
    """Return the size of the whole file; None if the server does not say."""
    length = answer.headers.get("Content-Length") or ""
    return start + int(length) if length.isdigit() else None


def _after(advice: str) -> str:
    return f" {advice}" if advice else ""


def is_reachable(url: str, patience: float = PATIENCE) -> bool:
    """Check whether a server answers at all, if only with a refusal."""
    try:
        with _opened(url, {}, patience, ""):
            return True
    except DownloadError as error:
        return error.status is not None
