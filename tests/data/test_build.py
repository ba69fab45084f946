"""Every setting of the augmentation reaches the transforms that are built from it."""

from dataclasses import fields, replace

import pytest
import torch

from brs_detr.data.build import build_eval_transforms, build_train_transforms
from brs_detr.data.config import AugmentConfig, DataConfig, LSJConfig, SSDConfig

ELSEWHERE = {"name", "preset", "custom"}  # tests/data/test_presets.py and test_custom_augment.py


@pytest.mark.parametrize(
    ("augment", "changes"),
    [
        (
            AugmentConfig(),
            {
                "short_sides": ("short_sides", (64, 96)),
                "long_side": ("long_side", 77),
                "crop_policy": ("crop", False, 0.0),
                "crop_short_sides": ("crop_short_sides", (55,)),
                "crop_long_side": ("crop_long_side", 88),
                "crop_min": ("crop_size", 33, (33, 600)),
                "crop_max": ("crop_size", 444, (384, 444)),
                "flip": ("flip", 0.25),
            },
        ),
        (
            SSDConfig(),
            {
                "size": ("size", 96, (96, 96)),
                "max_expand": ("max_expand", 1.5),
                "crop_ious": ("crop_ious", (0.2,)),
                "flip": ("flip", 0.25),
            },
        ),
        (
            LSJConfig(),
            {
                "size": ("size", 96),
                "min_scale": ("scales", 0.5, (0.5, 2.0)),
                "max_scale": ("scales", 1.5, (0.1, 1.5)),
                "max_pasted": ("max_pasted", 3),
                "flip": ("flip", 0.25),
            },
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_setting_of_a_policy_reaches_it(augment, changes):
    assert {field.name for field in fields(augment)} == set(changes) | ELSEWHERE
    usual = vars(build_train_transforms(DataConfig(augment=augment)))
    for setting, (attribute, value, *built) in changes.items():
        changed = vars(build_train_transforms(DataConfig(augment=replace(augment, **{setting: value}))))
        wanted = built[0] if built else value
        assert changed[attribute] == wanted != usual[attribute], setting
        assert {name: own for name, own in changed.items() if name != attribute} == {
            name: own for name, own in usual.items() if name != attribute
        }


@pytest.mark.parametrize("augment", [AugmentConfig(), SSDConfig(), LSJConfig()], ids=lambda augment: augment.name)
def test_antialias_and_masks_reach_the_policy(augment):
    for antialias in (True, False):
        config = DataConfig(augment=augment, antialias=antialias)
        assert build_train_transforms(config).antialias is antialias
        assert build_eval_transforms(config).antialias is antialias
    if isinstance(augment, LSJConfig):
        assert [build_train_transforms(config, masks).keep_masks for masks in (True, False)] == [True, False]


def test_the_test_size_is_that_of_the_settings():
    image = torch.zeros(3, 60, 100, dtype=torch.uint8)

    def size(scales=(), **settings):
        views = build_eval_transforms(DataConfig(**settings), scales).views(image)
        return [tuple(view.shape[1:]) for view in views]

    assert size(test_short_side=30, test_long_side=500) == [(30, 50)]
    assert size(test_short_side=30, test_long_side=40) == [(24, 40)]
    assert size((30, 60), test_short_side=30, test_long_side=40) == [(24, 40), (48, 80)]  # the limit grows, too
    assert size(test_square=48) == [(48, 48)] and size((20, 40), test_square=48) == [(20, 20), (40, 40)]
    assert size(test_canvas=64) == [(64, 64)]
    content = build_eval_transforms(DataConfig(test_canvas=64)).content_sizes(60, 100)
    assert content == ((38, 64),)
