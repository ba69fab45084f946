"""Resolve the file names of a json: first exactly as written, then as labeling tools distort them.

Labeling tools export names with the folders of another machine, with backslashes, as URLs, or in another case. If no
file exists at the name as written, the only file under the image folder whose path agrees with it is used.
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
from brs_detr.data.formats.base import IMAGE_FOLDERS, split_named
from brs_detr.data.image_io import IMAGE_ENDINGS
from brs_detr.data.issues import DataError, IssueLog
from brs_detr.data.layouts import split_of_name
from brs_detr.user_files import printable

_MAX_FILES = 1_000_000  # searched at most, in case the image folder is the root of a disk


def resolve_image_paths(
    images: Images, image_dir: str | Path, log: IssueLog, allow_outside: bool = False
) -> np.ndarray:
    """Find the file of every image; updates `images.names` if the file has another name than the json gives.

    A name without a file is compared with the images under `image_dir`: written differently (case, backslashes, URL
    encoding, Unicode form) it may be the same path. Only if no image at all exists as written may paths also differ in
    their first folders or in the file ending. A name that leads out of `image_dir` (an absolute path, `..`) is not
    followed unless `allow_outside`; links within `image_dir` are.

    Returns:
        (I,) bool: True if the file exists.

    Raises:
        DataError: a folder may not be read.
    """
    # one listing per folder: a stat per file is slow on network storage
    listings: dict[str, set[str]] = {}
    exists = np.zeros(len(images), bool)
    outside = np.zeros(len(images), bool)
    for row, name in enumerate(images.names):
        if not allow_outside and leads_outside(name, image_dir):
            outside[row] = True
            continue
        folder, base = os.path.split(os.path.join(image_dir, name))
        if folder not in listings:
            listings[folder] = _files_in(folder)
        exists[row] = base in listings[folder]
    if not exists.all():
        _search(images, exists, image_dir, log)
    for row in np.flatnonzero(~exists).tolist():
        log.add("image_outside" if outside[row] else "image_missing", images.where(row))
    return exists


def leads_outside(name: str, image_dir: str | Path) -> bool:
    """Return True if a file name, as written, leads to a path outside a folder."""
    if not os.path.isabs(name) and ".." not in name:  # the usual case, without building two absolute paths
        return False
    path, folder = os.path.abspath(os.path.join(image_dir, name)), os.path.abspath(image_dir)
    return not path.startswith(os.path.join(folder, ""))


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            # scandir returns the file type with the name, so only links need a stat
            return {e.name for e in entries if (os.path.isfile(e.path) if e.is_symlink() else e.is_file())}
    except PermissionError as error:
        raise DataError(f"{folder}: this folder of images cannot be read ({error.strerror}).") from None
    except (OSError, ValueError):  # no such folder, or a name that cannot be one
        return set()


def _search(images: Images, exists: np.ndarray, image_dir: str | Path, log: IssueLog) -> None:
    """Search the images that do not exist as written; updates `images.names` and `exists`."""
    by_stem = defaultdict(list)
    for path in images_under(image_dir):
        by_stem[_parts(path, loose=True)[-1]].append(path)
    taken = {os.path.normpath(images.names[row]) for row in np.flatnonzero(exists)}
    for loose in (False, True):
        # loose only if the folder's layout differs altogether: otherwise a missing image must stay missing
        if loose and exists.any():
            return
        chosen: dict[str, list[int]] = defaultdict(list)
        for row in np.flatnonzero(~exists).tolist():
            wanted, last = _parts(images.names[row], loose), _parts(images.names[row], loose=True)[-1:]
            agreeing = [path for path in by_stem[last[0]] if _agree(wanted, _parts(path, loose), loose)] if last else []
            if len(agreeing) == 1 and agreeing[0] not in taken:
                chosen[agreeing[0]].append(row)
        for path, rows in chosen.items():
            if len({images.names[row] for row in rows}) > 1 or not os.path.isfile(os.path.join(image_dir, path)):
                continue  # two different names match one file, so it is ambiguous
            for row in rows:
                log.add("image_elsewhere", images.where(row), path)
                images.names[row], exists[row] = path, True


def _agree(wanted: Sequence[str], path: Sequence[str], loose: bool) -> bool:
    """Compare two paths, given as parts; loose: the longer one must end with the shorter one."""
    shared = min(len(wanted), len(path))
    return wanted[-shared:] == path[-shared:] if loose else wanted == path


def _parts(name: str, loose: bool) -> list[str]:
    """Split a path into normalized folder names and file name; loose: without the file ending."""
    path = unicodedata.normalize("NFC", unquote(name)).replace("\\", "/").casefold()
    parts = [part.partition("?")[0].strip() for part in path.split("/")]
    parts = [part for part in parts if part not in ("", ".")]
    return [*parts[:-1], os.path.splitext(parts[-1])[0]] if loose and parts else parts


def images_under(folder: str | Path) -> Iterator[str]:
    """Iterate over the files under a folder with an image's ending, relative to it; linked folders are skipped."""
    num_files = 0
    for current, folders, names in os.walk(folder):
        folders.sort()  # a fixed order on every file system
        relative = os.path.relpath(current, folder)
        for name in sorted(names):
            if name.lower().endswith(IMAGE_ENDINGS):
                yield name if relative == "." else os.path.join(relative, name)
        num_files += len(names)
        if num_files > _MAX_FILES:
            return


def guess_folder(names: Sequence[str], start: str | Path) -> tuple[Path, int] | None:
    """Find the folder under `start` with the most images of these names; folders in the names are ignored.

    Returns:
        (folder, number of images found in it); if the folder has less than 90 % of them, the common parent of all
        folders with some; None if no image was found.
    """
    counts = _count_by_folder(names, start, loose=True)
    if not counts:
        return None
    folder, count = counts.most_common(1)[0]
    if count < 0.9 * len(names):
        folder, count = os.path.commonpath(counts), counts.total()
    return Path(start, folder), count


def _count_by_folder(names: Sequence[str], start: str | Path, loose: bool) -> Counter[str]:
    """Count the images of these names by folder under `start`; loose: with any file ending."""
    wanted = {tuple(_parts(name, loose)[-1:]) for name in names}
    counts: Counter[str] = Counter()
    for path in images_under(start):
        if tuple(_parts(path, loose)[-1:]) in wanted and os.path.isfile(os.path.join(start, path)):
            counts[os.path.dirname(path)] += 1
    return counts


def _full_folders(names: Sequence[str], start: str | Path, split: str | None) -> list[Path]:
    """List the folders under `start` that hold nearly all images of these names.

    Of several those whose path names the split are kept, then those with the same file endings (masks often have
    another one), then those of images by their name.
    """

    def of_split(folder: str) -> bool:
        return split is not None and any(split in (split_named(p), split_of_name(p)) for p in Path(folder).parts)

    def of_images(folder: str) -> bool:
        return any(part.lower() in IMAGE_FOLDERS for part in Path(folder).parts)

    folders = _holding_most(_count_by_folder(names, start, loose=True), names)
    if len(folders) > 1:
        same_ending = _holding_most(_count_by_folder(names, start, loose=False), names)
        for test in (of_split, same_ending.__contains__, of_images):
            folders = list(filter(test, folders)) or folders
    return [Path(start, folder) for folder in folders]


def _holding_most(counts: Counter[str], names: Sequence[str]) -> list[str]:
    return sorted(folder for folder, count in counts.items() if count >= 0.9 * len(names))


def usual_folder(
    json_path: str | Path, names: Sequence[str], advice: str = "Give the image folder with --images DIR."
) -> Path:
    """Guess the image folder of a json from the usual dataset layouts.

    Args:
        json_path: annotation file.
        names: file names in it; if it lists none, the json's own folder is returned.
        advice: ends the errors.

    Raises:
        DataError: no image is below the json's folder nor, if that is a folder of annotations, below its parent; or
            several folders hold images of these names, and none or more than one is of the json's split.
    """
    path = Path(json_path)
    stem = path.stem.removeprefix("instances_")  # COCO: annotations/instances_train2017.json, images in train2017/
    roots = (path.parent, path.parent.parent)
    candidates = [path.parent, *(root / sub for root in roots for sub in ("images", stem, ""))]
    candidates += [path.parent.parent / "images" / stem]
    for folder in candidates:
        # 20 names: the first images may be missing without the folder being wrong
        if not names or any(not leads_outside(name, folder) and os.path.isfile(folder / name) for name in names[:20]):
            return folder
    # not further up: there another dataset may have images of the same names
    beside = path.parent.parent if path.parent.name.lower().startswith("annotation") else path.parent
    full = _full_folders(names, beside, split_of_name(path.name) or split_named(path.parent.name))
    if len(full) > 1:
        shown = ", ".join(printable(os.path.relpath(folder, beside)) for folder in full[:5])
        raise DataError(f"{json_path}: its images could be in any of {len(full)} folders: {shown}. {advice}")
    if full:
        return full[0]
    guess = guess_folder(names, beside)
    if guess is not None:
        return guess[0]
    raise DataError(f"{json_path}: no image was found in the usual folders. {advice}")
