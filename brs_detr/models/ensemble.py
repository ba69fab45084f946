"""One set of detections from those of all heads of a detector.

Scores of different heads have different scales: a ranking loss orders detections and says nothing else of a score. So
each score is first replaced by its rank in a validation, per object of it: 1 / (1 + rank / objects) is 1 for the best
detection, and 1/2 for the one before which as many lie as there are objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brs_detr.ops.boxes import join_boxes

LEVELS = 64  # steps in which a comparable score is kept
MIN_LIMIT = 100  # of the detections that remain, where no head returns more


@dataclass(frozen=True)
class Ensemble:
    """What a validation says of the heads.

    Attributes:
        ap: AP by head, the best one first.
        levels: by head, the scores whose comparable scores are 0, 1 / `LEVELS`, ..., 1.
    """

    ap: dict[str, float]
    levels: dict[str, list[float]]

    @classmethod
    def learn(cls, scores: Mapping[str, Tensor], ap: Mapping[str, float], num_objects: int) -> Ensemble:
        """Learn from a validation.

        Args:
            scores: of all detections (n,) by head.
            ap: by head.
            num_objects: of the dataset.
        """
        order = sorted(ap, key=lambda head: -ap[head])
        steps = torch.arange(1, LEVELS + 1, dtype=torch.float64)
        ranks = (num_objects * (LEVELS / steps - 1)).long()
        levels = {}
        for head in order:
            best = scores[head].double().sort(descending=True).values
            reached = ranks < len(best)  # scores below all detections have the rank of the last one at least
            at = torch.where(reached, best[ranks.clamp(max=len(best) - 1)], 0.0) if len(best) else torch.zeros(LEVELS)
            levels[head] = [0.0, *at.tolist()]
        return cls({head: max(0.0, ap[head]) for head in order}, levels)

    @classmethod
    def restore(cls, values: Any, heads: tuple[str, ...]) -> Ensemble:
        """Read what `as_dict` wrote, from a file.

        Raises:
            ValueError: it is not that, or of other heads.
        """
        try:
            ap = {str(head): float(value) for head, value in values["ap"].items()}
            levels = {str(head): [float(value) for value in own] for head, own in values["levels"].items()}
        except (TypeError, KeyError, AttributeError, ValueError):
            raise ValueError("what it says of the heads' scores cannot be read") from None
        rising = all(own == sorted(own) and len(own) == LEVELS + 1 for own in levels.values())
        if not (set(ap) == set(levels) == set(heads) and rising):
            raise ValueError("what it says of the heads' scores is damaged or of another detector")
        return cls(ap, levels)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a weights file."""
        return {"ap": self.ap, "levels": self.levels}

    def comparable(self, head: str, scores: Tensor) -> Tensor:
        """Replace scores (n,) of a head by comparable ones in [0, 1], which rise with them."""
        levels = torch.tensor(self.levels[head], dtype=torch.float64).to(scores.device)
        wide = scores.double()
        above = torch.bucketize(wide, levels, right=True).clamp(1, LEVELS)
        low, high = levels[above - 1], levels[above]
        part = torch.where(wide < high, (wide - low) / (high - low).clamp(min=1e-12), 1.0)  # 1 above all levels
        return ((above - 1 + part) / LEVELS).to(scores.dtype)

    def join(self, found: Mapping[str, dict[str, Tensor]], nms_iou: float) -> dict[str, Tensor]:
        """Join the detections of one image, `boxes` (n, 4), `scores` (n,) descending and `labels` (n,) by head.

        Where detections of a class overlap by more than `nms_iou`, the box of the best head stays. Its score is the
        mean of the comparable scores of all heads there, weighted by AP; a head without a detection there counts as 0.
        As many remain as the head with the most has, and 100 if that is less.
        """
        parts = [found[head] for head in self.ap]
        limit = max(MIN_LIMIT, *(len(part["scores"]) for part in parts))
        boxes, labels = (torch.cat([part[key] for part in parts]) for key in ("boxes", "labels"))
        scores = [self.comparable(head, part["scores"]) for head, part in zip(self.ap, parts, strict=True)]
        weights = boxes.new_tensor(list(self.ap.values())).clamp(min=1e-6)
        return join_boxes(boxes, labels, scores, weights, nms_iou=nms_iou, max_detections=limit)
