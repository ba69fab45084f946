"""From section `data` of a recipe to datasets and their transforms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from brs_detr.data.coco import CocoDetection
from brs_detr.data.config import DataConfig, SSDConfig
from brs_detr.data.custom_augment import CustomTransform
from brs_detr.data.presets import PRESETS, PresetTransforms
from brs_detr.data.ssd_transforms import SSDTransforms
from brs_detr.data.transforms import EvalTransforms, MultiScaleTransforms, TrainTransforms


def build_train_transforms(config: DataConfig) -> TrainTransforms | SSDTransforms | PresetTransforms:
    """Build the training augmentation: the policy of the recipe, with the preset and the user's own around it.

    Raises:
        CustomAugmentError: `data.augment.custom` cannot be imported.
    """
    policy, augment = _build_policy(config), config.augment
    if augment.preset == "none" and augment.custom is None:
        return policy
    custom = None if augment.custom is None else CustomTransform(augment.custom)
    return PresetTransforms(policy, PRESETS[augment.preset], custom)


def _build_policy(config: DataConfig) -> TrainTransforms | SSDTransforms:
    augment = config.augment
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
            `test_square`; with several, an image is resized to each.
    """
    resizing = [_resizing(config, scale) for scale in scales or (config.test_square or config.test_short_side,)]
    return resizing[0] if len(resizing) == 1 else MultiScaleTransforms(resizing)


def _resizing(config: DataConfig, side: int) -> EvalTransforms:
    """Build the resizing to one scale; the limit of the long side is in proportion to the short side."""
    long_side = round(config.test_long_side * side / config.test_short_side)
    size = None if config.test_square is None else (side, side)
    return EvalTransforms(side, long_side, config.antialias, size=size)


def open_train_set(config: DataConfig, seed: int, masks: bool = False) -> CocoDetection:
    """Open the training set with its augmentation, and with instance masks if they are wanted.

    Raises:
        DataError: there is nothing to train on.
    """
    return CocoDetection(
        Path(config.root, config.train_json),
        Path(config.root, config.train_images),
        transforms=build_train_transforms(config),
        train=True,
        keep_empty=config.keep_empty,
        min_side=config.min_side,
        seed=seed,
        limits=config,
        retry_seconds=config.retry_seconds,
        masks=masks,
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
