"""From settings to a detector: the only place in `models` that knows how a recipe is spelled.

`DETECTORS` is the whole list of what can be built; there is no registry behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from brs_detr.assign.hungarian import HungarianMatcher
from brs_detr.assign.max_iou import RandomSampler
from brs_detr.losses.objective import RankingObjective, ScoreObjective
from brs_detr.models.backbones.timm_backbone import build_backbone
from brs_detr.models.brs_detr import BRSDETR
from brs_detr.models.heads.atss import ATSSHead
from brs_detr.models.heads.roi import RoIHead
from brs_detr.models.heads.rpn import RPNHead
from brs_detr.models.neck import ChannelMapper
from brs_detr.models.transformer.attention import Sampling, use_sampling
from brs_detr.models.transformer.decoder import QueryDecoder
from brs_detr.models.transformer.encoder import DeformableEncoder
from brs_detr.models.transformer.two_stage import TwoStageHead
from brs_detr.ops.deform_attn import deformable_sampling

SCORE_BASED = ("focal", "quality_focal")


def build_model(settings: Any, num_classes: int) -> nn.Module:
    """The detector that a recipe's `model:` section describes.

    Args:
        settings: `config.ModelConfig`, or anything with the same attributes.
        num_classes: K, from the data.

    Raises:
        ValueError: the name is not in `DETECTORS`.
    """
    if settings.name not in DETECTORS:
        raise ValueError(f"model.name {settings.name!r} is none of {', '.join(DETECTORS)}")
    return DETECTORS[settings.name](settings, num_classes)


class HeadRule(NamedTuple):
    """What of an objective depends on the head and not on the recipe.

    Attributes:
        tau: least IoU of a positive there, with aLRP (the paper's supplement).
        score_loss: classification loss of score-based recipes; None: `model.loss` itself.
        normalizer: of `ScoreObjective`, in score-based recipes.
        box_loss: of the RPN in score-based recipes; with ranking losses it is GIoU.
    """

    tau: float = 0.5
    score_loss: str | None = None
    normalizer: str = "positives"
    box_loss: Literal["giou", "l1"] = "giou"


HEAD_RULES = {
    # All query sets and the encoder proposals: focal loss over the number of matched queries, as in Deformable DETR.
    "decoder": HeadRule(),
    # Faster R-CNN's: sampled anchors, binary cross entropy over their number, L1 on offsets. Its positives start at an
    # IoU of 0.7, or 0.3 where an object has no better anchor.
    "rpn": HeadRule(tau=0.7, score_loss="binary_cross_entropy", normalizer="rows", box_loss="l1"),
    # Faster R-CNN's: sampled regions, softmax over classes and background; Co-DETR's GIoU in the place of L1.
    "roi": HeadRule(score_loss="cross_entropy", normalizer="rows"),
    # Focal loss, as published; its box losses are weighed with centerness where that branch is wanted.
    "atss": HeadRule(),
}


def build_objective(settings: Any, head: str) -> RankingObjective | ScoreObjective:
    """The objective of one head, a key of `HEAD_RULES`.

    Ranking losses weigh a head with one number, box terms follow by self-balancing; score-based ones weigh each term.
    """
    rule = HEAD_RULES[head]
    if settings.loss not in SCORE_BASED:
        return RankingObjective(
            settings.loss,
            weight=getattr(settings.ranking_weights, head),
            delta=settings.ranking_delta,
            score_weighted=settings.score_weighted,
            tau=rule.tau,
            period=None,  # aLRP: one objective serves many query sets a step
            scope=settings.ranking_scope,
        )
    weights = getattr(settings.score_weights, head)
    terms = {"cls": weights.cls, "l1": weights.l1, "giou": weights.giou}
    return ScoreObjective(rule.score_loss or settings.loss, weights=terms, normalizer=rule.normalizer)


def build_dense_heads(settings: Any, num_classes: int, strides: Sequence[int]) -> tuple[RPNHead, RoIHead, ATSSHead]:
    """The auxiliary heads on maps of the given strides; the RoI head pools from all but the coarsest."""
    score_based = settings.loss in SCORE_BASED
    rpn, roi, atss = settings.rpn, settings.roi, settings.atss
    octave = [rpn.anchor_scale * 2 ** (i / rpn.scales_per_octave) for i in range(rpn.scales_per_octave)]
    return (
        RPNHead(
            settings.dim,
            strides,
            scales=octave,
            ratios=rpn.anchor_ratios,
            objective=build_objective(settings, "rpn"),
            box_loss=HEAD_RULES["rpn"].box_loss if score_based else "giou",
            sampler=None if rpn.sample is None else RandomSampler(rpn.sample, 0.5),
            before_nms=rpn.proposals_before_nms,
            keep=rpn.proposals,
            test_before_nms=rpn.test_proposals_before_nms,
            test_keep=rpn.test_proposals,
            nms_iou=rpn.nms_iou,
        ),
        RoIHead(
            settings.dim,
            num_classes,
            strides[:-1],
            fc_dim=roi.fc_dim,
            objective=build_objective(settings, "roi"),
            softmax=score_based and HEAD_RULES["roi"].score_loss == "cross_entropy",
            sampler=None if roi.sample is None else RandomSampler(roi.sample, 0.25),
            add_ground_truth=roi.add_ground_truth,
            max_rois=roi.max_rois,
            finest_scale=14 * strides[0],
        ),
        ATSSHead(
            settings.dim,
            num_classes,
            strides,
            stacked_convs=atss.stacked_convs,
            norm_groups=settings.norm_groups,
            objective=build_objective(settings, "atss"),
            centerness=atss.centerness,
            centerness_weight=settings.score_weights.atss.centerness,
            topk=atss.topk,
            scale=atss.anchor_scale,
        ),
    )


def sampling_here(name: str) -> str:
    """Which of "torch" and "triton" runs on this machine where `name` is wanted: without a GPU only the first."""
    return name if torch.cuda.is_available() else "torch"


def choose_sampling(name: str) -> Sampling:
    """How deformable attention reads its samples: "torch", or "triton" where there is a GPU.

    Raises:
        ValueError: Triton is wanted but not installed.
    """
    if sampling_here(name) == "torch":
        return deformable_sampling
    try:
        from brs_detr.ops.deform_attn_triton import fused_sampling
    except ImportError as error:
        raise ValueError(f"model.deformable_attention=triton: {error}; install triton, or use torch") from error
    return fused_sampling


def build_brs_detr(settings: Any, num_classes: int) -> BRSDETR:
    """BRS-DETR, or with `loss: focal` Co-DETR."""
    dim, chosen = settings.dim, settings.backbone
    layer = {"heads": settings.heads, "levels": settings.levels, "points": settings.points, "hidden": settings.ffn_dim}
    backbone = build_backbone(
        chosen.name,
        pretrained=chosen.pretrained,
        checkpoint=chosen.checkpoint,
        frozen_stages=chosen.frozen_stages,
        norm=chosen.norm,
        drop_path=chosen.drop_path,
        activation_checkpointing=chosen.activation_checkpointing,
        strides=chosen.levels,
    )
    strides = list(backbone.strides)
    while len(strides) <= settings.levels:  # the neck's extra levels, and one more for the dense heads
        strides.append(2 * strides[-1])
    encoder = DeformableEncoder(
        dim,
        layers=settings.encoder_layers,
        activation_checkpointing=chosen.activation_checkpointing,
        **layer,
    )
    rpn, roi, atss = build_dense_heads(settings, num_classes, strides)
    model = BRSDETR(
        backbone=backbone,
        neck=ChannelMapper(backbone.channels, dim, settings.levels, settings.norm_groups),
        encoder=encoder,
        proposals=TwoStageHead(dim, num_classes, settings.queries),
        decoder=QueryDecoder(dim, num_classes, layers=settings.decoder_layers, **layer),
        rpn=rpn,
        roi=roi,
        atss=atss,
        objective=build_objective(settings, "decoder"),
        matcher=HungarianMatcher(settings.matcher.cls, settings.matcher.l1, settings.matcher.giou),
        dim=dim,
        num_classes=num_classes,
        queries=settings.queries,
        norm_groups=settings.norm_groups,
        max_aux_queries=settings.max_aux_queries,
        detections_per_image=settings.detections_per_image,
        rank_all_encoder_columns=settings.encoder_ranking == "all",
    )
    use_sampling(model, choose_sampling(settings.deformable_attention))
    return model


DETECTORS = {"brs_detr": build_brs_detr, "co_detr": build_brs_detr}
