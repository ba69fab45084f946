"""From settings to a detector: the only place in `models` that knows how a recipe is spelled.

`DETECTORS` lists everything that can be built; there is no registry behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from brs_detr.assign.hungarian import HungarianMatcher
from brs_detr.models.backbones.timm_backbone import build_backbone
from brs_detr.models.brs_detr import BRSDETR
from brs_detr.models.config import BRSDINOConfig, DETRConfig
from brs_detr.models.denoising import EPS, Denoising
from brs_detr.models.detector import Detector
from brs_detr.models.heads.atss import ATSSHead
from brs_detr.models.heads.dense import build_objective
from brs_detr.models.heads.roi import RoIHead
from brs_detr.models.heads.rpn import RPNHead
from brs_detr.models.model_config import ModelConfig
from brs_detr.models.neck import ChannelMapper, pyramid_strides
from brs_detr.models.objective_config import ScoreConfig, TermWeights
from brs_detr.models.one_stage import build_atss, build_foveabox, build_paa, build_retinanet
from brs_detr.models.one_stage_masks import build_solov2, build_yolact
from brs_detr.models.rcnn import TwoStageDetector
from brs_detr.models.transformer.attention import Sampling, use_sampling
from brs_detr.models.transformer.decoder import BoxPosition, QueryDecoder
from brs_detr.models.transformer.encoder import DeformableEncoder
from brs_detr.models.transformer.two_stage import TwoStageHead
from brs_detr.ops.deform_attn import deformable_attention
from brs_detr.ops.deform_attn_op import automatic_attention, fused_attention


def build_model(config: ModelConfig, num_classes: int) -> Detector:
    """Build the detector that section `model` of a recipe describes.

    Args:
        config: one of the dataclasses in `models/config.py`.
        num_classes: K, from the data.

    Raises:
        ValueError: its name is not in `DETECTORS`.
    """
    if config.name not in DETECTORS:
        raise ValueError(f"model.name {config.name!r} is none of {', '.join(DETECTORS)}")
    return DETECTORS[config.name](config, num_classes)


def sampling_here(name: str) -> str:
    """Return which of "torch" and "triton" computes deformable attention here where `name` is wanted.

    "auto" and "triton" are Triton's kernels where there is a GPU, "auto" only where Triton is installed.
    """
    if name == "torch" or not torch.cuda.is_available():
        return "torch"
    return "triton" if name == "triton" or find_spec("triton") else "torch"


def choose_sampling(name: str) -> Sampling:
    """Choose how deformable attention is computed: "torch", "triton" or "auto"; see `sampling_here`.

    "auto" tries the kernels on each GPU first, and takes plain torch with a warning where they do not work.

    Raises:
        ValueError: "triton" is wanted, there is a GPU, and Triton is not installed.
    """
    if sampling_here(name) == "torch":
        return deformable_attention
    if find_spec("triton") is None:
        raise ValueError("model.deformable_attention=triton: Triton is not installed. Install triton, or use auto.")
    return automatic_attention if name == "auto" else fused_attention


# of the denoising queries' boxes whatever their classification loss: a ranking that is solved early would balance them
# down to nothing
DENOISING_WEIGHTS = {"l1": 5.0, "giou": 2.0}


def build_brs_detr(config: DETRConfig, num_classes: int) -> BRSDETR:
    """Build BRS-DETR or Co-DETR, or from a `BRSDINOConfig` BRS-DINO or Co-DINO."""
    dim, dino = config.dim, isinstance(config, BRSDINOConfig)
    layer: dict[str, Any] = {
        "heads": config.heads,
        "levels": config.levels,
        "points": config.points,
        "hidden": config.ffn_dim,
    }
    recompute = config.backbone.activation_checkpointing
    backbone = build_backbone(config.backbone)
    pyramid = getattr(backbone, "is_pyramid", False)  # a neck need not project its maps
    strides = pyramid_strides(backbone.strides, config.levels + 1)  # the neck's, and one more for the dense heads
    # The order in which parts are made is that of their random numbers: another order gives other first weights.
    sine: dict[str, Any] = {"temperature": 20.0, "offset": 0.0} if dino else {}
    encoder = DeformableEncoder(dim, layers=config.encoder_layers, activation_checkpointing=recompute, **sine, **layer)
    heads = config.dense_heads
    rpn = RPNHead(dim, strides, config.rpn) if "rpn" in heads else None
    # pools from all but the coarsest map
    roi = RoIHead(dim, num_classes, strides[:-1], config.roi) if "roi" in heads else None
    dino_parts: dict[str, Any] = {"position": BoxPosition(dim), "norm": nn.LayerNorm(dim), "eps": EPS} if dino else {}
    model = BRSDETR(
        config,
        num_classes,
        strides=strides[:-1],
        backbone=backbone,
        encoder=encoder,
        rpn=rpn,
        roi=roi,
        atss=ATSSHead(dim, num_classes, strides, config.atss, config.norm_groups) if "atss" in heads else None,
        neck=ChannelMapper(backbone.channels, dim, config.levels, config.norm_groups, pyramid),
        proposals=TwoStageHead(dim, num_classes, config.queries, config.proposal_nms_iou, class_agnostic=not dino),
        decoder=QueryDecoder(dim, num_classes, layers=config.decoder_layers, **dino_parts, **layer),
        matcher=HungarianMatcher(config.matcher.cls, config.matcher.l1, config.matcher.giou),
        objective=build_objective(config.objective),
        **build_denoising(config, num_classes),
    )
    use_sampling(model, choose_sampling(config.deformable_attention))
    return model


def build_denoising(config: DETRConfig, num_classes: int) -> dict[str, Any]:
    """Build the denoising queries of a detector and their objective, as arguments of `BRSDETR`; {} if it has none."""
    if not isinstance(config, BRSDINOConfig) or config.denoising.loss == "none":
        return {}
    if config.denoising.loss == "rank":
        objective = build_objective(config.objective, DENOISING_WEIGHTS)
    else:
        objective = build_objective(ScoreConfig("quality_focal", TermWeights(**DENOISING_WEIGHTS)))
    return {"denoising": Denoising(config.dim, num_classes, config.denoising), "denoising_objective": objective}


DETECTORS: dict[str, Callable[[Any, int], Detector]] = {
    "brs_detr": build_brs_detr,
    "co_detr": build_brs_detr,
    "brs_dino": build_brs_detr,
    "co_dino": build_brs_detr,
    "retinanet": build_retinanet,
    "foveabox": build_foveabox,
    "atss": build_atss,
    "paa": build_paa,
    "faster_rcnn": TwoStageDetector,
    "cascade_rcnn": TwoStageDetector,
    "mask_rcnn": TwoStageDetector,
    "yolact": build_yolact,
    "solov2": build_solov2,
}
