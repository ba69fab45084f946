"""From section `data` of a recipe to datasets and their transforms."""

from __future__ import annotations

from pathlib import Path

from brs_detr.data.coco import CocoDetection
from brs_detr.data.config import DataConfig, SSDConfig
from brs_detr.data.custom_augment import CustomTransform
from brs_detr.data.presets import PRESETS, PresetTransforms
from brs_detr.data.ssd_transforms import SSDTransforms
from brs_detr.data.transforms import EvalTransforms, TrainTransforms


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


def build_eval_transforms(config: DataConfig) -> EvalTransforms:
    """Build the test resizing."""
    size = None if config.test_square is None else (config.test_square, config.test_square)
    return EvalTransforms(config.test_short_side, config.test_long_side, config.antialias, size=size)


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


def open_val_set(config: DataConfig, masks: bool = False) -> CocoDetection:
    """Open the validation set with its test resizing, and with instance masks if they are wanted.

    Raises:
        DataError: there is nothing to evaluate on.
    """
    return CocoDetection(
        Path(config.root, config.val_json),
        Path(config.root, config.val_images),
        transforms=build_eval_transforms(config),
        train=False,
        limits=config,
        retry_seconds=config.retry_seconds,
        masks=masks,
    )
