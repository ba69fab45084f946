"""The anchors of a detector's heads, and `model.anchors=auto`: their scales chosen from the boxes of the training set.

They are chosen once, when a training begins, and from then on are settings like any other: the run's config, its states
and its weights hold the numbers, so evaluation, prediction, export and a resumed run need no dataset for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from brs_detr.config import Config, ConfigError, from_dict
from brs_detr.data.anchor_fit import (
    AnchorLayout,
    Boxes,
    Fit,
    at_training_size,
    best_scale,
    boxes_of,
    class_shares,
    side_lengths,
)
from brs_detr.data.config import AugmentConfig, DataConfig
from brs_detr.models.config import ATSSHeadConfig, DenseHeadConfig, DETRConfig, RPNConfig
from brs_detr.models.model_config import ModelConfig
from brs_detr.models.neck import pyramid_strides
from brs_detr.models.one_stage_config import PAAHeadConfig, YOLACTHeadConfig
from brs_detr.run.dataset import TrainSet
from brs_detr.run.weights import locate, read
from brs_detr.user_files import printable

FEW = 0.5  # share of the objects with an anchor at IoU .5 below which a training is not expected to find them
SHOWN = 3  # classes that a warning names
TINY, VISIBLE = 8, 12  # pixels: under the first no anchors help, and from the second on those of stride 4 fit
SMALLEST_TILE = 64  # pixels; of images cut smaller than this too little is seen around an object


def layouts(model: ModelConfig) -> dict[str, AnchorLayout]:
    """Return the anchors of each head of a detector by the name of its section; empty for one without anchors."""
    strides = pyramid_strides(model.backbone.levels, model.levels + isinstance(model, DETRConfig))
    found = {}
    for name in model.dense_heads if isinstance(model, DETRConfig) else ("rpn", "head"):
        head = getattr(model, name, None)
        if isinstance(head, YOLACTHeadConfig):
            found[name] = AnchorLayout(strides, head.anchor_scale, 1, head.anchor_ratios, offset=0.5, even=True)
        elif isinstance(head, (RPNConfig, DenseHeadConfig)):
            found[name] = AnchorLayout(
                strides,
                head.anchor_scale,
                head.scales_per_octave,
                head.anchor_ratios,
                border=head.allowed_border if isinstance(head, RPNConfig) else None,
                adaptive=isinstance(head, (ATSSHeadConfig, PAAHeadConfig)),
            )
    return found


def scales_of(model: ModelConfig) -> dict[str, float]:
    """Return the `anchor_scale` of each head by the name of its section."""
    return {name: layout.scale for name, layout in layouts(model).items()}


def with_scales(model: ModelConfig, scales: Mapping[str, float]) -> ModelConfig:
    """Return the settings with fixed anchors of the given scales, for the heads that it has."""
    own = layouts(model)
    heads: dict[str, Any] = {
        name: replace(getattr(model, name), anchor_scale=scale) for name, scale in scales.items() if name in own
    }
    return replace(model, **{"anchors": "fixed", **heads}) if own else model


def fit_heads(model: ModelConfig, boxes: Boxes) -> dict[str, tuple[AnchorLayout, Fit]]:
    """Choose the scale of each head for boxes at their training size: its anchors with it, and how they fit."""
    return {name: best_scale(boxes, layout) for name, layout in layouts(model).items()}


def warn_of_misfit(
    data: DataConfig, stored: Boxes, head: tuple[AnchorLayout, Fit], names: Mapping[int, str]
) -> list[str]:
    """Return a warning if objects are too small at their training size, or fitted by too few anchors; else nothing.

    Args:
        data: how images are resized.
        stored: objects of the training set at the size of their images.
        head: anchors of the first head, of several the one that makes the proposals, and how they fit.
        names: of the classes by label.
    """
    if not len(stored.boxes):
        return []
    boxes, (layout, reached) = at_training_size(stored, data), head
    median = float(side_lengths(boxes).median())
    found = f"{reached.at_50:.0%} have an anchor at IoU >= .5"
    if median < TINY or (median < VISIBLE and reached.at_50 < FEW):
        small = f"half are under {math.ceil(median)} pixels at the size of training, and {found}"
        return [f"warning: objects: {small}: so small ones are seldom found. {_what_shows_them(data, stored)}"]
    found = f"only {found}" if reached.at_50 < FEW else _classes_without(boxes, layout, names)
    return [f"warning: objects: {found}. Look with `check-data RECIPE` for settings that fit more."] if found else []


def _classes_without(boxes: Boxes, layout: AnchorLayout, names: Mapping[int, str]) -> str:
    """Name the classes of which few objects have an anchor; empty if there are none, or if positives are adaptive."""
    if layout.adaptive:
        return ""
    labels, shares = class_shares(boxes, layout)
    few = sorted(
        (share, label) for share, label in zip(shares[:, 0].tolist(), labels.tolist(), strict=True) if share < FEW
    )
    named = ", ".join(f"{share:.0%} of {names.get(label, f'class {label}')}" for share, label in few[:SHOWN])
    more = f", ... ({len(few):,} classes)" if len(few) > SHOWN else ""
    return printable(f"only {named}{more} have an anchor at IoU >= .5") if few else ""


def _what_shows_them(data: DataConfig, stored: Boxes) -> str:
    """Say how large images, or tiles of them, have to be for objects that are trained on too small."""
    enlarge = VISIBLE / float(side_lengths(stored).median())
    height, width = (enlarge * stored.sizes.median(dim=0).values).tolist()
    whole = (
        f"on images of {width:.0f}x{height:.0f} pixels (sizes of section data) with maps from stride 4, where the "
        f"median object has {VISIBLE} pixels."
    )
    seen = data.test_short_side if isinstance(data.augment, AugmentConfig) else data.augment.size
    tile = int(seen / enlarge)
    if not SMALLEST_TILE <= tile < stored.sizes.max():
        return f"Train {whole}"
    tiles = f"tiles of at most {tile} pixels and predict with --tiles {tile}"
    return f"Cut images and annotations into {tiles}, or train {whole}"


def is_automatic(config: Config) -> bool:
    """Check whether the anchors have yet to be chosen."""
    return getattr(config.model, "anchors", "fixed") == "auto"


def choose_anchors(
    config: Config, metadata: Mapping[str, Any] | None, accelerator: Accelerator, train_set: TrainSet
) -> tuple[Config, list[str]]:
    """Replace `model.anchors=auto` by numbers.

    A resumed run takes those that it began with, and one that starts from other weights those that they were trained
    with, if they are of the same detector. Else they are chosen from the training set, by the main process alone: other
    processors round differently, and all have to build the same detector.

    Args:
        config: of the run.
        metadata: of the state to resume from; None for a fresh start.
        accelerator: of the launch.
        train_set: opens the training set.

    Returns:
        The config, unchanged if its anchors are fixed, and lines for the log.

    Raises:
        DataError: there is nothing to train on.
        CheckpointError: the weights to start from cannot be read.
    """
    if not is_automatic(config):
        return config, []
    if metadata is not None:
        source, model = "the resumed run", from_dict(metadata["config"], "the state to resume from").model
        return _taken_over(config, model, source)
    if config.train.init_from is not None:
        file = locate(config.train.init_from)
        model = from_dict(read(file, names_required=False).config, str(file)).model
        if model.name == config.model.name:
            return _taken_over(config, model, str(file))
    chosen: list[Any] = [None]
    if accelerator.is_main_process:
        dataset = train_set(config)
        stored = boxes_of(dataset.packed)
        heads = fit_heads(config.model, at_training_size(stored, config.data))
        warning = warn_of_misfit(config.data, stored, next(iter(heads.values())), dict(enumerate(dataset.classes)))
        numbers = {name: (layout.scale, tuple(fit)) for name, (layout, fit) in heads.items()}
        chosen = [numbers, dataset.report["objects"], warning]
    heads, count, warning = broadcast_object_list([chosen])[0]
    shown = ", ".join(
        f"model.{name}.anchor_scale={scale:g} (IoU >= .5 for {at_50:.0%} of the objects, >= .7 for {at_70:.0%})"
        for name, (scale, (at_50, at_70)) in heads.items()
    )
    model = with_scales(config.model, {name: scale for name, (scale, _) in heads.items()})
    return replace(config, model=model), [f"anchors chosen from {count:,} objects: {shown}", *warning]


def _taken_over(config: Config, model: ModelConfig, source: str) -> tuple[Config, list[str]]:
    """Take the scales of other settings of a detector."""
    scales = scales_of(model)
    shown = ", ".join(f"model.{name}.anchor_scale={scale:g}" for name, scale in scales.items())
    return replace(config, model=with_scales(config.model, scales)), [f"anchors of {source}: {shown}"]


def require_chosen_anchors(config: Config, file: Path) -> None:
    """Refuse `model.anchors=auto` for the weights of a file: their anchors have been chosen.

    Raises:
        ConfigError: naming the setting.
    """
    if is_automatic(config):
        raise ConfigError(
            f"model.anchors=auto: anchors are chosen when a training begins, and {file} holds its own. Leave it out."
        )
