"""From section `data` of a recipe to datasets and their transforms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from brs_detr.data.coco import CocoDetection
from brs_detr.data.config import DataConfig, LSJConfig, SSDConfig
from brs_detr.data.custom_augment import CustomTransform
from brs_detr.data.lsj_transforms import LSJTransforms
from brs_detr.data.presets import PRESETS, PresetTransforms
from brs_detr.data.ssd_transforms import SSDTransforms
from brs_detr.data.transforms import EvalTransforms, MultiScaleTransforms, TrainTransforms

Policy = TrainTransforms | SSDTransforms | LSJTransforms


def build_train_transforms(config: DataConfig, masks: bool = True) -> Policy | PresetTransforms:
    """Build the training augmentation: the policy of the recipe, with the preset and the user's own around it.

    Args:
        config: section `data`.
        masks: False where the detector has no use for masks, though the augmentation may have.

    Raises:
        CustomAugmentError: `data.augment.custom` cannot be imported.
    """
    policy, augment = _build_policy(config, masks), config.augment
    if augment.preset == "none" and augment.custom is None:
        return policy
    custom = None if augment.custom is None else CustomTransform(augment.custom)
    return PresetTransforms(policy, PRESETS[augment.preset], custom)


def masks_to_read(config: DataConfig, masks: bool) -> bool | Literal["optional"]:
    """Return the argument `masks` of a training set: copy-paste reads them where there are any.

    Args:
        config: section `data`.
        masks: whether the detector needs them.
    """
    return masks or ("optional" if isinstance(config.augment, LSJConfig) and config.augment.max_pasted else False)


def _build_policy(config: DataConfig, masks: bool) -> Policy:
    augment = config.augment
    if isinstance(augment, LSJConfig):
        return LSJTransforms(
            size=augment.size,
            scales=(augment.min_scale, augment.max_scale),
            flip=augment.flip,
            max_pasted=augment.max_pasted,
            keep_masks=masks,
            antialias=config.antialias,
        )
    if isinstance(augment, SSDConfig):
        return SSDTransforms(
            size=(augment.size, augment.size),
            max_expand=augment.max_expand,
            crop_ious=augment.crop_ious,
            flip=augment.flip,
            antialias=config.antialias,
        )
    return TrainTransforms(
        short_sides=augment.short_sides,
        long_side=augment.long_side,
        crop_short_sides=augment.crop_short_sides,
        crop_long_side=augment.crop_long_side,
        crop_size=(augment.crop_min, augment.crop_max),
        crop=0.5 if augment.crop_policy else 0.0,  # DETR crops every other image before it resizes
        flip=augment.flip,
        antialias=config.antialias,
    )


def build_eval_transforms(config: DataConfig, scales: Sequence[int] = ()) -> EvalTransforms | MultiScaleTransforms:
    """Build the test resizing.

    Args:
        config: section `data`.
        scales: short sides in pixels to resize to instead of `test_short_side`, or sides of squares instead of
            `test_square` or `test_canvas`; with several, an image is resized to each.
    """
    own = config.test_square or config.test_canvas or config.test_short_side
    resizing = [_resizing(config, scale) for scale in scales or (own,)]
    return resizing[0] if len(resizing) == 1 else MultiScaleTransforms(resizing)


def _resizing(config: DataConfig, side: int) -> EvalTransforms:
    """Build the resizing to one scale; the limit of the long side is in proportion to the short side."""
    long_side = round(config.test_long_side * side / config.test_short_side)
    size = None if config.test_square is None else (side, side)
    canvas = None if config.test_canvas is None else side
    return EvalTransforms(side, long_side, config.antialias, size=size, canvas=canvas)


def open_train_set(config: DataConfig, seed: int, masks: bool = False) -> CocoDetection:
    """Open the training set with its augmentation, and with instance masks if they are wanted.

    Raises:
        DataError: there is nothing to train on.
    """
    return CocoDetection(
        Path(config.root, config.train_json),
        Path(config.root, config.train_images),
        transforms=build_train_transforms(config, masks),
        train=True,
        keep_empty=config.keep_empty,
        min_side=config.min_side,
        seed=seed,
        limits=config,
        retry_seconds=config.retry_seconds,
        masks=masks_to_read(config, masks),
    )


def open_val_set(config: DataConfig, masks: bool = False, scales: Sequence[int] = ()) -> CocoDetection:
    """Open the validation set with its test resizing, and with instance masks if they are wanted.

    `scales` are those of `build_eval_transforms`.

    Raises:
        DataError: there is nothing to evaluate on.
    """
    return CocoDetection(
        Path(config.root, config.val_json),
        Path(config.root, config.val_images),
        transforms=build_eval_transforms(config, scales),
        train=False,
        limits=config,
        retry_seconds=config.retry_seconds,
        masks=masks,
    )
