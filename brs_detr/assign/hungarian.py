"""One-to-one matching of predictions and objects (DETR, Carion et al. 2020, Eq. 1) for all prediction sets of a step.

The costs of every decoder layer, of the encoder proposals and of every image are computed on the device and copied to
the host at once, where SciPy solves them; the indices are copied back at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from brs_detr.ops.targets import PackedTargets


class Match(NamedTuple):
    """Matched pairs of one prediction set.

    Attributes:
        rows: (P,) int64 into the flattened (B * Q) predictions, ascending.
        objects: (P,) int64 into the packed targets.
    """

    rows: Tensor
    objects: Tensor


class HungarianMatcher:
    """Hungarian matching with the cost cls * focal + l1 * L1 + giou * (-GIoU), per image.

    Args:
        cls: weight of the focal classification cost; 2 in Co-DETR, 4 in BRS-DETR (S.3.3 of the BRS paper).
        l1: weight of the L1 distance of normalized cxcywh boxes.
        giou: weight of the negative generalized IoU.
        alpha, gamma: of the focal cost.
    """

    def __init__(
        self, cls: float = 4.0, l1: float = 5.0, giou: float = 2.0, *, alpha: float = 0.25, gamma: float = 2.0
    ) -> None:
        self.cls, self.l1, self.giou, self.alpha, self.gamma = cls, l1, giou, alpha, gamma

    @torch.no_grad()
    def cost(self, logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        """Compute the cost of every pair in one image.

        Args:
            logits: (Q, K). boxes: (Q, 4) cxcywh in [0, 1].
            labels: (G,). targets: (G, 4) cxcywh in [0, 1].
            scale: (4,) image's (w, h, w, h) in pixels, for the GIoU.

        Returns:
            (Q, G) float32.
        """
        logits, boxes = logits.float(), boxes.float()
        chance = logits[:, labels].sigmoid()
        # The focal loss with the object minus that without it: what the match changes. 1e-12 is the official epsilon.
        present = self.alpha * (1 - chance) ** self.gamma * -(chance + 1e-12).log()
        absent = (1 - self.alpha) * chance**self.gamma * -(1 - chance + 1e-12).log()
        distance = (boxes[:, None] - targets[None]).abs().sum(-1)
        corners = [box_convert(b * scale, "cxcywh", "xyxy") for b in (boxes, targets)]
        overlap: Tensor = generalized_box_iou(*corners)
        return self.cls * (present - absent) + self.l1 * distance - self.giou * overlap

    @torch.no_grad()
    def __call__(self, sets: Sequence[tuple[Tensor, Tensor, Tensor]], targets: PackedTargets) -> list[Match]:
        """Match every prediction set.

        Args:
            sets: (logits (B, Q, K), boxes (B, Q, 4) cxcywh, labels (G,) of the packed objects in this set's classes).
            targets: objects of the batch.

        Returns:
            One match per set. A NaN prediction is matched as if it were very expensive: the loss then names the NaN,
            where SciPy would only reject the matrix.
        """
        costs, sizes = [], []
        with torch.autocast(targets.boxes.device.type, enabled=False):
            for logits, boxes, labels in sets:
                for image, (start, stop) in enumerate(targets.spans):
                    if stop > start:
                        one = slice(start, stop)
                        scale = targets.scales[start]
                        costs.append(self.cost(logits[image], boxes[image], labels[one], targets.boxes[one], scale))
                    sizes.append((logits.shape[1], stop - start))
        host = torch.cat([c.flatten() for c in costs]).cpu().numpy() if costs else np.zeros(0, np.float32)
        # 1e8 and not infinity, with which SciPy may find no assignment at all.
        rows, objects, lengths = _solve(np.nan_to_num(host, nan=1e8, posinf=1e8, neginf=-1e8), sizes, targets.spans)
        both = torch.from_numpy(np.stack([rows, objects])).to(targets.boxes.device, non_blocking=True)
        return [Match(*pair) for pair in zip(both[0].split(lengths), both[1].split(lengths), strict=True)]


def _solve(
    costs: np.ndarray, sizes: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Solve the flattened cost blocks; `sizes` run over sets, then images. Returns rows, objects, pairs per set."""
    rows, objects, lengths, offset = [], [], [], 0
    for number, (queries, count) in enumerate(sizes):
        image = number % len(spans)
        if image == 0:
            lengths.append(0)
        if count:
            block = costs[offset : offset + queries * count].reshape(queries, count)
            chosen, matched = linear_sum_assignment(block)
            rows.append(chosen + image * queries)
            objects.append(matched + spans[image][0])
            lengths[-1] += len(chosen)
        offset += queries * count
    empty = np.zeros(0, np.int64)
    return np.concatenate([empty, *rows]), np.concatenate([empty, *objects]), lengths
