"""All annotations of a dataset as a few arrays, which worker processes share.

Python objects per annotation would be copied into every worker as their reference counts change; arrays are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from brs_detr.data.annotations import Images, Objects


@dataclass(frozen=True)
class PackedAnnotations:
    """Annotations sorted by image.

    Attributes:
        image_ids: (I,) int64, as in the json.
        names: (bytes,) uint8, all file names in UTF-8 one after the other; name_offsets: (I + 1,) int64.
        frames: (I, 2) int32 (h, w) that the boxes are drawn in.
        picture_sizes: (I, 2) int32 (h, w) of the file, as far as known.
        offsets: (I + 1,) int64, image i owns rows offsets[i]:offsets[i + 1] of the following.
        boxes: (N, 4) float32 xyxy pixels; labels: (N,) int32 0..C-1; areas: (N,) float32; iscrowd: (N,) bool.
    """

    image_ids: np.ndarray
    names: np.ndarray
    name_offsets: np.ndarray
    frames: np.ndarray
    picture_sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    iscrowd: np.ndarray

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        encoded = self.names[self.name_offsets[index] : self.name_offsets[index + 1]].tobytes()
        return encoded.decode("utf-8", "surrogatepass")


def pack(images: Images, objects: Objects) -> PackedAnnotations:
    """Sort the annotations by image and drop what is not a number."""
    objects = objects.keep(np.argsort(objects.rows, kind="stable"))
    encoded = [name.encode("utf-8", "surrogatepass") for name in images.names]  # names on a disk may be any bytes
    xyxy = objects.xywh.copy()
    xyxy[:, 2:] += xyxy[:, :2]
    return PackedAnnotations(
        image_ids=images.ids,
        names=np.frombuffer(b"".join(encoded), np.uint8),
        name_offsets=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        frames=images.frames,
        picture_sizes=images.pictures,
        offsets=np.searchsorted(objects.rows, np.arange(len(images) + 1)),
        boxes=xyxy.astype(np.float32),
        labels=objects.labels,
        areas=objects.areas.astype(np.float32),
        iscrowd=objects.crowd,
    )
