"""Where the images of a json are: exactly where it says, or where its tool's way of writing paths leads to.

Labeling tools export names with the folders of another machine, with backslashes, as URLs, or in another case. If no
file lies where the json says, the one file under the image folder whose path agrees with the name is taken.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from brs_detr.data.annotations import Images
from brs_detr.data.image_io import IMAGE_ENDINGS
from brs_detr.data.issues import DataError, IssueLog

_MAX_FILES = 1_000_000  # that a search goes through, in case someone names the root of a disk


def resolve_image_paths(
    images: Images, image_dir: str | Path, log: IssueLog, allow_outside: bool = False
) -> np.ndarray:
    """Find the file of every image; changes `images.names` where it is another one than the json names.

    Folders are listed once, rather than asked for each file. A name that leads nowhere is compared with the images
    under `image_dir`: written in another way (case, backslashes, URL encoding, Unicode form) it may be the same path.
    Only where no image at all lies as stated may paths also begin with other folders, or files end differently.
    A name that leads out of `image_dir` (an absolute path, `..`) leads nowhere unless `allow_outside`; links within it
    are followed.

    Returns:
        (I,) bool: whether it was found.

    Raises:
        DataError: a folder may not be read.
    """
    listings: dict[str, set[str]] = {}
    found = np.zeros(len(images), bool)
    outside = np.zeros(len(images), bool)
    for row, name in enumerate(images.names):
        if not allow_outside and leads_outside(name, image_dir):
            outside[row] = True
            continue
        folder, base = os.path.split(os.path.join(image_dir, name))
        if folder not in listings:
            listings[folder] = _files_in(folder)
        found[row] = base in listings[folder]
    if not found.all():
        _search(images, found, image_dir, log)
    for row in np.flatnonzero(~found):
        log.add("image_outside" if outside[row] else "image_missing", images.where(row))
    return found


def leads_outside(name: str, image_dir: str | Path) -> bool:
    """Whether a file name, taken as it is written, names a place outside a folder."""
    if not os.path.isabs(name) and ".." not in name:
        return False
    place, folder = os.path.abspath(os.path.join(image_dir, name)), os.path.abspath(image_dir)
    return not place.startswith(os.path.join(folder, ""))


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            # the entry knows its kind; only a link must be followed
            return {e.name for e in entries if (os.path.isfile(e.path) if e.is_symlink() else e.is_file())}
    except PermissionError as error:
        raise DataError(f"{folder}: this folder of images cannot be read ({error.strerror}).") from None
    except (OSError, ValueError):  # no such folder, or a name that cannot be one
        return set()


def _search(images: Images, found: np.ndarray, image_dir: str | Path, log: IssueLog) -> None:
    by_stem = defaultdict(list)
    for path in images_under(image_dir):
        by_stem[_parts(path, loose=True)[-1]].append(path)
    taken = {os.path.normpath(images.names[row]) for row in np.flatnonzero(found)}
    for loose in (False, True):
        if loose and found.any():
            return
        chosen: dict[str, list[int]] = defaultdict(list)
        for row in np.flatnonzero(~found):
            wanted, last = _parts(images.names[row], loose), _parts(images.names[row], loose=True)[-1:]
            agreeing = [path for path in by_stem[last[0]] if _agree(wanted, _parts(path, loose), loose)] if last else []
            if len(agreeing) == 1 and agreeing[0] not in taken:
                chosen[agreeing[0]].append(row)
        for path, rows in chosen.items():
            if len({images.names[row] for row in rows}) > 1 or not os.path.isfile(os.path.join(image_dir, path)):
                continue  # names in two folders lead to one file: whose it is, is not known
            for row in rows:
                log.add("image_elsewhere", images.where(row), path)
                images.names[row], found[row] = path, True


def _agree(wanted: Sequence[str], path: Sequence[str], loose: bool) -> bool:
    """Are they the same or, if loose, does the longer end as the shorter one?"""
    shared = min(len(wanted), len(path))
    return wanted[-shared:] == path[-shared:] if loose else wanted == path


def _parts(name: str, loose: bool) -> list[str]:
    """Folders and file name in one way of writing; loose: without the ending."""
    path = unicodedata.normalize("NFC", unquote(name)).replace("\\", "/").casefold()
    parts = [part.partition("?")[0].strip() for part in path.split("/")]
    parts = [part for part in parts if part not in ("", ".")]
    return [*parts[:-1], os.path.splitext(parts[-1])[0]] if loose and parts else parts


def images_under(folder: str | Path) -> Iterator[str]:
    """Paths, relative to a folder, of the files under it that are named like images; not behind linked folders."""
    looked_at = 0
    for place, folders, names in os.walk(folder):
        folders.sort()
        relative = os.path.relpath(place, folder)
        for name in sorted(names):
            if name.lower().endswith(IMAGE_ENDINGS):
                yield name if relative == "." else os.path.join(relative, name)
        looked_at += len(names)
        if looked_at > _MAX_FILES:
            return


def guess_folder(names: Sequence[str], start: str | Path) -> tuple[Path, int] | None:
    """The folder under `start` that holds the most images of these names, whatever folders the names begin with.

    Returns:
        that folder, or the one around all of them where it holds fewer than nine tenths, and how many were found
        there; None where there is none.
    """
    wanted, counts = {tuple(_parts(name, loose=True)[-1:]) for name in names}, Counter()
    for path in images_under(start):
        if tuple(_parts(path, loose=True)[-1:]) in wanted and os.path.isfile(os.path.join(start, path)):
            counts[os.path.dirname(path)] += 1
    if not counts:
        return None
    folder, count = counts.most_common(1)[0]
    if count < 0.9 * len(names):
        folder, count = os.path.commonpath(counts), counts.total()
    return Path(start, folder), count


def usual_folder(json_path: str | Path, names: Sequence[str]) -> Path:
    """The folder that most likely holds the images of a json, from where datasets usually keep them.

    Args:
        json_path: annotation file.
        names: file names in it; without any there is nothing to look for.

    Raises:
        DataError: they are not under the json's folder nor, if that is one for annotations, beside it.
    """
    path = Path(json_path)
    stem = path.stem.removeprefix("instances_")
    places = [path.parent, *(root / sub for root in (path.parent, path.parent.parent) for sub in ("images", stem, ""))]
    places += [path.parent.parent / "images" / stem]
    for place in places:
        if not names or any(not leads_outside(name, place) and os.path.isfile(place / name) for name in names[:20]):
            return place
    # not further up: there another dataset may have images of the same names
    beside = path.parent.parent if path.parent.name.lower().startswith("annotation") else path.parent
    guess = guess_folder(names, beside)
    if guess is not None:
        return guess[0]
    raise DataError(f"{json_path}: its images are not in a usual place; name their folder with --images DIR.")
