"""Which recipe to start from on this machine with this dataset, and why: what `convert-dataset` and `check-data` print.

The choice depends on what is there: a GPU, pretrained weights in timm's cache or a network that has them, and the
number of images. Image size, strides and anchors are proposed from the boxes.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import yaml

from brs_detr.commands.anchor_report import (
    describe_anchors,
    describe_sides,
    with_finer_maps,
    with_own_ratios,
    with_sizes,
)
from brs_detr.config import Config, load_config
from brs_detr.config_io import leaves
from brs_detr.data.anchor_fit import AnchorLayout, Boxes, Fit, at_training_size, resized_sizes
from brs_detr.models.backbones.availability import where_weights_are
from brs_detr.models.config import DETRConfig
from brs_detr.run.anchors import FEW, fit_heads, is_automatic, warn_of_misfit
from brs_detr.user_files import printable

SMALL, SMALL_CPU, LARGE = "brs_detr_small", "brs_detr_small_cpu", "brs_detr_r50_12e_coco"
MANY_IMAGES = 10_000  # from here on twelve epochs are more steps than `SMALL` has
ENOUGH = 0.9  # share of the objects with an anchor at IoU .5 from which nothing costlier is looked for
# settings that limit the objects of an image
_PER_IMAGE = (
    "model.queries",
    "model.max_aux_queries",
    "model.detections_per_image",
    "model.rpn.proposals_before_nms",
    "model.rpn.proposals",
    "model.rpn.test_proposals_before_nms",
    "model.rpn.test_proposals",
    "model.roi.max_detections",
    "model.atss.max_detections",
    "eval.max_detections",
)
MOST = 500  # objects of an image that limits are raised to: every image pays for its queries and regions
FULL = 0.99  # share of the images that limits have room for
MUCH = 2  # times the cells of the recipe from which the cost of a proposal is said
WORTH_IT = 0.1  # gain in that share from which a costlier proposal replaces a cheaper one


class Surroundings(NamedTuple):
    """What is there: the name of the first GPU or None, and where the weights of `SMALL`'s backbone are or None."""

    gpu: str | None
    weights: str | None


class Dataset(NamedTuple):
    """What is known of a training set.

    Attributes:
        boxes: its objects at the size of their images.
        images: their number.
        counts: objects of each image by its file name, without crowds.
        paths: settings of section `data` that name it; without a validation set the command has capitals to replace.
        names: of its classes by label.
    """

    boxes: Boxes
    images: int
    counts: Mapping[str, int]
    paths: Mapping[str, object]
    names: Mapping[int, str] = MappingProxyType({})


def look_around() -> Surroundings:
    """Look for a GPU and, if there is one, for pretrained weights; takes two seconds where no network answers."""
    if not torch.cuda.is_available():
        return Surroundings(None, None)
    return Surroundings(torch.cuda.get_device_name(0), where_weights_are(load_config(SMALL).model.backbone.name))


def choose_recipe(images: int, here: Surroundings) -> tuple[str, str]:
    """Choose a recipe for so many images, and say why: (name, reason)."""
    if here.gpu is None:
        return SMALL_CPU, "no GPU was found"
    backbone = load_config(SMALL).model.backbone.name
    if here.weights is None:
        return SMALL_CPU, (
            f"there is a GPU ({here.gpu}), but the pretrained weights of {backbone} are neither in timm's cache nor "
            f"within reach of the network; with a file of them: {SMALL} model.backbone.checkpoint=FILE"
        )
    place = "in timm's cache" if here.weights == "cache" else "downloaded once"
    if images >= MANY_IMAGES:
        return LARGE, f"there are a GPU ({here.gpu}), pretrained weights ({place}) and enough images for its epochs"
    return SMALL, f"there are a GPU ({here.gpu}) and pretrained weights ({place})"


def first_recipe(dataset: Dataset, here: Surroundings | None = None) -> str:
    """Format the recipe to start from, why, what is proposed from the boxes, and the command line that trains it.

    Args:
        dataset: to train on.
        here: what is there; None: look.
    """
    name, reason = choose_recipe(dataset.images, look_around() if here is None else here)
    recipe = load_config(name)
    config = recipe if name == LARGE else propose(recipe, dataset.boxes)
    room = _room_for(config, dataset.counts)
    changed, cost = dict(_differences(recipe, config)) | room, _cost(recipe, config)
    if cost >= MUCH and config.train.per_device_batch_size is not None:  # as many images may not fit into a GPU
        changed["train.per_device_batch_size"] = "auto"
    fits = fit_heads(config.model, at_training_size(dataset.boxes, config.data))
    lines = [
        *warn_of_misfit(config.data, dataset.boxes, next(iter(fits.values())), dataset.names),  # of the RPN
        f"start from configs/{name}.yaml: {reason}",
        f"{dataset.images:,} images: {describe_length(config, dataset.images)}",
        *_describe_room(config, dataset.counts, room),
        *_describe_boxes(config, dataset.boxes, fits),
        *_describe_cost(cost),
    ]
    settings = {**dataset.paths, **changed, "output_dir": "runs/mine"}
    words = [f"{key}={as_yaml(value)}" for key, value in settings.items()]
    lines.append(printable(shlex.join(["python", "-m", "brs_detr", "train", name, *words])))
    return "\n".join(lines)


def propose(recipe: Config, stored: Boxes) -> Config:
    """Adapt image size and strides of a recipe to the objects: the cheapest with which anchors fit most of them.

    Images are made no larger than they are stored before finer maps have been tried, then 1.5 times as large, and small
    ones doubled from there on up to the recipe's size. Where no proposal reaches `ENOUGH`, a costlier one counts if it
    fits clearly better. Where few objects have an anchor all the same, the RPN's anchors get the shapes of the objects.
    """
    config, reached = _cheapest(recipe, stored)
    if len(stored.boxes) and reached.at_50 < FEW:
        shaped, better = _cheapest(with_own_ratios(recipe, stored), stored)
        if better.at_50 >= reached.at_50 + WORTH_IT:
            return shaped
    return config


def _cheapest(recipe: Config, stored: Boxes) -> tuple[Config, Fit]:
    """Return the proposal for the ratios of a recipe's anchors, and the fit of those of the RPN."""
    chosen, best = None, Fit(0.0, 0.0)
    for config in _by_cost(recipe, stored):
        fits = fit_heads(config.model, at_training_size(stored, config.data))
        fitted = next(iter(fits.values()))[1]  # of the RPN: the ATSS head's single anchor fits fewer
        if chosen is None or fitted.at_50 >= best.at_50 + WORTH_IT:
            chosen, best = config, fitted
        if fitted.at_50 >= ENOUGH:
            break
    assert chosen is not None
    return chosen, best


def _by_cost(recipe: Config, stored: Boxes) -> Iterator[Config]:
    """Yield a recipe at rising costs: with images as they are or smaller, with finer maps, with larger images."""
    smaller = min(1.0, _as_stored(recipe, stored))
    factors = [smaller, 1.5 * smaller]
    while factors[-1] < 1:  # small images: what the recipe's own size costs is affordable
        factors.append(min(1.0, 2 * factors[-1]))
    for factor in factors:
        sized = recipe if factor == 1 else with_sizes(recipe, factor)
        if factor == smaller:
            yield sized
        finer = with_finer_maps(sized)
        yield sized if finer is None else finer


def _as_stored(recipe: Config, stored: Boxes) -> float:
    """Return the factor for the sizes of a recipe with which half of the objects are no longer in enlarged images."""
    if not len(stored.sizes):
        return 1.0
    short, long = stored.sizes.amin(dim=1), stored.sizes.amax(dim=1)
    # of wide images the limit of the long side decides: the factor is where neither limit lets them grow
    return float(torch.maximum(short / recipe.data.test_short_side, long / recipe.data.test_long_side).median())


def _differences(recipe: Config, config: Config) -> Iterator[tuple[str, object]]:
    """Yield (name, value) of each setting in which a proposal differs from its recipe."""
    before = dict(leaves(recipe))
    yield from ((name, value) for name, value in leaves(config) if before[name] != value)


def _room_for(config: Config, counts: Mapping[str, int]) -> dict[str, int]:
    """Return settings for images with more objects than the recipe can propose, detect and count."""
    if not isinstance(config.model, DETRConfig) or not counts:
        return {}
    full = sorted(counts.values())[math.ceil(FULL * (len(counts) - 1))]
    room = min(MOST, math.ceil(full / 50) * 50)
    settings = dict(leaves(config))
    return {name: room for name in _PER_IMAGE if settings[name] < min(full, MOST)}


def _describe_room(config: Config, counts: Mapping[str, int], room: Mapping[str, int]) -> Iterator[str]:
    """Yield a line on the limits that are raised, and on the images with more objects than they have room for."""
    settings = {**dict(leaves(config)), **room}
    limit = min((settings[name] for name in _PER_IMAGE if name in settings), default=0)
    fullest = max(counts.values(), default=0)
    above = [name for name in sorted(counts, key=lambda name: -counts[name]) if counts[name] > limit]
    parts = [f"up to {fullest:,} objects an image"]
    if room:
        parts.append(f"limits are raised to {limit}")
    if above:
        shown = ", ".join(f"{name} ({counts[name]:,})" for name in above[:3]) + (", ..." if len(above) > 3 else "")
        parts.append(f"{len(above):,} with more than {limit} cannot be found completely: {shown}")
    if room or above:
        yield printable("; ".join(parts))


def describe_length(config: Config, images: int) -> str:
    """Format how long a recipe trains on so many images."""
    train = config.train
    an_epoch = max(1, math.ceil(images / train.total_batch_size))
    epochs = train.epochs if train.steps is None else math.ceil(train.steps / an_epoch)
    plural = "epoch" if epochs == 1 else "epochs"
    return f"{epochs * an_epoch:,} steps of {train.total_batch_size} images are {epochs:,} {plural}"


def _describe_boxes(config: Config, stored: Boxes, fits: Mapping[str, tuple[AnchorLayout, Fit]]) -> Iterator[str]:
    """Yield lines on the objects at the size they are trained at, and on the anchors chosen for them."""
    boxes = at_training_size(stored, config.data)
    if not len(boxes.boxes):
        return
    sizes = resized_sizes(stored.sizes, config.data.test_short_side, config.data.test_long_side)
    short, strides = float(sizes.amin(dim=1).median()), ", ".join(map(str, config.model.backbone.levels))
    yield f"at a short side of {short:.0f} pixels: {describe_sides(boxes)}; strides {strides}"
    if is_automatic(config):
        shown = ", ".join(
            f"{fitted.at_50:.0%} and {fitted.at_70:.0%} ({name}, anchor_scale {layout.scale:g})"
            for name, (layout, fitted) in fits.items()
        )
        of = "share of the objects" if len(boxes.labels.unique()) == 1 else "mean over classes of the share of objects"
        yield f"anchors are chosen from them; {of} with one at IoU >= .5 and at >= .7: {shown}"
    else:  # of `LARGE`, whose sizes and anchors are the paper's: what would fit better is left to choose
        yield describe_anchors(config, stored)  # that line comes first


def _cost(recipe: Config, config: Config) -> float:
    """Return how many times as many cells as the recipe's the proposed maps have."""
    before, after = (
        sum((settings.data.test_short_side / stride) ** 2 for stride in settings.model.backbone.levels)
        for settings in (recipe, config)
    )
    return after / before


def _describe_cost(cost: float) -> Iterator[str]:
    """Yield a line on what the proposed image size and strides cost, where that is much."""
    if cost >= MUCH:
        yield (
            f"the maps have {cost:.0f} times as many cells as the recipe's, and take longer and more memory; for its "
            "own sizes, leave out model.backbone.levels and those of section data"
        )


def as_yaml(value: object) -> str:
    """Write a value for the command line of train.py, which parses values as YAML; strings quoted where necessary."""
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        plain = yaml.safe_load(value) == value
    except yaml.YAMLError:
        plain = False
    return value if plain else json.dumps(value)
