"""Read Cityscapes' instance annotations (gtFine), with masks.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding". The ids of `*_gtFine_instanceIds.png`
are 1000 times the class plus a number for single objects, and the class alone for a group that could not be separated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from brs_detr.data.config import Limits
from brs_detr.data.formats.base import ImportedDataset, Notes, Sample
from brs_detr.data.image_io import ImageError, read_integers
from brs_detr.data.issues import DataError
from brs_detr.ops.rle import as_text, encode

# the eight classes of its instance benchmark; ids as in its own table of labels
CLASSES = {
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
SPLITS = ("train", "val")  # the annotations of `test` are not public
_IMAGE, _IDS = "_leftImg8bit.png", "_gtFine_instanceIds.png"


def read_cityscapes(source: str | Path, max_image_bytes: int = Limits.max_image_bytes) -> ImportedDataset:
    """Read a folder with `leftImg8bit/SPLIT/CITY` and `gtFine/SPLIT/CITY`, as they are downloaded and unpacked.

    Groups become crowds. Category ids are those of Cityscapes, 24 to 33.

    Args:
        source: the folder.
        max_image_bytes: maximum size of an annotation file.

    Raises:
        DataError: no split has an image with annotations.
    """
    root, notes = Path(source).absolute(), Notes()
    limits = Limits(max_image_bytes=max_image_bytes)
    splits: dict[str, list[Sample]] = {}
    for split in SPLITS:
        samples = []
        for path in sorted((root / "leftImg8bit" / split).glob(f"*/*{_IMAGE}")):
            ids_path = root / "gtFine" / split / path.parent.name / path.name.replace(_IMAGE, _IDS)
            try:
                ids = read_integers(ids_path, limits)
            except ImageError as error:
                notes.add("images left out without readable annotations", error)
                continue
            height, width = ids.shape
            samples.append(Sample(path, (height, width), instances(ids)))
        if samples:
            splits[split] = samples
    if not splits:
        reasons = "; ".join(notes.lines(1)) or "there are no images in leftImg8bit/train/CITY or leftImg8bit/val/CITY"
        raise DataError(f"{root}: this is not Cityscapes: {reasons}. Unpack leftImg8bit and gtFine there.")
    return ImportedDataset(dict(CLASSES), splits, notes)


def instances(ids: np.ndarray) -> list[dict[str, Any]]:
    """Convert a map of object ids (h, w) to COCO annotations without their ids, with run lengths."""
    by_column = np.asfortranarray(ids)  # as run lengths go
    annotations = []
    for key in np.unique(by_column).tolist():
        category = key if key < 1000 else key // 1000
        if category not in CLASSES:
            continue
        rle = encode(by_column == key)
        annotations.append(
            {
                "category_id": category,
                "bbox": coco_mask.toBbox(rle).tolist(),
                "area": int(coco_mask.area(rle)),
                "iscrowd": int(key < 1000),
                "segmentation": as_text(rle),
            }
        )
    return annotations
