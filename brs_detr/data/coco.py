"""A COCO-format detection dataset, held as a few numpy arrays whatever its size.

The classes, their ids and their number come from the json alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from brs_detr.data import annotations as reading
from brs_detr.data.annotations import read_categories
from brs_detr.data.config import Limits
from brs_detr.data.federated import read_federated
from brs_detr.data.image_io import ImageError, read_image, same_aspect
from brs_detr.data.image_search import guess_folder, resolve_image_paths
from brs_detr.data.image_sizes import check_box_format, clip_and_filter_boxes, resolve_image_sizes
from brs_detr.data.issues import DROPPED, KEPT, POLICY, REPAIRED, WARNED, DataError, IssueLog
from brs_detr.data.json_file import load_json
from brs_detr.data.packed import check_masks, draw_masks_in, encode_masks, pack
from brs_detr.data.shared_memory import shared_zeros
from brs_detr.ops.rle import RLE
from brs_detr.user_files import printable

Target = dict[str, Any]
# returns an image, or for evaluation a list of several sizes of it
Transform = Callable[[Tensor, Target, torch.Generator], tuple[Any, Target]]

_UNREADABLE, _MISMATCH = 1, 2  # states of an image that only decoding can tell; 0: nothing unusual so far
_MAX_WORKERS = 1024  # slots for the files being read; more workers than that share slots
_console = logging.getLogger(__name__)  # used in loader workers, where an unconfigured logger prints to stderr


class CocoDetection(Dataset):
    """Images and boxes of a COCO json.

    Args:
        json_path: annotation file.
        image_dir: folder that the json's file names are relative to.
        transforms: `(image, target, generator) -> (image, target)`, see `transforms.py`; None for no augmentation.
        train: clip boxes, drop what cannot be trained on, and replace damaged images by others. If False the json's
            boxes are unchanged, images with an unreadable header are dropped, and an image that cannot be decoded is
            returned black and marked, so that the evaluation can exclude it.
        keep_empty: keep images without objects in training, as background.
        min_side: smallest side in pixels of a training image.
        seed: seed of the augmentation.
        inspect: read the header of every image when opening the dataset; by default for evaluation only.
        limits: maximum sizes of files, and whether file names may lead out of the image folder; by default those of
            `Limits`.
        log: counter of the issues; pass one to see all of them.
        masks: also read the objects' masks. In training they follow the boxes through the augmentation, in evaluation
            they are in `ground_truth`. Without them nothing of a segmentation is kept. "optional": if there are any;
            the attribute then says so.
        draw_all: also draw every mask when opening the dataset, to log those that are empty or do not fit their boxes.
        retry_seconds: how long to retry a file when the storage fails; None does not retry, and a file that the storage
            does not return counts as damaged.
        read: returns the content of the json, where it has been read already, with masks packed if they are wanted.

    Attributes:
        classes, category_ids: names and ids of the json's categories, ascending by id; label k is the k-th.
        packed: images and annotations as arrays.

    Raises:
        DataError: there is nothing to train on; the message says why.
    """

    def __init__(
        self,
        json_path: str | Path,
        image_dir: str | Path,
        *,
        transforms: Transform | None = None,
        train: bool,
        keep_empty: bool = True,
        min_side: int = 32,
        seed: int = 0,
        inspect: bool | None = None,
        limits: Limits | None = None,
        log: IssueLog | None = None,
        masks: bool | Literal["optional"] = False,
        draw_all: bool = False,
        retry_seconds: float | None = None,
        read: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.json_path, self.image_dir = str(json_path), str(image_dir)
        self.masks: bool = masks is not False
        self._masks_optional = masks == "optional"
        self.transforms, self.train, self.seed = transforms, train, seed
        self.limits, self.retry_seconds = limits or Limits(), retry_seconds
        self._log = IssueLog() if log is None else log
        images, objects, self._listed = self._read(not train if inspect is None else inspect, draw_all, read)
        if train:
            images, objects = self._filter_for_training(images, objects, keep_empty, min_side)
        self.packed = pack(images, objects)
        # the boxes as float64 and unclipped, for COCO's evaluation; the packed ones are float32
        self._exact = None if train else replace(objects, masks=None)
        # in shared memory: the loader workers discover what no header tells, and this process reports it
        self._states = shared_zeros(max(1, len(images)), torch.uint8)
        # per worker the image whose file it is reading, counted from 1, 0 if it reads none; slot 0: this process
        self._reading = shared_zeros(_MAX_WORKERS + 1, torch.int64)
        getattr(transforms, "connect", lambda dataset: None)(self)  # where they draw other images of the dataset

    @property
    def num_classes(self) -> int:
        """Return the number of categories in the json, used or not."""
        return len(self.classes)

    @property
    def image_ids(self) -> list[int]:
        """Return the image ids in the order of the dataset."""
        return self.packed.image_ids.tolist()

    @property
    def report(self) -> dict[str, int]:
        """Count the images and objects in use, and the issues of each kind discovered so far."""
        packed, states = self.packed, self._states[: len(self)].numpy()
        counts = Counter(self._log.counts)
        counts["image_unreadable"] += int((states == _UNREADABLE).sum())
        counts["size_mismatch"] += int((states == _MISMATCH).sum())
        readable = np.repeat(states != _UNREADABLE, np.diff(packed.offsets))
        totals = {
            "images": int((states != _UNREADABLE).sum()),
            "images_listed": self._listed[0],
            "objects": int((readable & ~packed.iscrowd).sum()),
            "annotations_listed": self._listed[1],
        }
        return totals | {kind: counts[kind] for kind in POLICY if counts[kind]}

    def summary(self) -> str:
        """Format the report as text."""
        report, warnings = self.report, self._log.lines((WARNED,))
        head = (
            f"{printable(self.json_path)}: {report['images']:,} of {report['images_listed']:,} images, "
            f"{report['objects']:,} of "
            f"{report['annotations_listed']:,} annotations used, {self.num_classes} classes"
        )
        if 2 * report["objects"] < report["annotations_listed"]:
            warnings.insert(0, "fewer than half of the annotations are used")
        lines = [f"  warning: {line}" for line in warnings]
        return "\n".join([head, *lines, *(f"  {line}" for line in self._log.lines((DROPPED, REPAIRED, KEPT)))])

    def met_while_reading(self) -> list[str]:
        """Format one line per issue that the loader workers discovered while decoding."""
        states = self._states[: len(self)].numpy()
        lines = []
        for state, kind in ((_UNREADABLE, "image_unreadable"), (_MISMATCH, "size_mismatch")):
            rows = np.flatnonzero(states == state)
            if len(rows):
                first = f"image {self.packed.image_ids[rows[0]]} ({printable(self.file_name(int(rows[0])))})"
                lines.append(f"{len(rows):,} x {kind.replace('_', ' ')}, first: {first}; {POLICY[kind][1]}")
        return lines

    def fingerprint(self) -> str:
        """Hash the classes, file names, sizes and boxes in use; the content of the images is not hashed."""
        content = hashlib.sha256(repr((self.classes, self.category_ids)).encode())
        for array in vars(self.packed).values():
            if array is not None:
                content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()

    def __len__(self) -> int:
        return len(self.packed)

    def file_name(self, index: int) -> str:
        """Return the json's file name of an image."""
        return self.packed.file_name(index)

    def path(self, index: int) -> str:
        """Return the path of an image."""
        return os.path.join(self.image_dir, self.file_name(index))

    def __getitem__(self, index: int | tuple[int, ...]) -> tuple[Tensor, Target]:
        """Load an image and its objects, and augment them.

        Args:
            index: image index, or (image index, epoch), or (image index, epoch, times shown before in this epoch): the
                augmentation depends on the seed and these alone.

        Returns:
            (3, h, w) uint8 RGB, or what the transforms make of it, and {"boxes": (n, 4) float32 xyxy pixels, "labels":
            (n,) int64, "image_id": int, "original_size": (h, w) of the frame that detections are reported in}; in
            training with `masks` also "masks" (n, h, w) uint8, 1 inside the object; for evaluation also "unreadable":
            True if the image is damaged and a black one is returned instead.

        Raises:
            ImageError: in training, if neither the image nor the next ones can be decoded.
            ReadError: the file exists but cannot be read; it is not replaced by another image.
        """
        index, epoch, *times = index if isinstance(index, tuple) else (index, 0)
        index = int(index)
        image, target, index = self._load_or_replace(index) if self.train else (*self._load_or_mark(index), index)
        if self.transforms is not None:
            image, target = self.transforms(image, target, self._generator(epoch, index, *times))
        return image, target

    def being_read(self) -> list[str]:
        """Return the files that are being read at this moment, in this process and in the loader workers."""
        return [self.path(number - 1) for number in self._reading[self._reading > 0].tolist()]

    def random_image(self, generator: torch.Generator) -> tuple[Tensor, Target]:
        """Load an image that the generator chooses, without augmentation, and those of its objects that have masks."""
        index = int(torch.randint(len(self), (), generator=generator))
        image, target, _ = self._load_or_replace(index, only_masked=True)
        return image, target

    def load(self, index: int, masks: bool = True, only_masked: bool = False) -> tuple[Tensor, Target]:
        """Load an image and its objects without augmentation; crowds are excluded.

        Args:
            index: image index.
            masks: False leaves out the masks of a dataset with masks.
            only_masked: of a dataset with masks, leave out the objects of which the json has none.

        Raises:
            ImageError: the file cannot be decoded.
            ReadError: the file cannot be read.
        """
        packed = self.packed
        frame = (int(packed.frames[index, 0]), int(packed.frames[index, 1]))
        worker = get_worker_info()
        slot = 0 if worker is None else 1 + worker.id % _MAX_WORKERS
        self._reading[slot] = index + 1
        try:
            image = read_image(self.path(index), frame, self.limits, self.retry_seconds)
        except ImageError:
            self._states[index] = _UNREADABLE
            raise
        finally:
            self._reading[slot] = 0
        rows = np.arange(packed.offsets[index], packed.offsets[index + 1])
        rows = rows[~packed.iscrowd[rows]]
        if only_masked:
            assert packed.mask_offsets is not None  # opened with masks
            rows = rows[packed.mask_offsets[rows + 1] > packed.mask_offsets[rows]]
        boxes, size, drawn_in = packed.boxes[rows], (image.shape[1], image.shape[2]), frame
        if size != frame:
            self._states[index] = _MISMATCH
            boxes, keep, frame = _into_image(boxes, frame, size)
            boxes, rows = boxes[keep], rows[keep]
        target = {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(packed.labels[rows].astype(np.int64)),
            "image_id": int(packed.image_ids[index]),
            "original_size": frame,
        }
        if self.masks and masks:
            drawn = draw_masks_in(packed, rows, drawn_in, size, is_scaled=frame == drawn_in)
            target["masks"] = torch.from_numpy(drawn)
        return image, target

    def ground_truth(self) -> dict[str, Any]:
        """Return the usable annotations as a COCO dictionary for pycocotools, crowds included.

        Images and categories have the json's ids, and LVIS's lists and frequencies. Annotations are numbered from 1:
        pycocotools treats a match with the annotation id 0 as unmatched. With `masks` they have a `segmentation`, as
        compressed run lengths.

        Raises:
            ValueError: the dataset was opened for training, so its boxes are clipped.
        """
        if self._exact is None:
            raise ValueError("ground_truth: the dataset was opened for training. Open it with train=False.")
        packed, exact = self.packed, self._exact
        images: list[dict[str, Any]] = [
            {"id": int(key), "file_name": packed.file_name(i), "height": int(h), "width": int(w)}
            for i, (key, (h, w)) in enumerate(zip(packed.image_ids, packed.frames, strict=True))
        ]
        annotations = [
            {
                "id": i + 1,
                "image_id": int(packed.image_ids[exact.rows[i]]),
                "category_id": self.category_ids[exact.labels[i]],
                "bbox": exact.xywh[i].tolist(),
                "area": float(exact.areas[i]),
                "iscrowd": int(exact.crowd[i]),
            }
            for i in range(len(exact))
        ]
        if self.masks:
            for annotation, rle in zip(annotations, self._encoded_masks(), strict=True):
                annotation["segmentation"] = rle
        categories: list[dict[str, Any]]
        categories = [{"id": key, "name": name} for key, name in zip(self.category_ids, self.classes, strict=True)]
        lists, frequency = self._federated
        images = [image | lists.get(image["id"], {}) for image in images]
        categories = [c | ({"frequency": frequency[c["id"]]} if c["id"] in frequency else {}) for c in categories]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def _encoded_masks(self) -> list[RLE]:
        """Return the masks in the order of `_exact`, that of the json; the packed ones are sorted by image."""
        assert self._exact is not None
        packed, encoded = self.packed, []
        for index in range(len(self)):
            frame = (int(packed.frames[index, 0]), int(packed.frames[index, 1]))
            encoded += encode_masks(packed, np.arange(packed.offsets[index], packed.offsets[index + 1]), frame)
        positions = np.argsort(np.argsort(self._exact.rows, kind="stable"))
        return [encoded[position] for position in positions]

    def _read(
        self, inspect: bool, draw_all: bool, read: Callable[[], dict[str, Any]] | None
    ) -> tuple[reading.Images, reading.Objects, tuple[int, int]]:
        log, most = self._log, self.limits.max_json_bytes
        if read is None:
            data = load_json(self.json_path, most, masks="pack" if self.masks else "drop", annotated=self.train)
        else:
            data = read()
        self.category_ids, self.classes = read_categories(data, self.json_path, log)
        images = reading.read_images(data, self.json_path, log)
        # in training every class that is not annotated is background, as in the published trainings
        self._federated = read_federated(data) if not self.train else ({}, {})
        objects = reading.read_objects(data, images, self.category_ids, log, self.masks)
        listed = (len(data["images"]), len(data["annotations"]))
        del data  # gigabytes for a large json, before the images are searched
        exists = resolve_image_paths(images, self.image_dir, log, self.limits.allow_outside_images)
        if not exists.any():
            raise DataError(f"{self.json_path}: {_describe_missing_images(images.names, self.image_dir, log)}")
        images, objects = _select(images, objects, exists)
        readable = resolve_image_sizes(images, objects, self.image_dir, log, inspect, self.limits, self.retry_seconds)
        images, objects = _select(images, objects, readable)
        # on the boxes as written: clipping would hide those that stick out of their images
        check_box_format(images, objects, log)
        objects = clip_and_filter_boxes(images, objects, log, self.train)
        if self._masks_optional and not (objects.masks is not None and objects.masks.any()):
            self.masks, objects = False, replace(objects, masks=None)
        if self.masks:
            objects = check_masks(images, objects, log, draw_all)
        for label in set(range(len(self.classes))) - set(objects.labels.tolist()):
            log.add("category_unused", f"category {self.category_ids[label]}", self.classes[label])
        return images, objects, listed

    def _filter_for_training(
        self, images: reading.Images, objects: reading.Objects, keep_empty: bool, min_side: int
    ) -> tuple[reading.Images, reading.Objects]:
        """Drop images that are too small and, unless `keep_empty`, those without objects."""
        big = images.frames.min(1) >= min_side
        for row in np.flatnonzero(~big):
            self._log.add("image_too_small", images.where(row), f"{images.frames[row, 1]}x{images.frames[row, 0]}")
        occupied = np.bincount(objects.rows[~objects.crowd], minlength=len(images)) > 0
        for row in np.flatnonzero(~occupied & big):
            self._log.add("image_without_objects", images.where(row))
        images, objects = _select(images, objects, big & (occupied | keep_empty))
        if objects.crowd.all():
            reasons = "; ".join(self._log.lines((WARNED, DROPPED))) or "the list is empty"
            raise DataError(
                f"{self.json_path}: 0 of its {self._listed[1]:,} annotations can be used for training: {reasons}."
            )
        return images, objects

    def _load_or_replace(self, index: int, only_masked: bool = False) -> tuple[Tensor, Target, int]:
        """Load the image, or the next readable one: a fixed rule, so that a resumed run uses the same replacement."""
        # 100 in a row: then it is not one damaged image, and searching a large dataset would take hours
        for step in range(min(len(self), 100)):
            candidate = (index + step) % len(self)
            if self._states[candidate] == _UNREADABLE:
                continue
            try:
                return *self.load(candidate, only_masked=only_masked), candidate
            except ImageError as error:
                _console.warning("%s Using the next readable image instead.", error)
        raise ImageError(f"{self.path(index)}: neither this image nor the next ones can be read.")

    def _load_or_mark(self, index: int) -> tuple[Tensor, Target]:
        """Load the image, or a black one of its size if it is unreadable; its target then has "unreadable": True."""
        known = self._states[index] == _UNREADABLE
        try:
            # the evaluation reads masks from `ground_truth`; bitmaps of all objects would fill the shared memory
            return self.load(index, masks=False)
        except ImageError as error:
            if not known:  # warn once per image, not in every validation
                _console.warning("%s It is excluded from the evaluation.", error)
        height, width = self.packed.image_sizes[index].tolist()
        target: Target = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "image_id": int(self.packed.image_ids[index]),
            "original_size": tuple(self.packed.frames[index].tolist()),
            "unreadable": True,
        }
        return torch.zeros(3, height, width, dtype=torch.uint8), target

    def _generator(self, epoch: int, index: int, *times: int) -> torch.Generator:
        # SeedSequence mixes the numbers: their sum would give neighboring images and epochs the same seed
        words = np.random.SeedSequence([self.seed, epoch, index, *times]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


def _describe_missing_images(names: list[str], image_dir: str, log: IssueLog) -> str:
    """Describe why no image exists in the image folder, and name a nearby folder that has them."""
    outside = log.counts["image_outside"]
    if outside:
        first = next(issue.where for issue in log.issues if issue.kind == "image_outside")
        return (
            f"the file names of {outside:,} of its {len(names):,} images lead out of {image_dir}, and no other image "
            f"was found (first: {first}). Set data.allow_outside_images=true to follow them."
        )
    first = os.path.join(image_dir, names[0])
    link = ", a broken link" if os.path.islink(first) else ""
    missing = f"none of its {len(names):,} images is in {image_dir} (looked for {printable(first)[:200]}{link})"
    beside = Path(os.path.abspath(image_dir)).parent
    while not beside.is_dir():
        beside = beside.parent
    # never the root of the file system: walking it takes minutes and finds other people's images
    guess = guess_folder(names, beside) if beside != beside.parent else None
    if guess is None or guess[0] == Path(os.path.abspath(image_dir)):
        return f"{missing}. Check the image folder."
    folder, count = guess
    return f"{missing}; {count:,} images of these names are in {folder}."


def _select(
    images: reading.Images, objects: reading.Objects, keep: np.ndarray
) -> tuple[reading.Images, reading.Objects]:
    """Select the images of a boolean mask (I,) and their annotations; `objects.rows` is renumbered."""
    objects = objects.keep(keep[objects.rows])
    objects.rows = (np.cumsum(keep) - 1)[objects.rows]
    return images.keep(keep), objects


def _into_image(
    boxes: np.ndarray, frame: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Convert boxes of a json with another size than the image: scale if the aspect ratio agrees, else clip.

    Args:
        boxes: (n, 4) xyxy pixels of the frame.
        frame, size: (h, w) of the json and of the image.

    Returns:
        boxes, which of them are usable (n,) bool, and the (h, w) that detections are reported in.
    """
    if same_aspect(frame, size):
        scale = np.array([size[1] / frame[1], size[0] / frame[0]] * 2, np.float32)
        return boxes * scale, np.ones(len(boxes), bool), frame
    boxes = np.clip(boxes, 0, np.array([size[1], size[0]] * 2, np.float32))
    return boxes, (boxes[:, 2:] - boxes[:, :2] >= 1).all(1), size
