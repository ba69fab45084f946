"""How well a recipe's anchors fit the boxes of a dataset, and what would fit better: lines that `check-data` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from brs_detr.config import Config
from brs_detr.config_io import problems
from brs_detr.data.anchor_fit import Boxes, Fit, at_training_size, fit, side_lengths
from brs_detr.data.config import AugmentConfig, DataConfig, LSJConfig, SSDConfig
from brs_detr.run.anchors import FEW, fit_heads, is_automatic, layouts, warn_of_misfit

WORTH_SAYING = 0.02  # gain in the share at IoU .5, or in the mean of both, from which another setting is proposed


def describe_anchors(config: Config, stored: Boxes, names: Mapping[int, str] | None = None) -> str:
    """Describe the fit of every head's anchors, and the settings that raise it most.

    Args:
        config: of the recipe.
        stored: objects of the training set at the size of their images.
        names: of the classes by label, to begin with a warning where too few objects are fitted; None: without it.
    """
    heads = layouts(config.model)
    if not heads:
        return f"anchors: {config.model.name} has none"
    boxes = at_training_size(stored, config.data)
    at = f"anchors at the training resolution ({training_size(config.data)})"
    lines = [f"{at}, {describe_sides(boxes)}; shares are means over the classes:"]
    now = {name: fit(boxes, layout) for name, layout in heads.items()}
    for name, (at_50, at_70) in now.items():
        shares = f"{at_50:.1%} of the objects have an anchor at IoU >= .5, {at_70:.1%} at IoU >= .7"
        lines.append(f"  model.{name}.anchor_scale={heads[name].scale:g}: {shares}")
    chosen = fit_heads(config.model, boxes)
    better = "; ".join(_with_scale(name, layout.scale, best) for name, (layout, best) in chosen.items())
    if is_automatic(config):
        lines.append(f"  model.anchors=auto (in this recipe) sets {better}")
    elif max(_gain(now[name], best) for name, (_, best) in chosen.items()) >= WORTH_SAYING:
        lines.append(f"  model.anchors=auto fits more: {better}")
    else:
        lines.append("  no other scale fits clearly better")
    first = chosen[next(iter(heads))]
    warning = [] if names is None else warn_of_misfit(config.data, stored, first, names)
    return "\n".join([*warning, *lines, *further_settings(config, stored, first[1])])


def further_settings(config: Config, stored: Boxes, reached: Fit) -> Iterator[str]:
    """Yield a line on the one of finer maps, own ratios and larger images with which the first head's anchors fit best.

    Args:
        config: of the recipe.
        stored: objects of the training set at the size of their images.
        reached: the fit of the first head with the best scale.
    """
    options = {}
    if (finer := with_finer_maps(config)) is not None:
        options[f"model.backbone.levels={list(finer.model.backbone.levels)}"] = finer
    if len(stored.boxes) and reached.at_50 < FEW:
        shaped = with_own_ratios(config, stored)
        name, layout = next(iter(layouts(shaped.model).items()))
        options[f"model.{name}.anchor_ratios={list(layout.ratios)}"] = shaped
    options["images 1.5 times as large (all sizes of section data)"] = with_sizes(config, 1.5)
    fits = {}
    for text, changed in options.items():
        name, (layout, best) = next(iter(fit_heads(changed.model, at_training_size(stored, changed.data)).items()))
        fits[text] = (best, _with_scale(name, layout.scale, best))
    text = max(fits, key=lambda text: fits[text][0].at_50)
    if fits[text][0].at_50 - reached.at_50 >= WORTH_SAYING:
        yield f"  with {text} and model.anchors=auto: {fits[text][1]}"


def _gain(before: Fit, after: Fit) -> float:
    """Return the larger of the gains in the share at IoU .5 and in the mean of both."""
    return max(after.at_50 - before.at_50, after.both - before.both)


def _with_scale(name: str, scale: float, fitted: Fit) -> str:
    return f"model.{name}.anchor_scale={scale:g}: {fitted.at_50:.1%}, {fitted.at_70:.1%}"


def training_size(data: DataConfig) -> str:
    """Format the sizes that images are trained at."""
    if isinstance(data.augment, SSDConfig):
        return f"{data.augment.size}x{data.augment.size} pixels"
    if isinstance(data.augment, LSJConfig):
        low, high, side = data.augment.min_scale, data.augment.max_scale, data.augment.size
        return f"a canvas of {side}x{side} pixels, into which they fit at 1, times {low:g} to {high:g}"
    low, high = min(data.augment.short_sides), max(data.augment.short_sides)
    return f"short side {low} to {high} pixels" if low < high else f"short side {low} pixels"


def describe_sides(boxes: Boxes) -> str:
    """Format how large objects are."""
    sides = side_lengths(boxes)
    low, high = (float(sides.quantile(share)) if len(sides) else 0.0 for share in (0.1, 0.9))
    return f"objects of {low:.0f} to {high:.0f} pixels (square root of the area, 10th to 90th percentile)"


def with_own_ratios(config: Config, stored: Boxes) -> Config:
    """Return the config with ratios of the first head's anchors that are those of the objects: 10th to 90th percentile.

    Elongated objects have no anchor at IoU .5 among ratios of 1:2 to 2:1, however large they are.
    """
    name = next(iter(layouts(config.model)))
    boxes = at_training_size(stored, config.data).boxes
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3)
    found = (sides[:, 1] / sides[:, 0]).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    ratios = tuple(sorted({float(f"{ratio:.2g}") for ratio in found}))
    head = replace(getattr(config.model, name), anchor_ratios=ratios)
    return replace(config, model=replace(config.model, **{name: head}))


def with_finer_maps(config: Config) -> Config | None:
    """Return the config with a map of half the finest stride, in place of the coarsest where there would be too many.

    None where the finest map is that of stride 4: no backbone has finer ones after its stem.
    """
    model = config.model
    levels = model.backbone.levels
    if levels[0] <= 4:
        return None
    finer = (levels[0] // 2, *levels)[: model.levels]
    changed: Any = replace(model, backbone=replace(model.backbone, levels=finer))
    result = replace(config, model=changed)
    return None if next(problems(result), None) else result


def with_sizes(config: Config, factor: float) -> Config:
    """Return the config with all image sizes of training and evaluation multiplied."""
    data = config.data

    def times(side: int) -> int:
        return max(1, round(side * factor))

    if isinstance(data.augment, AugmentConfig):
        sides = tuple(map(times, data.augment.short_sides))
        augment: AugmentConfig | SSDConfig | LSJConfig = replace(
            data.augment, short_sides=sides, long_side=times(data.augment.long_side)
        )
    else:
        augment = replace(data.augment, size=times(data.augment.size))
    square, canvas = (None if side is None else times(side) for side in (data.test_square, data.test_canvas))
    short, long = times(data.test_short_side), times(data.test_long_side)
    limits = replace(data, test_short_side=short, test_long_side=long)
    return replace(config, data=replace(limits, augment=augment, test_square=square, test_canvas=canvas))
