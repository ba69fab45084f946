"""What is found in an image: boxes, scores, classes and perhaps masks, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brs_detr.exit_codes import MissingPackageError


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections of an image, best first.

    Attributes:
        boxes: (N, 4) float32 xyxy pixels of the image.
        scores: (N,) float64 in [0, 1]: the precision at IoU 0.5 of such detections where they are calibrated.
        labels: (N,) int64, indices into the predictor's `classes`.
        category_ids: (N,) int64, the dataset's own ids of the classes.
        class_names: N names.
        image_size: (width, height) in pixels.
        masks: (N, height, width) bool; None if the detector has none.
        note: where nothing reaches its threshold, what the best score was.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    category_ids: np.ndarray
    class_names: list[str]
    image_size: tuple[int, int]
    masks: np.ndarray | None = None
    note: str = ""

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over plain dictionaries: name, category_id, score, and box [x1, y1, x2, y2]."""
        for box, score, number, name in zip(self.boxes, self.scores, self.category_ids, self.class_names, strict=True):
            yield {"name": name, "category_id": int(number), "score": float(score), "box": box.tolist()}

    def __repr__(self) -> str:
        width, height = self.image_size
        head = f"{len(self)} object{'' if len(self) == 1 else 's'} in {width}x{height} pixels"
        lines = [
            f"  {one['score']:.3f} {one['name']} [{', '.join(f'{value:.1f}' for value in one['box'])}]" for one in self
        ]
        return "\n".join([f"{head}{f'; {self.note}' if self.note else ''}", *lines])

    def take(self, indices: int | slice | Sequence[int] | np.ndarray) -> Detections:
        """Return the detections with these indices, in that order, or where a boolean mask (N,) is True."""
        wanted = indices if isinstance(indices, slice) else np.atleast_1d(indices)
        if isinstance(wanted, np.ndarray) and not wanted.size:
            wanted = np.zeros(0, int)  # an empty list has no type
        chosen = np.arange(len(self))[wanted]
        arrays = {name: getattr(self, name)[chosen] for name in ("boxes", "scores", "labels", "category_ids")}
        masks = None if self.masks is None else self.masks[chosen]
        return replace(self, **arrays, class_names=[self.class_names[index] for index in chosen], masks=masks)

    def as_tensors(self) -> dict[str, Tensor]:
        """Return `boxes`, `scores`, `labels` and, if there are any, `masks` as tensors."""
        names = ("boxes", "scores", "labels", *(["masks"] if self.masks is not None else []))
        return {name: torch.from_numpy(getattr(self, name)) for name in names}

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`, with class names and category ids in its `data`.

        Raises:
            MissingPackageError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise MissingPackageError(
                "to_supervision: needs the package supervision. Install it with: pip install supervision"
            ) from None
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            mask=self.masks,
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(int),
            data={"class_name": np.array(self.class_names, dtype=str), "category_id": self.category_ids},
        )
