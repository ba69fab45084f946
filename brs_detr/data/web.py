"""Fetch an image from a web server: with limits on time and size, and never a page in its place."""

from __future__ import annotations

import base64
import http.client
import time
import urllib.error
import urllib.request
from typing import IO, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from brs_detr.data.config import Limits
from brs_detr.data.image_io import ImageError
from brs_detr.data.sources import without_password
from brs_detr.user_files import UserFileError, require_at_most

TIMEOUT = 10.0  # seconds without an answer
MAX_SECONDS = 300.0  # for the whole file: a server that sends a byte now and then would never end
_CHUNK = 2**18
_VIDEO_TYPES = ("video/", "multipart/x-mixed-replace", "application/vnd.apple.mpegurl", "application/x-mpegurl")


class _HTTPOnly(urllib.request.HTTPRedirectHandler):
    """Follow redirects to web servers only, and send a password to no other server than the one it is for."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Refuse a redirect to another kind of address, such as ftp."""
        plain = without_password(newurl)
        if urlsplit(plain).scheme not in ("http", "https"):
            raise urllib.error.URLError(f"it leads to {plain}, which is not on a web server")
        request = super().redirect_request(req, fp, code, msg, headers, plain)
        if request is not None:
            stays = (request.type, request.host) == (req.type, req.host)
            own = req.unredirected_hdrs.get("Authorization") if stays else None
            _authorize(request, _authorization(newurl) or own)
        return request


def fetch(url: str, name: str, limits: Limits) -> bytes | None:
    """Fetch the file at a URL, up to `limits.max_image_bytes`.

    Args:
        url: http or https; a user and password before the host are sent as basic authorization.
        name: names it in errors.
        limits: on its size.

    Returns:
        Its content; None if the server says that it is a video.

    Raises:
        ImageError: the server does not answer, refuses, is too slow, or sends a page or too much.
    """
    deadline = time.monotonic() + MAX_SECONDS
    try:
        request = urllib.request.Request(
            _ascii(without_password(url)), headers={"User-Agent": "brs-detr", "Accept": "image/*, */*;q=0.5"}
        )
        _authorize(request, _authorization(url))
        with urllib.request.build_opener(_HTTPOnly).open(request, timeout=TIMEOUT) as answer:
            kind = answer.headers.get_content_type()
            if kind.startswith(_VIDEO_TYPES):
                return None
            if kind in ("text/html", "application/xhtml+xml"):
                raise ImageError(
                    f"{name}: the server sends a web page, not an image. Give the address of the image itself."
                )
            return _read(answer, limits, deadline)
    except ImageError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ImageError(f"{name}: cannot be fetched: {_reason(error)}.") from None


def _read(answer: http.client.HTTPResponse, limits: Limits, deadline: float) -> bytes:
    """Read an answer in chunks, so that neither its size nor its time exceeds a limit."""
    stated = answer.headers.get("Content-Length", "")
    if stated.isdigit():
        require_at_most(int(stated), limits.max_image_bytes, "data.max_image_bytes")
    parts, size = [], 0
    while part := answer.read1(_CHUNK):
        parts.append(part)
        size += len(part)
        require_at_most(size, limits.max_image_bytes, "data.max_image_bytes")
        if time.monotonic() > deadline:
            raise UserFileError(f"after {MAX_SECONDS:g} s only {size:,} bytes have come")
    if stated.isdigit() and size < int(stated):
        raise UserFileError(f"the connection ended after {size:,} of {int(stated):,} bytes")
    return b"".join(parts)


def _authorization(url: str) -> str | None:
    """Return the header for the user and password of a URL, None where it has none."""
    user_and_password, at, _ = urlsplit(url).netloc.rpartition("@")
    if not at:
        return None
    user, _, password = user_and_password.partition(":")
    return f"Basic {base64.b64encode(f'{unquote(user)}:{unquote(password)}'.encode()).decode()}"


def _authorize(request: urllib.request.Request, authorization: str | None) -> None:
    """Add the header to a request, but not to those that a redirect makes of it."""
    if authorization is not None:
        request.add_unredirected_header("Authorization", authorization)


def _ascii(url: str) -> str:
    """Encode what is not ASCII in a URL: the host by IDNA, the rest in percent."""
    parts = urlsplit(url)
    netloc = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    safe = "/%:@!$&'()*+,;=~?-._"
    return urlunsplit((parts.scheme, netloc, quote(parts.path, safe), quote(parts.query, safe), ""))


def _reason(error: Exception) -> str:
    """Say in words why there is no file."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}".rstrip()
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"the server has sent nothing for {TIMEOUT:g} s"
    return (getattr(cause, "strerror", None) or str(cause) or type(cause).__name__).rstrip(".")
