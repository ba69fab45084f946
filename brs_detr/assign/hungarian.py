"""One-to-one matching of predictions and objects (DETR, Carion et al. 2020, Eq. 1) for all prediction sets of a step.

The costs of every decoder layer, of the encoder proposals and of every image are computed on the device in a few
operations and copied to the host at once. SciPy solves them there, as late as the caller can wait, so that the device
computes something else meanwhile; the indices are copied back at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from brs_detr.ops.boxes import generalized_iou
from brs_detr.ops.targets import PackedTargets


class PredictedSet(NamedTuple):
    """What is matched with the objects of a batch, of one layer or of L layers at once.

    Attributes:
        logits: (B, Q, K) or (L, B, Q, K).
        boxes: (B, Q, 4) or (L, B, Q, 4) cxcywh in [0, 1].
        labels: (G,) int64 columns of the logits that are the packed objects' classes.
    """

    logits: Tensor
    boxes: Tensor
    labels: Tensor

    def detach(self) -> PredictedSet:
        """Return the set without its graph."""
        return PredictedSet(self.logits.detach(), self.boxes.detach(), self.labels)


class Match(NamedTuple):
    """Matched pairs of one prediction set, or those of each of its L layers, which are as many.

    Attributes:
        rows: (P,) or (L, P) int64 into the flattened (B * Q) predictions, ascending.
        objects: (P,) or (L, P) int64 into the packed targets.
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
    def cost(self, predictions: PredictedSet, targets: PackedTargets) -> Tensor:
        """Compute the cost of every pair of an object and a prediction of its image.

        Returns:
            (L, G, Q) float32, L = 1 for a set without layers: each object's cost of every query of its own image.
        """
        logits, boxes, labels = predictions
        layers, images, queries, _ = (1, *logits.shape)[-4:]
        # One entry an object and not a table of images by most objects: nothing is computed twice or in vain.
        probability = logits.reshape(layers, images, queries, -1)[:, targets.images, :, labels].float().sigmoid()
        probability = probability.transpose(0, 1)  # two indices with a slice between them come first
        boxes = boxes.reshape(layers, images, queries, 4)[:, targets.images].float()
        objects, scales = targets.boxes[:, None], targets.scales[:, None]
        # The focal loss with the object minus that without it: what the match changes. 1e-12 is the official epsilon.
        present = self.alpha * (1 - probability) ** self.gamma * -(probability + 1e-12).log()
        absent = (1 - self.alpha) * probability**self.gamma * -(1 - probability + 1e-12).log()
        distance = (boxes - objects).abs().sum(-1)
        overlap = generalized_iou(*(box_convert(b * scales, "cxcywh", "xyxy") for b in (boxes, objects)))
        return self.cls * (present - absent) + self.l1 * distance - self.giou * overlap

    def begin(self, sets: Sequence[PredictedSet], targets: PackedTargets) -> Matching:
        """Compute the costs of all prediction sets and send them to the host, without waiting for them."""
        with torch.autocast(targets.boxes.device.type, enabled=False):
            costs = [self.cost(one, targets).flatten() for one in sets]
        return Matching(torch.cat(costs), [one.logits.shape for one in sets], targets)

    def __call__(self, sets: Sequence[PredictedSet], targets: PackedTargets) -> list[Match]:
        """Match every prediction set.

        Args:
            sets: predictions, detached, with the labels of the packed objects in their classes.
            targets: objects of the batch.

        Returns:
            One match per set. A NaN prediction is matched as if it were very expensive: the loss then names the NaN,
            where SciPy would only reject the matrix.
        """
        return self.begin(sets, targets).solve()


class Matching:
    """Costs on their way to the host, to be solved there.

    Args:
        costs: of all sets, each (L, G, Q) flattened, one after the other.
        shapes: of the sets' logits, (B, Q, K) or (L, B, Q, K).
        targets: objects of the batch.
    """

    def __init__(self, costs: Tensor, shapes: Sequence[torch.Size], targets: PackedTargets) -> None:
        self.shapes, self.targets = shapes, targets
        self.costs, self.arrived = costs, None
        if costs.is_cuda and torch.cuda.is_available():  # a step may also be counted for a GPU that is not there
            # Pinned, so that the copy runs beside what is launched next; the event says when it is complete.
            self.costs = torch.empty(costs.shape, dtype=costs.dtype, pin_memory=True)
            self.costs.copy_(costs, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def solve(self) -> list[Match]:
        """Wait for the costs and find the cheapest pairs of each set."""
        if self.arrived is not None:
            self.arrived.synchronize()
        # 1e8 and not infinity, with which SciPy may find no assignment at all.
        costs = np.nan_to_num(self.costs.cpu().numpy(), nan=1e8, posinf=1e8, neginf=-1e8)
        solved, begin = [], 0
        for shape in self.shapes:
            layers, queries = (1, *shape)[-4], shape[-2]
            end = begin + layers * len(self.targets.labels) * queries
            solved.append(_solve(costs[begin:end].reshape(layers, -1, queries), self.targets.spans))
            begin = end
        lengths = [pairs[0].size for pairs in solved]
        joined = np.concatenate([pairs.reshape(2, -1) for pairs in solved], axis=1)
        both = torch.from_numpy(joined).to(self.targets.boxes.device, non_blocking=True)
        matches = zip(both[0].split(lengths), both[1].split(lengths), self.shapes, strict=True)
        # (P,), or (L, P) of a set with layers
        return [Match(*(part.view(*shape[:-3], -1) for part in (rows, objects))) for rows, objects, shape in matches]


def _solve(costs: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Solve costs (L, G, Q) layer by layer and image by image; return rows and objects (2, L, P) of the pairs."""
    layers, _, queries = costs.shape
    pairs = [[np.zeros((2, 0), np.int64)] for _ in range(layers)]
    for own, found in zip(costs, pairs, strict=True):
        for image, (start, stop) in enumerate(spans):
            if stop > start:
                chosen, matched = linear_sum_assignment(own[start:stop].T)
                found.append(np.stack([chosen + image * queries, matched + start]))
    return np.stack([np.concatenate(found, axis=1) for found in pairs], axis=1)
