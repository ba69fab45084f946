"""Split a dataset by image: seeded, with every class on both sides as far as possible.

Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data" (2011): the rarest class is distributed
first, since images of frequent classes remain to correct the sizes. Here there are two parts, and a hash of the image's
name takes the place of the random choice, so that the same images are held out on every machine and in every format.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence, Set
from pathlib import PureWindowsPath

from brs_detr.data.issues import DataError


def hold_out_images(images: Mapping[str, Set[Hashable]], fraction: float, seed: int = 0) -> set[str]:
    """Choose the images to hold out.

    A class in two or more images is on both sides, unless rarer classes of the same images prevent it; of a class in n
    images about n * fraction are held out.

    Args:
        images: classes of the objects of each image, by a name that is the same wherever the dataset lies.
        fraction: of the images, in (0, 1).
        seed: another one gives another choice.

    Returns:
        The names of the images held out: at least one and not all of them.
    """
    hashes = {name: hashlib.sha256((f"{seed}/" * bool(seed) + name).encode()).digest() for name in images}
    order = sorted(images, key=lambda name: (hashes[name], name))
    of_class: dict[Hashable, list[str]] = {}
    for name in order:
        for label in images[name]:
            of_class.setdefault(label, []).append(name)
    held: dict[str, bool] = {}  # of the images assigned so far
    for _, names in sorted(of_class.items(), key=lambda item: (len(item[1]), [hashes[name] for name in item[1]])):
        open_names = [name for name in names if name not in held]
        wanted = _share(len(names), fraction) - sum(held.get(name, False) for name in names)
        for position, name in enumerate(open_names):
            held[name] = position < wanted
    rest = [name for name in order if name not in held]
    wanted = _share(len(order), fraction) - sum(held.values())
    for position, name in enumerate(rest):
        held[name] = position < wanted
    return _both_sides({name for name in order if held[name]}, order)


def _share(count: int, fraction: float) -> int:
    """Return how many of `count` images to hold out: at least one, but not all."""
    return min(max(1, round(count * fraction)), count - 1)


def _both_sides(held: set[str], order: Sequence[str]) -> set[str]:
    """Correct a choice of no image or of all, as classes of one image each make it."""
    if not held:
        return {order[0]}
    return held if len(held) < len(order) else held - {order[-1]}


def require_fraction(fraction: float, splits: Mapping[str, int], setting: str) -> None:
    """Refuse to split what has a validation split, or cannot be split.

    Args:
        fraction: of the images to hold out.
        splits: number of images by split.
        setting: name of the option or setting that gives the fraction.

    Raises:
        DataError: naming the splits.
    """
    if "val" in splits or splits.get("train", 0) < 2 or not 0 < fraction < 1:
        needed = "a number between 0 and 1, a train split of at least two images, and no val split"
        shown = ", ".join(f"{name} ({count:,})" for name, count in splits.items())
        raise DataError(f"{setting} {fraction:g}: it needs {needed}. The splits are {shown}.")


def short_names(paths: Sequence[str]) -> list[str]:
    """Name images by their files without folder and ending, where that is unique: so they are called in every format.

    Args:
        paths: of the images, with slashes or backslashes.

    Returns:
        A name for each; the path where another one ends alike.
    """
    stems = [PureWindowsPath(path).stem for path in paths]
    by_stem: defaultdict[str, set[str]] = defaultdict(set)
    for path, stem in zip(paths, stems, strict=True):
        by_stem[stem].add(path)
    return [path if len(by_stem[stem]) > 1 else stem for path, stem in zip(paths, stems, strict=True)]
