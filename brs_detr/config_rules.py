"""Which values of the settings are out of range, and which pairs cannot work together; what to say of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from brs_detr.settings import leaves

_AT_LEAST_ONE = """
    data.augment.long_side data.augment.short_sides data.augment.crop_min data.test_short_side data.test_long_side
    model.dim model.heads model.points model.levels model.decoder_layers model.ffn_dim model.queries
    model.detections_per_image model.backbone.levels train.epochs train.steps train.total_batch_size
    train.per_device_batch_size train.eval_every train.log_every train.save_every train.patience train.overfit_batches
    train.max_skipped
    eval.batch_size eval.max_detections model.norm_groups
    model.rpn.proposals model.rpn.proposals_before_nms model.roi.fc_dim model.atss.topk
    model.rpn.test_proposals model.rpn.test_proposals_before_nms model.rpn.scales_per_octave model.rpn.sample
    model.roi.sample model.roi.max_rois model.max_aux_queries
    data.augment.crop_short_sides data.augment.crop_long_side
    data.max_image_pixels data.max_image_bytes data.max_json_bytes
"""
_POSITIVE = frozenset({"data.timeout", "model.rpn.anchor_scale", "model.rpn.anchor_ratios", "model.atss.anchor_scale"})
_NOT_EMPTY = frozenset(
    {
        "data.augment.short_sides",
        "data.augment.crop_short_sides",
        "model.backbone.levels",
        "model.rpn.anchor_ratios",
    }
)
_MAY_BE_NULL = {"model.rpn.sample": "all", "model.roi.sample": "all", "model.roi.max_rois": "no limit"}


def rules(config: Any) -> Iterator[tuple[bool, str]]:
    """(is it broken, what to say then) of every rule.

    Args:
        config: a `config.Config`.
    """
    model, train, augment = config.model, config.train, config.data.augment
    for name, value in leaves(config):
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float))]
        least = 1 if name in _AT_LEAST_ONE.split() else 0
        null = f", or null: {_MAY_BE_NULL[name]}" if name in _MAY_BE_NULL else ""
        yield any(v < least for v in numbers), f"{name}={value} must be at least {least}{null}"
        yield name in _POSITIVE and any(v <= 0 for v in numbers), f"{name}={value} must be above 0"
        yield name in _NOT_EMPTY and value == (), f"{name} needs at least one entry"
    for name, value in (("data.augment.flip", augment.flip), ("model.rpn.nms_iou", model.rpn.nms_iou)):
        yield value > 1, f"{name}={value} must lie between 0 and 1"
    data = config.data
    yield (
        (data.timeout or math.inf) <= data.retry_seconds,
        f"data.timeout={data.timeout} must be above data.retry_seconds={data.retry_seconds}",
    )
    yield any(b >= 1 for b in config.optim.betas), f"optim.betas={list(config.optim.betas)} must be below 1"
    yield model.dim % model.heads != 0, f"model.dim={model.dim} must be a multiple of model.heads={model.heads}"
    groups = f"model.dim={model.dim} must be a multiple of model.norm_groups={model.norm_groups}, and larger"
    yield model.dim % model.norm_groups != 0 or model.dim == model.norm_groups, groups
    yield model.dim % 4 != 0, f"model.dim={model.dim} must be a multiple of 4 (sine and cosine of x and y)"
    strides = model.backbone.levels
    yield model.levels < len(strides), f"model.levels={model.levels} is less than the {len(strides)} backbone levels"
    yield list(strides) != sorted(set(strides)), f"model.backbone.levels={list(strides)} must be strides that increase"
    yield (
        augment.crop_min > augment.crop_max,
        (f"data.augment.crop_min={augment.crop_min} is above data.augment.crop_max={augment.crop_max}"),
    )
    steps = train.lr_steps
    yield list(steps) != sorted(set(steps)), f"train.lr_steps={list(steps)} must increase"
    yield (
        train.schedule == "step" and any(s >= train.epochs for s in steps),
        (
            f"train.lr_steps={list(steps)} must lie before the end, train.epochs={train.epochs}; "
            "shift them, or write train.lr_steps=[]"
        ),
    )
    yield (
        train.schedule == "step" and train.steps is not None and steps != (),
        f"train.lr_steps={list(steps)} are epochs, train.steps={train.steps} leaves none; set train.schedule=cosine",
    )
    yield (train.ema_decay or 0) >= 1, f"train.ema_decay={train.ema_decay} must be below 1"
    yield (
        model.name == "co_detr" and model.loss not in ("focal", "quality_focal"),
        (f"model.name=co_detr is the detector with score-based losses; model.loss={model.loss} makes it brs_detr"),
    )
    yield (
        model.atss.centerness and model.loss not in ("focal", "quality_focal"),
        (f"model.atss.centerness=true needs model.loss=focal; model.loss={model.loss} ranks by quality instead"),
    )
