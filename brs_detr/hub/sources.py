"""From what a user names to a local file: a path, the name of a published checkpoint, or a repository of a hub."""

from __future__ import annotations

import os
import re
from html import unescape
from itertools import pairwise
from pathlib import Path

from brs_detr.exit_codes import Failure
from brs_detr.hub.download import DownloadError, cache_folder, download, read_page
from brs_detr.hub.published import PAGE, Published, find, nearest
from brs_detr.user_files import is_missing, printable

HUB = re.compile(r"hf:/{1,2}(?P<repository>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?$")
"""hf://user/repository, perhaps with @revision; `Path` makes one slash of two."""
WEIGHTS = "model.safetensors"  # the name of the weights in a repository of a hub


class SourceError(Failure, ValueError):
    """Weights that cannot be found; the message names the nearest names."""


def is_hub(source: str | os.PathLike[str]) -> bool:
    """Check whether this is meant as a repository of the Hugging Face hub."""
    return Path(source).as_posix().startswith("hf:")


def require_source(source: str | os.PathLike[str], setting: str = "") -> None:
    """Refuse what is neither an existing path, the name of a published checkpoint, nor of a hub; downloads nothing.

    Args:
        source: as the user gives it.
        setting: beginning of the error, for a path that a setting gives.

    Raises:
        SourceError: naming what may have been meant.
    """
    text = printable(Path(source).as_posix())
    if not is_missing(Path(source)):
        return
    if is_hub(source):
        if HUB.match(text) is None:
            written = text.replace("hf:", "hf://").replace(":///", "://")
            raise SourceError(f"{setting}{written}: not the name of a repository. Write hf://user/repository.")
        return
    if find(text) is None:
        near = nearest(text) if "/" not in text else []
        hint = f". Did you mean {' or '.join(near)}?" if near else ""
        raise SourceError(
            f"{setting}{text}: neither a weights file nor a run folder with best.safetensors or last.safetensors{hint}"
        )


def local_path(source: str | os.PathLike[str]) -> Path:
    """Return a path as it is, and the file of a published checkpoint or of a hub, downloaded at its first use.

    Raises:
        SourceError: see `require_source`.
        DownloadError: it cannot be downloaded.
    """
    require_source(source)
    path = Path(source)
    if not is_missing(path):
        return path
    if is_hub(source):
        from brs_detr.hub.huggingface import fetch

        match = HUB.match(path.as_posix())
        assert match is not None  # require_source
        return fetch(match["repository"], match["revision"])
    entry = find(path.as_posix())
    assert entry is not None  # likewise
    return fetch_published(entry)


def fetch_published(entry: Published) -> Path:
    """Return the file of a published checkpoint in the cache, downloaded at its first use."""
    target = cache_folder() / "weights" / f"{entry.name}.pth"
    if target.is_file():
        return target
    advice = f"Or download {target.name} by hand from {PAGE} and give its path, or put it at {target}."
    url = entry.url or address_in_folder(entry, advice)
    print(f"{entry.name}: downloading to {printable(target)} ({entry.license} license)")
    digest = download(url, target, entry.sha256, advice=advice)
    if digest and not entry.sha256:
        print(f"{entry.name}: complete; no checksum is published to compare with. SHA-256 {digest}")
    return target


def address_in_folder(entry: Published, advice: str) -> str:
    """Look up the address of NAME.pth in a Google Drive folder.

    Raises:
        DownloadError: the folder cannot be read, or does not list the file.
    """
    page = read_page(f"https://drive.google.com/embeddedfolderview?id={entry.folder}#list", advice=advice)
    for number, title in re.findall(r'/file/d/([\w-]{10,})/[^>]*>(?:(?!/file/d/).)*?entry-title">([^<]*)<', page, re.S):
        if unescape(title).strip() == f"{entry.name}.pth":
            return f"https://drive.usercontent.google.com/download?id={number}&export=download&confirm=t"
    raise DownloadError(f"{entry.name}: its folder on Google Drive does not list {entry.name}.pth. {advice}")


def in_cache(path: Path) -> bool:
    """Check whether a file is one of the cache, beside which no results should be written."""
    parts = path.parts  # of the hub's client: models--user--name/snapshots/REVISION/FILE, wherever HF_HUB_CACHE is
    of_hub = any(one.startswith("models--") and other == "snapshots" for one, other in pairwise(parts))
    return cache_folder() in path.absolute().parents or of_hub
