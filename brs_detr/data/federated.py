"""LVIS's federated annotations: what was looked for in which image, and how often images of rare classes are shown.

Gupta, Dollar and Girshick, "LVIS: A Dataset for Large Vocabulary Instance Segmentation": an image is annotated for some
of the classes only. Of the others nothing is known, so detections of them are neither right nor wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from brs_detr.data.json_file import as_int
from brs_detr.data.packed import PackedAnnotations
from brs_detr.user_files import printable

LISTS = ("neg_category_ids", "not_exhaustive_category_ids")  # of an image: absent from it; not all objects annotated


def read_federated(data: dict[str, Any]) -> tuple[dict[int, dict[str, list[int]]], dict[int, str]]:
    """Read the lists of the images and the frequencies of the categories.

    Args:
        data: content of a COCO json.

    Returns:
        by image id the lists of category ids, by name; and by category id "r", "c" or "f": in few, some or many
        training images. Both are empty for other datasets than LVIS.
    """
    lists: dict[int, dict[str, list[int]]] = {}
    for entry in data["images"]:
        key = as_int(entry.get("id")) if isinstance(entry, dict) else None
        if key is not None and isinstance(entry.get(LISTS[0]), list):
            lists.setdefault(key, {name: _ids(entry.get(name)) for name in LISTS})
    if not lists:
        return {}, {}
    frequency = {}
    for entry in data["categories"]:
        key = as_int(entry.get("id")) if isinstance(entry, dict) else None
        if key is not None and entry.get("frequency") in ("r", "c", "f"):
            frequency[key] = str(entry["frequency"])
    return lists, frequency


def _ids(value: Any) -> list[int]:
    """Return the integers of a list."""
    return [key for key in map(as_int, value if isinstance(value, list) else []) if key is not None]


def describe_repeats(packed: PackedAnnotations, classes: Sequence[str], threshold: float) -> str:
    """Describe in a line what `repeat_factors` does to an epoch, with the class that is repeated most."""
    factors = repeat_factors(packed, threshold)
    head = f"data.repeat_threshold={threshold:g}: {len(packed):,} images are shown {factors.sum():,.0f} times an epoch"
    if factors.max() <= 1:
        return f"{head}: every class is in a larger share of them"
    objects = np.repeat(factors == factors.max(), np.diff(packed.offsets)) & ~packed.iscrowd
    rows = np.repeat(np.arange(len(packed)), np.diff(packed.offsets))
    images_of = {
        label: len(np.unique(rows[~packed.iscrowd & (packed.labels == label)]))
        for label in np.unique(packed.labels[objects])
    }
    rarest = min(images_of, key=lambda label: images_of[label])
    return f"{head}, those of {printable(classes[rarest])} (in {images_of[rarest]:,}) {factors.max():.1f} times each"


def repeat_factors(packed: PackedAnnotations, threshold: float) -> np.ndarray:
    """Compute how often each image is shown in an epoch, so that rare classes are seen more often.

    The LVIS paper's repeat factor sampling: r(image) = max over its classes of max(1, sqrt(threshold / f(class))),
    where f is the fraction of the images that have an object of the class. Crowds do not count.

    Args:
        packed: the annotations of the dataset.
        threshold: classes in a smaller fraction of the images are oversampled; LVIS uses 1e-3.

    Returns:
        (I,) float64, at least 1; 1 for an image without objects.
    """
    rows = np.repeat(np.arange(len(packed)), np.diff(packed.offsets))[~packed.iscrowd]
    labels = packed.labels[~packed.iscrowd]
    pairs = np.unique(np.column_stack([rows, labels]), axis=0)
    fraction = np.bincount(pairs[:, 1]) / len(packed)
    factors = np.ones(len(packed))
    of_class = np.sqrt(threshold / np.maximum(fraction, 1e-12))
    np.maximum.at(factors, pairs[:, 0], of_class[pairs[:, 1]])
    return factors
