"""One-stage head with probabilistic anchor assignment and score voting, with or without an IoU branch.

Source: Kim and Lee, "Probabilistic Anchor Assignment with IoU Prediction for Object Detection", ECCV 2020. The
rank-based PAA (Oksuz et al., "Rank & Sort Loss", ICCV 2021) drops the branch and has three scales per cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from brs_detr.assign.assignment import BatchAssignment, HeadAssignment
from brs_detr.assign.paa import PAAAssigner
from brs_detr.losses.boxes import paired_giou_loss
from brs_detr.losses.classification import focal
from brs_detr.losses.distributed import SharedCount
from brs_detr.models.heads.dense import DenseOutput, build_objective
from brs_detr.models.heads.towers import TowerHead
from brs_detr.models.one_stage_config import PAAHeadConfig
from brs_detr.ops.anchors import AnchorGrid, batch_rows, octave_scales
from brs_detr.ops.boxes import BoxCoder, Candidates, vote
from brs_detr.ops.images import Size


class PAAHead(TowerHead):
    """Classes and boxes at the anchors of a feature pyramid, which are assigned by what they cost at present.

    A candidate's cost is its focal loss summed over the classes plus `box_cost` times its GIoU loss, whatever the
    objective is.

    Args:
        dim: channels of the feature maps.
        num_classes: object classes.
        strides: pixels per cell of each map.
        config: see `PAAHeadConfig`. The published head takes the best `before_nms` anchors of a level with all their
            classes, and not as many (anchor, class) pairs, so that more candidates of a low score vote.
        norm_groups: of the towers' GroupNorm; must divide `dim`.
    """

    assigner: PAAAssigner

    def __init__(
        self, dim: int, num_classes: int, strides: Sequence[int], config: PAAHeadConfig, norm_groups: int = 32
    ) -> None:
        super().__init__(
            dim,
            num_classes,
            AnchorGrid(strides, octave_scales(config.anchor_scale, config.scales_per_octave), config.anchor_ratios),
            stacked_convs=config.stacked_convs,
            norm_groups=norm_groups,
            level_scales=True,
            branch="iou" if config.iou_branch else None,
            objective=build_objective(config.objective),
            assigner=PAAAssigner(topk=config.topk),
            coder=BoxCoder((0.1, 0.1, 0.2, 0.2)),
            before_nms=config.before_nms,
            score_threshold=config.score_threshold,
            nms_iou=config.nms_iou,
            max_detections=config.max_detections,
        )
        self.branch_weight, self.box_cost = config.iou_weight, config.box_cost

    @torch.no_grad()
    def match(
        self,
        anchors: Sequence[Tensor],
        level_counts: Sequence[Sequence[int]],
        targets: Sequence[dict],
        output: DenseOutput,
        extents: Sequence[Sequence[Size]],
    ) -> BatchAssignment:
        """As `DenseHead.match`: candidates by IoU, then positives by cost; no anchor is ignored."""
        candidates = super().match(anchors, level_counts, targets, output, extents)
        costs = self.costs(anchors, candidates, output, extents)
        num_objects = [len(target["boxes"]) for target in targets]
        positives = self.assigner.select(candidates.assigned, costs, level_counts, num_objects)
        return candidates._replace(assigned=positives)

    def costs(
        self,
        anchors: Sequence[Tensor],
        candidates: BatchAssignment,
        output: DenseOutput,
        extents: Sequence[Sequence[Size]],
    ) -> Tensor:
        """Compute what each candidate costs at present: (N,), infinite for anchors that are none."""
        rows = candidates.positives()
        logits = batch_rows(output.logits, extents)[rows].float()
        labels = candidates.classes(self.num_classes)[rows]
        boxes = self.coder.decode(torch.cat(list(anchors))[rows], batch_rows(output.deltas, extents)[rows])
        objects = candidates.boxes[candidates.assigned[rows]]
        # Of the paper's focal loss, also where the objective ranks: alpha 0.25, gamma 2.
        scores = focal(logits, labels, torch.arange(len(rows), device=rows.device), logits[:, 0], 0.25, 2.0)
        cost = scores + self.box_cost * paired_giou_loss(boxes, objects)
        return cost.new_full(candidates.assigned.shape, torch.inf).index_copy(0, rows, cost)

    def normalizer(self, assignment: HeadAssignment) -> SharedCount:
        """Count the positives, at least one an image on average, as in the published code.

        The average is over the images of this process: where another one has no objects, the normalizer of both is
        larger than that of one process with all images.
        """
        return SharedCount(max(len(assignment.rows), len(assignment.references)))

    @torch.no_grad()
    def branch_target(
        self, output: DenseOutput, extents: Sequence[Sequence[Size]], assignment: HeadAssignment
    ) -> Tensor:
        """Return the IoU (P,) of the positive anchors' boxes with their objects."""
        rows = assignment.rows
        anchors, deltas = torch.cat(assignment.references)[rows], batch_rows(output.deltas, extents)[rows]
        return self.box_losses(anchors, deltas, assignment.targets)[0]

    def class_scores(self, output: DenseOutput, level: int) -> Tensor:
        """As `DenseHead.class_scores`; with the branch the geometric mean of score and predicted IoU."""
        scores = super().class_scores(output, level)
        return scores if output.iou is None else (scores * output.iou[level].float().sigmoid()).sqrt()

    def detect(self, candidates: Candidates, size: Size, max_detections: int) -> dict[str, Tensor]:
        """As `DenseHead.detect`, each box then replaced by the vote of the candidates that overlap it."""
        detections = super().detect(candidates, size, max_detections)
        voters = torch.where(candidates.kept, candidates.scores, 0.0)
        clipped = clip_boxes_to_image(candidates.boxes, size)
        boxes = vote(detections["boxes"], detections["labels"], clipped, voters, candidates.labels)
        return {**detections, "boxes": boxes}
