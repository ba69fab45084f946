"""A COCO-format dataset held as a few numpy arrays, whatever its size.

Classes, ids and their number come from the json alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from brs_detr.data import annotations as reading
from brs_detr.data.annotations import pack, read_categories
from brs_detr.data.image_io import ImageError, Limits, read_image
from brs_detr.data.image_search import guess_folder, resolve_image_paths
from brs_detr.data.image_sizes import check_box_format, clip_and_filter_boxes, resolve_image_sizes, same_aspect
from brs_detr.data.issues import DROPPED, KEPT, POLICY, REPAIRED, WARNED, DataError, IssueLog
from brs_detr.data.json_file import load_json
from brs_detr.data.shared_memory import shared_zeros
from brs_detr.user_files import printable

Target = dict[str, Any]
Transform = Callable[[Tensor, Target, torch.Generator], tuple[Tensor, Target]]

_UNREADABLE, _MISMATCH = 1, 2
_MOST_WORKERS = 1024
_console = logging.getLogger(__name__)  # what workers meet; without further settings it prints to stderr


class CocoDetection(Dataset):
    """Images and boxes of a COCO json.

    Args:
        json_path: annotation file.
        image_dir: folder that the json's file names are relative to.
        transforms: `(image, target, generator) -> (image, target)`, see `transforms.py`; None changes nothing.
        train: clip boxes, leave out what cannot be learned from, and replace damaged images by others. Otherwise
            the json's boxes stay as they are, images whose header is unreadable are left out, and one that proves
            damaged when it is read comes black and marked, for the evaluation to leave out.
        keep_empty: keep images without objects in training, as background.
        min_side: smallest side in pixels of a training image.
        seed: of the augmentation.
        inspect: read the header of every image at the start; by default in evaluation only.
        limits: of the sizes of files, and whether file names may lead out of the image folder; by default those of the
            settings.
        log: where faults are counted; give one to see them all.
        retry_seconds: for how long to try a file again where the storage fails; None: not at all, and what the storage
            does not give counts as damaged.

    Attributes:
        classes, category_ids: names and ids of the json's categories, ascending by id; label k is the k-th.
        packed: the arrays.

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
        retry_seconds: float | None = None,
    ) -> None:
        self.json_path, self.image_dir = str(json_path), str(image_dir)
        self.transforms, self.train, self.seed = transforms, train, seed
        self.limits, self.retry_seconds = limits or Limits(), retry_seconds
        self._log = IssueLog() if log is None else log
        images, objects, self._listed = self._read(inspect=not train if inspect is None else inspect)
        if train:
            images, objects = self._leave_out(images, objects, keep_empty, min_side)
        self.packed = pack(images, objects)
        self._exact = None if train else objects
        # shared with the workers, which find out what no header tells
        self._found = shared_zeros(max(1, len(images)), torch.uint8)
        # by worker (0: none) the image whose file it is reading, counted from 1
        self._reading = shared_zeros(_MOST_WORKERS + 1, torch.int64)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_ids(self) -> list[int]:
        """Ids of the images in the order of the dataset."""
        return self.packed.image_ids.tolist()

    @property
    def report(self) -> dict[str, int]:
        """How many images and objects are used, and how many faults of each kind were met so far."""
        packed, found = self.packed, self._found[: len(self)].numpy()
        counts = Counter(self._log.counts)
        counts["image_unreadable"] += int((found == _UNREADABLE).sum())
        counts["size_mismatch"] += int((found == _MISMATCH).sum())
        readable = np.repeat(found != _UNREADABLE, np.diff(packed.offsets))
        totals = {
            "images": int((found != _UNREADABLE).sum()),
            "images_listed": self._listed[0],
            "objects": int((readable & ~packed.iscrowd).sum()),
            "annotations_listed": self._listed[1],
        }
        return totals | {kind: counts[kind] for kind in POLICY if counts[kind]}

    def summary(self) -> str:
        """The report as lines for people."""
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
        """Lines on what no header told and the loader's workers found out."""
        found = self._found[: len(self)].numpy()
        lines = []
        for state, kind in ((_UNREADABLE, "image_unreadable"), (_MISMATCH, "size_mismatch")):
            rows = np.flatnonzero(found == state)
            if len(rows):
                first = f"image {self.packed.image_ids[rows[0]]} ({printable(self.file_name(int(rows[0])))})"
                lines.append(f"{len(rows):,} x {kind.replace('_', ' ')}, first: {first}; {POLICY[kind][1]}")
        return lines

    def fingerprint(self) -> str:
        """A digest of classes, file names, sizes and boxes as they are used; not of the images' content."""
        content = hashlib.sha256(repr((self.classes, self.category_ids)).encode())
        for array in vars(self.packed).values():
            content.update(np.ascontiguousarray(array))
        return content.hexdigest()

    def __len__(self) -> int:
        return len(self.packed)

    def file_name(self, index: int) -> str:
        """The json's file name of an image."""
        return self.packed.file_name(index)

    def path(self, index: int) -> str:
        """Where the image lies."""
        return os.path.join(self.image_dir, self.file_name(index))

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Target]:
        """One augmented image and its objects.

        Args:
            index: image number, or (image number, epoch): the augmentation depends on (seed, epoch, image) alone.

        Returns:
            (3, h, w) uint8 RGB and {"boxes": (n, 4) float32 xyxy pixels, "labels": (n,) int64, "image_id": int,
            "original_size": (h, w) of the frame that detections are reported in}; in evaluation also
            "unreadable": True where a black image stands for a damaged one.

        Raises:
            ImageError: in training, where neither the image nor the next ones can be decoded.
            StorageError: the file, which was there, cannot be read; no other image takes its place.
        """
        index, epoch = index if isinstance(index, tuple) else (index, 0)
        index = int(index)
        image, target, index = self._load_or_replace(index) if self.train else (*self._load_or_mark(index), index)
        if self.transforms is not None:
            image, target = self.transforms(image, target, self._generator(epoch, index))
        return image, target

    def being_read(self) -> list[str]:
        """The files that are being read at this moment, here and in the loader's workers."""
        return [self.path(number - 1) for number in self._reading[self._reading > 0].tolist()]

    def load(self, index: int) -> tuple[Tensor, Target]:
        """The image as stored and its objects, before augmentation; crowds are left out.

        Raises:
            ImageError: the file cannot be decoded.
            StorageError: the file cannot be read.
        """
        packed = self.packed
        frame = (int(packed.frames[index, 0]), int(packed.frames[index, 1]))
        worker = get_worker_info()
        place = 0 if worker is None else 1 + worker.id % _MOST_WORKERS
        self._reading[place] = index + 1
        try:
            image = read_image(self.path(index), frame, self.limits, self.retry_seconds)
        except ImageError:
            self._found[index] = _UNREADABLE
            raise
        finally:
            self._reading[place] = 0
        rows = slice(packed.offsets[index], packed.offsets[index + 1])
        use = ~packed.iscrowd[rows]
        boxes, labels = packed.boxes[rows][use], packed.labels[rows][use].astype(np.int64)
        size = (image.shape[1], image.shape[2])
        if size != frame:
            self._found[index] = _MISMATCH
            boxes, labels, frame = _into_image(boxes, labels, frame, size)
        target = {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(labels),
            "image_id": int(packed.image_ids[index]),
            "original_size": frame,
        }
        return image, target

    def ground_truth(self) -> dict[str, Any]:
        """The usable annotations as a COCO dictionary for pycocotools, with the json's ids; crowds are kept.

        Annotation ids are numbered anew from 1: pycocotools takes a match with id 0 for no match.

        Raises:
            ValueError: the dataset was opened for training, so its boxes are no longer those of the json.
        """
        if self._exact is None:
            raise ValueError("ground truth comes from a dataset opened with train=False")
        packed, exact = self.packed, self._exact
        images = [
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
        categories = [{"id": key, "name": name} for key, name in zip(self.category_ids, self.classes, strict=True)]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def _read(self, inspect: bool) -> tuple[reading.Images, reading.Objects, tuple[int, int]]:
        log, data = self._log, load_json(self.json_path, self.limits.max_json_bytes)
        self.category_ids, self.classes = read_categories(data, self.json_path, log)
        images = reading.read_images(data, self.json_path, log)
        objects = reading.read_objects(data, images, self.category_ids, log)
        listed = (len(data["images"]), len(data["annotations"]))
        del data
        found = resolve_image_paths(images, self.image_dir, log, self.limits.allow_outside_images)
        if not found.any():
            raise DataError(f"{self.json_path}: {_where_else(images.names, self.image_dir, log)}")
        images, objects = _select(images, objects, found)
        readable = resolve_image_sizes(images, objects, self.image_dir, log, inspect, self.limits, self.retry_seconds)
        images, objects = _select(images, objects, readable)
        check_box_format(images, objects, log)
        objects = clip_and_filter_boxes(images, objects, log, self.train)
        for label in set(range(len(self.classes))) - set(objects.labels.tolist()):
            log.add("category_unused", f"category {self.category_ids[label]}", self.classes[label])
        return images, objects, listed

    def _leave_out(self, images: reading.Images, objects: reading.Objects, keep_empty: bool, min_side: int) -> tuple:
        big = images.frames.min(1) >= min_side
        for row in np.flatnonzero(~big):
            self._log.add("image_too_small", images.where(row), f"{images.frames[row, 1]}x{images.frames[row, 0]}")
        occupied = np.bincount(objects.rows[~objects.crowd], minlength=len(images)) > 0
        for row in np.flatnonzero(~occupied & big):
            self._log.add("image_without_objects", images.where(row))
        images, objects = _select(images, objects, big & (occupied | keep_empty))
        if objects.crowd.all():
            reasons = "; ".join(self._log.lines((WARNED, DROPPED))) or "there is none"
            raise DataError(
                f"{self.json_path}: 0 of its {self._listed[1]:,} annotations can be used for training: {reasons}."
            )
        return images, objects

    def _load_or_replace(self, index: int) -> tuple[Tensor, Target, int]:
        """The image, or the next one that can be read: a fixed rule, so that a resumed run replaces alike."""
        for step in range(min(len(self), 100)):
            candidate = (index + step) % len(self)
            if self._found[candidate] == _UNREADABLE:
                continue
            try:
                return *self.load(candidate), candidate
            except ImageError as error:
                _console.warning("%s Using the next readable image instead.", error)
        raise ImageError(f"{self.path(index)}: neither this image nor the next ones can be read.")

    def _load_or_mark(self, index: int) -> tuple[Tensor, Target]:
        """The image, or a black one of its size whose target says that it stands for an unreadable one."""
        known = self._found[index] == _UNREADABLE
        try:
            return self.load(index)
        except ImageError as error:
            if not known:
                _console.warning("%s It is left out of the evaluation.", error)
        height, width = self.packed.image_sizes[index].tolist()
        target = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "image_id": int(self.packed.image_ids[index]),
            "original_size": tuple(self.packed.frames[index].tolist()),
            "unreadable": True,
        }
        return torch.zeros(3, height, width, dtype=torch.uint8), target

    def _generator(self, epoch: int, index: int) -> torch.Generator:
        words = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


def _where_else(names: list[str], image_dir: str, log: IssueLog) -> str:
    """Says that no image is in its folder, and which folder beside that one holds them."""
    outside = log.counts["image_outside"]
    if outside:
        first = next(fault.where for fault in log.faults if fault.kind == "image_outside")
        return (
            f"the file names of {outside:,} of its {len(names):,} images lead out of {image_dir}, and no other image "
            f"was found, first: {first}; data.allow_outside_images=true follows them."
        )
    first = os.path.join(image_dir, names[0])
    link = ", a link that leads nowhere" if os.path.islink(first) else ""
    missing = f"none of its {len(names):,} images is in {image_dir} (looked for {printable(first)[:200]}{link})"
    beside = Path(os.path.abspath(image_dir)).parent
    while not beside.is_dir():
        beside = beside.parent
    folder, count = (beside != beside.parent and guess_folder(names, beside)) or (None, 0)
    if folder is None or folder == Path(os.path.abspath(image_dir)):
        return f"{missing}; is this the right image folder?"
    return f"{missing}; {count:,} images of these names are in {folder}."


def _select(images: reading.Images, objects: reading.Objects, keep: np.ndarray) -> tuple:
    """The images of a mask, their annotations, and rows numbered anew."""
    objects = objects.keep(keep[objects.rows])
    objects.rows = (np.cumsum(keep) - 1)[objects.rows]
    return images.keep(keep), objects


def _into_image(boxes: np.ndarray, labels: np.ndarray, frame: tuple[int, int], size: tuple[int, int]) -> tuple:
    """Boxes of a json whose size is not the image's: scaled if the aspect ratio agrees, else clipped."""
    if same_aspect(frame, size):
        scale = np.array([size[1] / frame[1], size[0] / frame[0]] * 2, np.float32)
        return boxes * scale, labels, frame
    boxes = np.clip(boxes, 0, np.array([size[1], size[0]] * 2, np.float32))
    keep = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    return boxes[keep], labels[keep], size
