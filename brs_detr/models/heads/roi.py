"""Second stage of Faster R-CNN on a feature pyramid (Ren et al.; Lin et al., "Feature Pyramid Networks", section 4.2).

Proposals are pooled by RoIAlign, two fully connected layers classify them and refine one box per class. With softmax
and a sampler this is Co-DETR's head; with sigmoids, a ranking objective and no sampler it is BRS-DETR's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torchvision.ops import roi_align

from brs_detr.assign.assignment import HeadAssignment, join
from brs_detr.assign.max_iou import IGNORED, RandomSampler, max_iou_assign
from brs_detr.losses.boxes import paired_giou_loss, paired_iou
from brs_detr.losses.objective import PredictionSet
from brs_detr.models.config import RoIConfig
from brs_detr.models.heads.dense import HeadLosses, build_objective
from brs_detr.ops.boxes import BoxCoder, suppress
from brs_detr.ops.images import Size


class RoIOutput(NamedTuple):
    """What the head says about every RoI of the batch.

    Attributes:
        logits: (N, C) or, with softmax, (N, C + 1).
        deltas: (N, C, 4) offsets, one box per class.
        features: (N, dim) mean of the pooled features.
    """

    logits: Tensor
    deltas: Tensor
    features: Tensor


class RoIHead(nn.Module):
    """Classifies and refines proposals.

    Args:
        dim: channels of the feature maps.
        num_classes: object classes.
        strides: pixels per cell of the maps that are pooled from.
        config: see `RoIConfig`.
    """

    def __init__(self, dim: int, num_classes: int, strides: Sequence[int], config: RoIConfig) -> None:
        super().__init__()
        fc_dim, pool = config.fc_dim, 7  # cells a side of the pooled window
        self.num_classes, self.strides, self.pool = num_classes, tuple(strides), pool
        # RoIs below twice this side (square root of the area, pixels) are pooled from the finest map: 56 at stride 4.
        self.finest_scale = 14 * strides[0]
        self.objective = build_objective(config.objective)
        self.softmax = config.objective.loss == "cross_entropy"  # and not a sigmoid per class
        self.sampler = None if config.sample is None else RandomSampler(config.sample, positive_fraction=0.25)
        self.add_ground_truth, self.max_rois = config.add_ground_truth, config.max_rois
        self.score_threshold, self.nms_iou = config.score_threshold, config.nms_iou
        self.max_detections = config.max_detections
        self.coder = BoxCoder((0.1, 0.1, 0.2, 0.2))
        self.fc1 = nn.Linear(dim * pool * pool, fc_dim)
        self.fc2 = nn.Linear(fc_dim, fc_dim)
        self.score = nn.Linear(fc_dim, num_classes + int(self.softmax))
        self.delta = nn.Linear(fc_dim, num_classes * 4)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.normal_(self.delta.weight, std=0.001)
        for layer in (self.fc1, self.fc2, self.score, self.delta):
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor], rois: Sequence[Tensor]) -> RoIOutput:
        """Pool and judge RoIs.

        Args:
            features: (B, dim, h, w) per stride; further maps are not used.
            rois: per image (n_b, 4) xyxy pixels.

        Returns:
            rows of all images one after the other, N = sum of n_b.
        """
        pooled, order = self._pool(features, rois)
        hidden = self.fc2(self.fc1(pooled.flatten(1)).relu()).relu()
        # the rows lie in level order; the small outputs are put back rather than the pooled windows (50 kB each)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        deltas = rearrange(self.delta(hidden), "n (c box) -> n c box", box=4)
        return RoIOutput(self.score(hidden)[back], deltas[back], reduce(pooled, "n d y x -> n d", "mean")[back])

    def _pool(self, features: Sequence[Tensor], rois: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pool every RoI on the map of its size: (N, dim, pool, pool) in level order, and that order (N,)."""
        boxes = torch.cat(list(rois)).float()
        image = torch.cat([box.new_full((box.shape[0], 1), b, dtype=torch.float32) for b, box in enumerate(rois)])
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1).sqrt()
        level = (side / self.finest_scale + 1e-6).log2().floor().clamp(0, len(self.strides) - 1).long()
        order = level.argsort(stable=True)
        counts = torch.bincount(level, minlength=len(self.strides)).tolist()
        per_level = torch.cat([image, boxes], dim=1)[order].split(counts)
        # sampling_ratio=0 takes ceil(side / pool) samples per bin and axis, as the published weights expect
        pooled = [
            roi_align(x.float(), roi, self.pool, spatial_scale=1 / stride, sampling_ratio=0, aligned=True).to(x.dtype)
            for x, roi, stride in zip(features, per_level, self.strides)
        ]
        return torch.cat(pooled), order

    def losses(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size], targets: Sequence[dict]
    ) -> HeadLosses:
        """Compute the loss terms of the batch, as one prediction set.

        Args:
            features: (B, dim, h, w) per stride.
            proposals: per image (n, 4) xyxy pixels, best first.
            sizes: (h, w) pixels per image; an image without any proposal is given one, itself.
            targets: per image {"boxes": (M, 4) xyxy pixels, "labels": (M,)}.

        Returns:
            scalar terms, finite and attached to the graph without any positive too; and what the RoIs learned, of each
            image the positives before the background, with their pooled features.
        """
        rois, assigned = self._sample(proposals, sizes, targets)
        output = self(features, rois)
        joined = join(assigned, targets)
        labels, rows = joined.classes(self.num_classes), joined.positives()
        objects = joined.boxes[joined.assigned[rows]]
        boxes = self.coder.decode(torch.cat(rois)[rows], output.deltas[rows, labels[rows]])
        terms = self.objective(
            PredictionSet(
                output.logits,
                labels,
                quality=paired_iou(boxes.detach(), objects),
                box_losses={"giou": paired_giou_loss(boxes, objects)},
                rows=rows,
            )
        )
        assignment = HeadAssignment(rois, labels, rows, objects)
        return HeadLosses(terms, assignment._replace(features=assignment.per_image(output.features)))

    @torch.no_grad()
    def _sample(
        self, proposals: Sequence[Tensor], sizes: Sequence[Size], targets: Sequence[dict]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Choose the RoIs (n, 4) of every image, positives first, and their assignment (n,); n is at least 1."""
        candidates, assignments = [], []
        for boxes, (height, width), target in zip(proposals, sizes, targets, strict=True):
            boxes, objects = boxes[: self.max_rois].float(), target["boxes"].float()
            if boxes.shape[0] == 0:
                boxes = boxes.new_tensor([[0, 0, width, height]])
            assigned = max_iou_assign(boxes, objects, positive=0.5, negative=0.5)
            if self.add_ground_truth:
                boxes = torch.cat([objects, boxes])
                assigned = torch.cat([torch.arange(objects.shape[0], device=assigned.device), assigned])
            candidates.append(boxes)
            assignments.append(assigned if self.sampler is None else self.sampler(assigned))
        if self.sampler is None:  # nothing was ignored: the number of RoIs is known without asking the device
            counts = [boxes.shape[0] for boxes in candidates]
        else:
            counts = torch.stack([(assigned != IGNORED).sum() for assigned in assignments]).tolist()
        # 0 for positives, 1 for background, 2 for ignored
        orders = [(-assigned).clamp(0, 2).argsort(stable=True)[:count] for assigned, count in zip(assignments, counts)]
        return [b[o] for b, o in zip(candidates, orders)], [a[o] for a, o in zip(assignments, orders)]

    @torch.no_grad()
    def predict(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]
    ) -> list[dict[str, Tensor]]:
        """Detect objects, best first, per image: {"boxes": (n, 4) xyxy pixels of the input, "scores", "labels"}."""
        output = self(features, proposals)
        logits = output.logits.float()
        scores = logits.softmax(dim=1)[:, :-1] if self.softmax else logits.sigmoid()
        boxes = self.coder.decode(torch.cat(list(proposals))[:, None], output.deltas)
        labels = torch.arange(self.num_classes, device=logits.device).expand_as(scores)
        counts = [rois.shape[0] for rois in proposals]
        images = zip(boxes.split(counts), scores.split(counts), labels.split(counts), sizes, strict=True)
        return [
            suppress(
                own_boxes.flatten(0, 1),
                own_scores.flatten(),
                own_labels.flatten(),
                size,
                kept=own_scores.flatten() > self.score_threshold,
                nms_iou=self.nms_iou,
                max_detections=self.max_detections,
            )
            for own_boxes, own_scores, own_labels, size in images
        ]
