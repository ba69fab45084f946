"""One-stage dense head with ATSS assignment (Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free
Detection", CVPR 2020), with or without the centerness branch.

Co-DETR trains it with focal loss and centerness; BRS-DETR drops the branch and ranks all logits by IoU instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import batched_nms, clip_boxes_to_image

from brs_detr.assign.assignment import AuxSamples, join
from brs_detr.assign.atss import atss_assign
from brs_detr.losses.boxes import paired_giou_loss, paired_iou
from brs_detr.losses.distributed import SharedCount
from brs_detr.losses.objective import PredictionSet
from brs_detr.models.transformer.decoder import PRIOR_BIAS
from brs_detr.ops.anchors import AnchorGrid, batch_rows, take_rows, valid_extents, valid_rows
from brs_detr.ops.boxes import BoxCoder
from brs_detr.ops.images import Size


class ATSSOutput(NamedTuple):
    """What the head says about every anchor, one anchor per cell.

    Attributes:
        logits: per level (B, h, w, C).
        deltas: per level (B, h, w, 4) offsets from the anchors.
        centerness: per level (B, h, w, 1) logits, or None without that branch.
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    centerness: list[Tensor] | None

    @property
    def shapes(self) -> list[Size]:
        """(h, w) cells of each level."""
        return [(logits.shape[1], logits.shape[2]) for logits in self.logits]


class ATSSHead(nn.Module):
    """Classes and boxes at every cell of a feature pyramid.

    Args:
        dim: channels of the feature maps.
        num_classes: object classes.
        strides: pixels per cell of each map.
        objective: called as in `losses/objective.py`.
        stacked_convs: 3x3 convolutions of each tower.
        norm_groups: of the towers' GroupNorm; must divide `dim`.
        centerness: predict centerness, weigh box losses with its target and detections with its value.
        centerness_weight: factor of the centerness loss.
        topk: candidates per level and object.
        scale: anchor side in multiples of the stride.
        before_nms: best (anchor, class) pairs of each level that enter suppression.
        score_threshold: class scores at or below this are dropped.
        nms_iou: class-wise suppression threshold of detections.
        max_detections: detections per image.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        strides: Sequence[int],
        *,
        objective: Callable[..., dict[str, Tensor]],
        stacked_convs: int = 1,
        norm_groups: int = 32,
        centerness: bool = False,
        centerness_weight: float = 12.0,
        topk: int = 9,
        scale: float = 8.0,
        before_nms: int = 1000,
        score_threshold: float = 0.0,
        nms_iou: float = 0.6,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.num_classes, self.strides, self.topk = num_classes, tuple(strides), topk
        self.objective, self.centerness_weight = objective, centerness_weight
        self.before_nms, self.score_threshold = before_nms, score_threshold
        self.nms_iou, self.max_detections = nms_iou, max_detections
        self.anchors = AnchorGrid(strides, (scale,), (1.0,))
        self.coder = BoxCoder((0.1, 0.1, 0.2, 0.2))
        self.class_tower = _tower(dim, stacked_convs, norm_groups)
        self.box_tower = _tower(dim, stacked_convs, norm_groups)
        self.score = nn.Conv2d(dim, num_classes, 3, padding=1)
        self.delta = nn.Conv2d(dim, 4, 3, padding=1)
        self.centerness = nn.Conv2d(dim, 1, 3, padding=1) if centerness else None
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in strides)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.constant_(self.score.bias, PRIOR_BIAS)

    def forward(self, features: Sequence[Tensor]) -> ATSSOutput:
        """Feature maps (B, dim, h, w), one per stride -> predictions at every cell."""
        logits = [rearrange(self.score(self.class_tower(x)), "b c y x -> b y x c") for x in features]
        hidden = [self.box_tower(x) for x in features]
        deltas = [
            rearrange(self.delta(x).float() * scale, "b box y x -> b y x box") for x, scale in zip(hidden, self.scales)
        ]
        centerness = None
        if self.centerness is not None:
            centerness = [rearrange(self.centerness(x), "b 1 y x -> b y x 1") for x in hidden]
        return ATSSOutput(logits, deltas, centerness)

    def losses(
        self, output: ATSSOutput, features: Sequence[Tensor], sizes: Sequence[Size], targets: Sequence[dict]
    ) -> tuple[dict[str, Tensor], AuxSamples]:
        """Loss terms of the whole batch as one prediction set, and its anchors as collaborative queries.

        Args:
            output: of `forward`.
            features: the maps given to `forward`; queries take the vector at their anchor's cell.
            sizes: (h, w) pixels of each image without padding; anchors of the padding take no part.
            targets: per image {"boxes": (M, 4) xyxy pixels, "labels": (M,)}.

        Returns:
            {"atss." + name: scalar}, finite and attached to the graph also when there is no object at all; and samples,
            all anchors inside each image, level after level.
        """
        extents = [valid_extents(size, output.shapes, self.strides) for size in sizes]
        grid = [level[:, :, 0] for level in self.anchors(output.shapes)]
        anchors = [valid_rows(grid, extent) for extent in extents]
        assignments = [
            atss_assign(a, [h * w for h, w in extent], target["boxes"].float(), topk=self.topk)
            for a, extent, target in zip(anchors, extents, targets, strict=True)
        ]
        joined = join(assignments, targets)
        labels, rows = joined.classes(self.num_classes), joined.positives()
        objects = joined.boxes[joined.assigned[rows]]
        chosen = torch.cat(anchors)[rows]
        boxes = self.coder.decode(chosen, batch_rows(output.deltas, extents)[rows])
        count = SharedCount(sum((assigned >= 0).sum().clamp(min=1) for assigned in assignments))
        goal = None if output.centerness is None else centerness_target(chosen, objects)
        terms = self.objective(
            PredictionSet(
                batch_rows(output.logits, extents),
                labels,
                quality=paired_iou(boxes.detach(), objects),
                box_losses={"giou": paired_giou_loss(boxes, objects)},
                rows=rows,
                box_weight=goal,
                normalizer=count,
            )
        )
        if goal is not None:
            logits = batch_rows(output.centerness, extents)[rows, 0].float()
            value = binary_cross_entropy_with_logits(logits, goal, reduction="sum") / count.mean(logits.device)
            terms = {**terms, "centerness": self.centerness_weight * value}
        samples = self._samples(
            features, anchors, extents, labels, objects.new_zeros(labels.shape[0], 4).index_copy(0, rows, objects)
        )
        return {f"atss.{name}": value for name, value in terms.items()}, samples

    def _samples(
        self,
        features: Sequence[Tensor],
        anchors: list[Tensor],
        extents: list[list[Size]],
        labels: Tensor,
        goals: Tensor,
    ) -> AuxSamples:
        """Split labels (N,) and goals (N, 4) by image and add the feature of every anchor's cell."""
        counts = [a.shape[0] for a in anchors]
        maps = [rearrange(x, "b d y x -> b y x d") for x in features]
        vectors = [valid_rows([x[image] for x in maps], extent) for image, extent in enumerate(extents)]
        return AuxSamples(anchors, list(labels.split(counts)), list(goals.split(counts)), vectors)

    @torch.no_grad()
    def predict(self, output: ATSSOutput, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        """Detections of each image, best first: {"boxes": (n, 4) xyxy pixels of the input, "scores", "labels"}."""
        columns: list[list[Tensor]] = [[], [], [], []]
        for level, anchors in enumerate(self.anchors(output.shapes)):
            score = output.logits[level].float().sigmoid().flatten(1)
            score, index = score.topk(min(self.before_nms, score.shape[1]), dim=1)
            cell, label = index // self.num_classes, index % self.num_classes
            delta = take_rows(output.deltas[level].flatten(1, 2), cell)
            kept = score > self.score_threshold
            if output.centerness is not None:
                score = score * output.centerness[level].float().sigmoid().flatten(1).gather(1, cell)
            boxes = self.coder.decode(anchors.reshape(-1, 4)[cell], delta)
            for column, value in zip(columns, (boxes, score, label, kept)):
                column.append(value)
        joined = [torch.cat(column, dim=1) for column in columns]
        return [self._detect(*(column[image] for column in joined), size) for image, size in enumerate(sizes)]

    def _detect(self, boxes: Tensor, scores: Tensor, labels: Tensor, kept: Tensor, size: Size) -> dict[str, Tensor]:
        """Detections of one image from its candidates."""
        boxes, scores, labels = clip_boxes_to_image(boxes[kept], size), scores[kept], labels[kept]
        best = batched_nms(boxes, scores, labels, self.nms_iou)[: self.max_detections]
        return {"boxes": boxes[best], "scores": scores[best], "labels": labels[best]}


def centerness_target(anchors: Tensor, objects: Tensor) -> Tensor:
    """How central an anchor's center lies in its object (Tian et al., "FCOS", Eq. 3).

    Args:
        anchors: (P, 4) xyxy, centers inside their objects.
        objects: (P, 4) xyxy.

    Returns:
        (P,) in (0, 1], 1 at the object's center.
    """
    center = (anchors[:, :2] + anchors[:, 2:]) * 0.5
    low, high = center - objects[:, :2], objects[:, 2:] - center
    return (torch.minimum(low, high) / torch.maximum(low, high)).prod(dim=1).sqrt()


def _tower(dim: int, depth: int, groups: int) -> nn.Sequential:
    """3x3 convolutions, each with GroupNorm and ReLU."""
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(groups, dim), nn.ReLU())
            for _ in range(depth)
        )
    )
