"""What a user names to detect objects in: images, folders, patterns, addresses, videos, cameras.

Nothing here imports torch or opens a file, so that a word that names nothing is refused at once; `video.py` reads.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from brs_detr.exit_codes import MissingPackageError

VIDEO_ENDINGS = (
    ".mp4",
    ".m4v",
    ".mov",
    ".avi",
    ".mkv",
    ".webm",
    ".mpg",
    ".mpeg",
    ".mts",
    ".m2ts",
    ".wmv",
    ".flv",
    ".3gp",
    ".ogv",
)
MISSING = "videos and cameras need PyAV. Install it with: pip install av"
Kind = Literal["image", "url", "video", "camera"]


class Source(NamedTuple):
    """One thing to read.

    Attributes:
        kind: an image file; an address whose server says what it is; a video; or a camera, which does not end by
            itself.
        address: path or URL, or number of a camera.
        name: of the source in results, each another one: of a file its name, or its path relative to the folder that
            was named or to the one that all files have in common; of a URL the URL without password.
        stem: path without drive and ".." to name files by, as `name` for a path.
    """

    kind: Kind
    address: str
    name: str
    stem: str


def require_sources(words: Sequence[str]) -> None:
    """Refuse words that name nothing, or a video or camera without PyAV; neither opens a file nor lists a folder.

    Raises:
        FileNotFoundError: naming the first one.
        MissingPackageError: PyAV is not installed.
    """
    if not words:
        raise FileNotFoundError("predict needs what to look at: images, folders, patterns, URLs, videos or a camera.")
    for word in words:
        if _scheme(word):
            _require_url(word)
        is_live = _scheme(word).startswith("rt") or _camera(word) is not None
        if (is_live or is_video_name(word)) and not has_pyav():
            raise MissingPackageError(f"{without_password(word)}: {MISSING}.")
        if not (_scheme(word) or is_live or os.path.lexists(word) or _matches(word)):
            pattern = "no file matches this pattern" if glob.has_magic(word) else "no such image, video or folder"
            raise FileNotFoundError(f"{without_password(word)}: {pattern}.")


def expand(words: Sequence[str], drawings: Path | None = None) -> tuple[list[Source], int]:
    """List what the words name, each file once, files of a folder or pattern sorted by name.

    Args:
        words: of the command line.
        drawings: folder that drawings are written to, perhaps by an earlier `predict` too; its files are left out of
            what a folder or pattern around it names.

    Returns:
        The sources, and how many files were left out.

    Raises:
        FileNotFoundError: a word names nothing, or a folder without an image or video.
    """
    require_sources(words)
    found: list[Source | tuple[Path, str]] = []
    drawn: list[Path] = []
    for word in words:
        path = Path(word)
        camera = _camera(word)
        if scheme := _scheme(word):
            found.append(_of_url(word, scheme))
        elif camera is not None:
            found.append(Source("camera", camera, camera, f"camera_{re.sub('[^0-9a-zA-Z]+', '_', camera).strip('_')}"))
        elif path.is_dir():
            above = Path(os.path.abspath(path)).name if len(words) > 1 else ""
            own, others = _split_off(drawings, path, _files_in(path))
            drawn += own
            found += [(file, Path(above, file.relative_to(path)).as_posix()) for file in others]
        elif os.path.lexists(word):
            found.append((path, path.name))
        else:
            own, others = _split_off(drawings, _fixed_part(word), _matches(word))
            drawn += own
            found += [(file, file.name) for file in others]
    files = {os.path.abspath(entry[0]): entry for entry in found if not isinstance(entry, Source)}
    if len({name for _, name in files.values()}) < len(files):  # files of one name in several folders
        root = _common_folder(list(files))
        files = {path: (file, Path(path).relative_to(root).as_posix()) for path, (file, _) in files.items()}
    entries = [entry if isinstance(entry, Source) else _of_file(*files[os.path.abspath(entry[0])]) for entry in found]
    return list(dict.fromkeys(entries)), len({os.path.abspath(file) for file in drawn} - files.keys())


def has_pyav() -> bool:
    """Return True if PyAV is installed, without importing it."""
    return importlib.util.find_spec("av") is not None


def without_password(word: str) -> str:
    """Return a URL without user and password, which messages and results must not spread; another word as it is."""
    return re.sub(r"^([a-zA-Z][\w+.-]*://)[^/?#]*@", r"\1", word)


def is_video_name(name: str) -> bool:
    """Return True if a file name has the ending of a video."""
    return os.path.splitext(name)[1].lower() in VIDEO_ENDINGS


def _scheme(word: str) -> str:
    """Return the scheme of a URL in lower case, "" for anything else, also for a Windows drive."""
    match = re.match(r"(https?|rtsps?|rtmps?)://", word, re.IGNORECASE)
    return match[1].lower() if match else ""


def _require_url(word: str) -> None:
    """Refuse a URL that cannot be taken apart.

    Raises:
        FileNotFoundError: naming it.
    """
    try:
        host = urlsplit(word).hostname
    except ValueError:
        host = None
    if not host:
        raise FileNotFoundError(f"{without_password(word)}: this URL names no server.")


def _camera(word: str) -> str | None:
    """Return the number or device of a camera, None for anything else; a file of that name is a file."""
    if word.isascii() and word.isdigit() and not os.path.lexists(word):
        return word
    return word if re.fullmatch(r"/dev/video\d+", word) else None


def _of_url(url: str, scheme: str) -> Source:
    parts = urlsplit(url)
    name = without_password(urlunsplit(parts))
    last = unquote(parts.path.rstrip("/").rpartition("/")[2]) or parts.hostname or "url"
    stem = re.sub(r'[\x00-\x1f<>:"/\\|?*]', "_", last).strip(". ") or "url"
    if not scheme.startswith("http"):
        return Source("camera", url, name, stem)
    return Source("video" if is_video_name(stem) else "url", url, name, stem)


def _of_file(path: Path, name: str) -> Source:
    return Source("video" if is_video_name(path.name) else "image", str(path), name, name)


def _files_in(folder: Path) -> list[Path]:
    """List the images and videos under a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    # here, since it imports torch
    from PIL import Image

    from brs_detr.data.image_io import is_image_name

    Image.init()
    files = sorted(file for file in folder.rglob("*") if is_image_name(file.name) or is_video_name(file.name))
    if not files:
        raise FileNotFoundError(f"{folder}: no image or video in this folder.")
    return files


def _matches(pattern: str) -> list[Path]:
    """List the files that match a pattern, `**` any number of folders, sorted by name."""
    if not glob.has_magic(pattern):
        return []
    return sorted(Path(name) for name in glob.iglob(pattern, recursive=True) if not os.path.isdir(name))


def _fixed_part(pattern: str) -> Path:
    """Return the folder that a pattern begins with."""
    return Path(os.path.dirname(re.split(r"[*?\[]", pattern)[0]))


def _split_off(drawings: Path | None, named: Path, files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Split files into those in a folder of drawings and the others; in a folder that was named, all are others."""
    if drawings is None or _is_in(named, drawings):
        return [], files
    inside = {folder: _is_in(folder, drawings) for folder in {file.parent for file in files}}
    return [file for file in files if inside[file.parent]], [file for file in files if not inside[file.parent]]


def _is_in(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _common_folder(files: Sequence[str]) -> str:
    """Return the deepest folder that holds all files."""
    try:
        return os.path.commonpath([os.path.dirname(file) for file in files])
    except ValueError:  # on two Windows drives
        raise FileNotFoundError(
            f"{files[0]}, {files[-1]}: files of two drives have no common folder. Name those of one drive."
        ) from None
