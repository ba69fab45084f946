"""Second stage of Faster R-CNN on a feature pyramid (Ren et al.; Lin et al., "Feature Pyramid Networks", section 4.2).

Proposals are pooled by RoIAlign, two fully connected layers (or convolutions and one) classify them and refine one box
per class, or one for all classes. With softmax and a sampler this is the head of Faster R-CNN and Co-DETR; with
sigmoids, a ranking objective and no sampler it is that of the rank-based detectors and of BRS-DETR. `cascade.py` puts
several in a row, `mask.py` adds masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from brs_detr.assign.assignment import HeadAssignment, join
from brs_detr.assign.max_iou import IGNORED, RandomSampler, max_iou_assign
from brs_detr.losses.objective import BoxLosses, PredictionSet
from brs_detr.models.config import RoIConfig
from brs_detr.models.heads.dense import box_losses, build_objective
from brs_detr.models.heads.pooling import Pooled, finest_scale, pool_rois
from brs_detr.models.heads.towers import tower
from brs_detr.ops.anchors import take_rows
from brs_detr.ops.boxes import BoxCoder, Candidates, image_corners, suppress
from brs_detr.ops.images import Size

Branch = Callable[[Sequence[Tensor], HeadAssignment, Sequence[dict]], BoxLosses]


class SampledRoIs(NamedTuple):
    """RoIs that a head may look at, of each image, in the order in which it does.

    Attributes:
        boxes: per image (n, 4) xyxy pixels, the positives first, then the background, then what is not looked at.
        assigned: per image (n,) int64 object of the image, or a negative mark of `assign.max_iou`.
    """

    boxes: list[Tensor]
    assigned: list[Tensor]

    def first(self, counts: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Return boxes and objects of the first RoIs of each image."""
        rois = [own[:count] for own, count in zip(self.boxes, counts, strict=True)]
        return rois, [own[:count] for own, count in zip(self.assigned, counts, strict=True)]


class RoIOutput(NamedTuple):
    """What the head says about every RoI of the batch; with class-agnostic boxes, K is 1, else C.

    Attributes:
        logits: (N, C) or, with softmax, (N, C + 1).
        deltas: (N, K, 4) offsets.
    """

    logits: Tensor
    deltas: Tensor


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
        self.finest_scale = finest_scale(strides)
        self.min_iou, self.low_quality = config.min_iou, config.low_quality
        self.box_loss, self.beta = config.box_loss, config.beta
        self.objective = build_objective(config.objective)
        self.softmax = config.objective.loss == "cross_entropy"  # and not a sigmoid per class
        self.sampler = None if config.sample is None else RandomSampler(config.sample, positive_fraction=0.25)
        self.add_ground_truth, self.max_rois = config.add_ground_truth, config.max_rois
        self.score_threshold, self.nms_iou = config.score_threshold, config.nms_iou
        self.max_detections = config.max_detections
        self.coder = BoxCoder(config.coder_stds)
        self.fc1 = nn.Linear(dim * pool * pool, fc_dim)
        self.fc2 = nn.Linear(fc_dim, fc_dim) if config.stacked_convs == 0 else None
        self.score = nn.Linear(fc_dim, num_classes + int(self.softmax))
        self.delta = nn.Linear(fc_dim, 4 if config.class_agnostic else num_classes * 4)
        hidden = [layer for layer in (self.fc1, self.fc2) if layer is not None]
        for layer in hidden:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.normal_(self.delta.weight, std=0.001)
        for layer in (*hidden, self.score, self.delta):
            nn.init.zeros_(layer.bias)
        self.tower = tower(dim, config.stacked_convs, math.gcd(32, dim))
        for module in self.tower.modules():
            if isinstance(module, nn.Conv2d):  # MMCV's for a convolution before ReLU
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Sequence[Tensor], rois: Sequence[Tensor]) -> RoIOutput:
        """Pool and classify RoIs.

        Args:
            features: (B, dim, h, w) per stride; further maps are not used.
            rois: per image (n_b, 4) xyxy pixels.

        Returns:
            rows of all images one after the other, N = sum of n_b.
        """
        return self.classify_pooled(self.pool_rois(features, rois))

    def pool_rois(
        self, features: Sequence[Tensor], rois: Sequence[Tensor], level_counts: Sequence[int] | None = None
    ) -> Pooled:
        """Pool RoIs; arguments as for `forward`, and how many are of each map, where the host knows it."""
        return pool_rois(features, rois, self.strides, self.pool, level_counts)

    def classify_pooled(self, pooled: Pooled) -> RoIOutput:
        """Classify pooled RoIs."""
        logits, deltas = self.classify(pooled.windows)
        # the small outputs are put back into the order of the RoIs rather than the windows (50 kB each)
        return RoIOutput(logits[pooled.back], deltas[pooled.back])

    def classify(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and offsets, as in `RoIOutput`, of pooled RoIs (N, dim, side, side)."""
        hidden = self.fc1(self.tower(pooled).flatten(1)).relu()
        if self.fc2 is not None:
            hidden = self.fc2(hidden).relu()
        return self.score(hidden), rearrange(self.delta(hidden), "n (c box) -> n c box", box=4)

    def scores(self, logits: Tensor) -> Tensor:
        """Return the scores (..., C) of the classes from the logits of RoIs."""
        logits = logits.float()
        return logits.softmax(dim=-1)[..., :-1] if self.softmax else logits.sigmoid()

    def assign(
        self, rois: list[Tensor], assigned: list[Tensor], targets: Sequence[dict], counts: list[int] | None = None
    ) -> HeadAssignment:
        """Return what RoIs shall learn.

        Args:
            rois: per image (n, 4) xyxy pixels.
            assigned: per image (n,) int64 its object, or a negative mark.
            targets: per image {"boxes": (M, 4) xyxy pixels, "labels": (M,)}.
            counts: positives of each image; None: the host waits for the device to know their number.
        """
        joined = join(assigned, targets)
        rows = joined.positives(None if counts is None else sum(counts))
        objects, labels = joined.assigned[rows], joined.classes(self.num_classes)
        return HeadAssignment(rois, labels, rows, joined.boxes[objects], matched_idxs=objects, counts=counts)

    def terms(self, output: RoIOutput, assignment: HeadAssignment, further: BoxLosses) -> dict[str, Tensor]:
        """Compute the named terms of predictions with a known assignment; `further` losses join those of the boxes."""
        rows, labels = assignment.rows, assignment.labels
        deltas = self._deltas_of(output, labels, rows)
        quality, losses = box_losses(
            self.box_loss, self.coder, torch.cat(assignment.references)[rows], deltas, assignment.targets, self.beta
        )
        return self.objective(
            PredictionSet(output.logits, labels, quality=quality, box_losses={**losses, **further}, rows=rows)
        )

    def _deltas_of(self, output: RoIOutput, classes: Tensor, rows: Tensor) -> Tensor:
        """Return the offsets (P, 4) of some rows (P,) for the class (N,) of each."""
        if output.deltas.shape[1] == 1:
            return output.deltas[rows, 0]
        return output.deltas[rows, classes[rows]]

    @torch.no_grad()
    def sample(
        self, proposals: Sequence[Tensor], sizes: Sequence[Size], targets: Sequence[dict]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Choose the RoIs (n, 4) of every image, positives first, and their assignment (n,); n is at least 1.

        Arguments as for `sample_rois`; with a sampler the host waits for the device once.
        """
        sampled = self.sample_rois(proposals, sizes, targets)
        if self.sampler is None:  # nothing was ignored: the number of RoIs is known without asking the device
            return sampled
        return sampled.first(torch.stack([(own != IGNORED).sum() for own in sampled.assigned]).tolist())

    @torch.no_grad()
    def sample_rois(
        self,
        proposals: Sequence[Tensor],
        sizes: Sequence[Size],
        targets: Sequence[dict],
        valid: Sequence[Tensor] | None = None,
    ) -> SampledRoIs:
        """Decide which RoIs to pool, without waiting for the device.

        Args:
            proposals: per image (n, 4) xyxy pixels, best first.
            sizes: (h, w) pixels per image; an image without any proposal (n = 0) is given one, itself.
            targets: as for `assign`.
            valid: per image (n,) bool, False for the last entries that are no proposals, but never for all; None: all
                are.
        """
        candidates, assignments = [], []
        for image, (boxes, size, target) in enumerate(zip(proposals, sizes, targets, strict=True)):
            boxes, objects = boxes[: self.max_rois].float(), target["boxes"].float()
            if boxes.shape[0] == 0:
                boxes = image_corners([size], boxes)
            there = None if valid is None else valid[image][: self.max_rois]
            assigned = self._overlapped(boxes, objects, there)
            if self.add_ground_truth:
                boxes = torch.cat([objects, boxes])
                assigned = torch.cat([torch.arange(objects.shape[0], device=assigned.device), assigned])
            if self.sampler is not None:
                assigned = self.sampler(assigned)
            # 0 for positives, 1 for background, 2 for ignored; stable, so that the added objects stay in front
            order = (-assigned).clamp(0, 2).argsort(stable=True)
            candidates.append(boxes[order])
            assignments.append(assigned[order])
        return SampledRoIs(candidates, assignments)

    def _overlapped(self, boxes: Tensor, objects: Tensor, valid: Tensor | None) -> Tensor:
        """Give boxes (n, 4) to the objects (M, 4) they overlap; those that are not valid (n,) are ignored."""
        if valid is not None:
            # An empty box overlaps nothing, and so is no object's best one.
            boxes = torch.where(valid[:, None], boxes, 0.0)
        low_quality = self.min_iou if self.low_quality else None
        assigned = max_iou_assign(boxes, objects, positive=self.min_iou, negative=self.min_iou, low_quality=low_quality)
        return assigned if valid is None else torch.where(valid, assigned, IGNORED)

    @torch.no_grad()
    def added(self, rois: Sequence[Tensor], targets: Sequence[dict]) -> list[int]:
        """Count the RoIs of each image, the first ones, that are ground truth added by this head."""
        counts = [len(target["boxes"]) if self.add_ground_truth else 0 for target in targets]
        if self.sampler is None or not self.add_ground_truth:
            return counts
        # A sampler may have left some of them out. Only positives precede the background, the objects first of all.
        equal = [
            (own[:count, None] == target["boxes"].float()).all(dim=2).any(dim=1)
            for own, target, count in zip(rois, targets, counts, strict=True)
        ]
        leading: list[int] = torch.stack([same.long().cumprod(0).sum() for same in equal]).tolist()
        return leading

    @torch.no_grad()
    def refine(
        self,
        rois: Sequence[Tensor],
        output: RoIOutput,
        sizes: Sequence[Size],
        labels: Tensor | None = None,
        added: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Make the proposals of a next stage: one box per RoI, clipped to its image.

        With one box per class, that of a RoI's object is taken, and for background that of the best class.

        Args:
            rois: per image (n, 4) xyxy pixels.
            output: of `forward` for them.
            sizes: (h, w) pixels per image.
            labels: (N,) int64, in training; background = number of classes.
            added: per image how many RoIs, the first ones, are dropped, being ground truth; None: no RoI is.
        """
        classes = output.logits[:, : self.num_classes].argmax(dim=1)  # all classes, but not softmax's background
        if labels is not None:
            classes = torch.where(labels < self.num_classes, labels, classes)
        if output.deltas.shape[1] == 1:
            classes = torch.zeros_like(classes)
        deltas = take_rows(output.deltas, classes[:, None])[:, 0]
        boxes = self.coder.decode(torch.cat(list(rois)), deltas).split([len(own) for own in rois])
        return [
            clip_boxes_to_image(own[start:], size)
            for own, size, start in zip(boxes, sizes, added or [0] * len(rois), strict=True)
        ]

    @torch.no_grad()
    def predict(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]
    ) -> list[dict[str, Tensor]]:
        """Detect objects, best first, per image: {"boxes": (n, 4) xyxy pixels of the input, "scores", "labels"}."""
        output = self(features, proposals)
        return self.detect(proposals, output.logits, output.deltas, sizes)

    def detect(
        self, rois: Sequence[Tensor], logits: Tensor, deltas: Tensor, sizes: Sequence[Size]
    ) -> list[dict[str, Tensor]]:
        """Choose the detections among all (RoI, class) pairs, as `predict` returns them.

        Args:
            rois: per image (n, 4) xyxy pixels.
            logits, deltas: as in `RoIOutput`.
            sizes: (h, w) pixels per image.
        """
        images = zip(self.candidates(rois, logits, deltas), sizes, strict=True)
        return [
            suppress(**own._asdict(), size=size, nms_iou=self.nms_iou, max_detections=self.max_detections)
            for own, size in images
        ]

    def candidates(self, rois: Sequence[Tensor], logits: Tensor, deltas: Tensor) -> list[Candidates]:
        """Return what enters suppression, the (RoI, class) pairs of each image; arguments as for `detect`."""
        scores = self.scores(logits)
        boxes = self.coder.decode(torch.cat(list(rois))[:, None], deltas).expand(*scores.shape, 4)
        labels = torch.arange(self.num_classes, device=logits.device).expand_as(scores)
        columns = boxes.flatten(0, 1), scores.flatten(), labels.flatten()
        lengths = [own.shape[0] * self.num_classes for own in rois]
        return [
            Candidates(own_boxes, own_scores, own_labels, own_labels, own_scores > self.score_threshold)
            for own_boxes, own_scores, own_labels in zip(*(x.split(lengths) for x in columns), strict=True)
        ]
