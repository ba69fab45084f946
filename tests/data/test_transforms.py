"""Boxes follow the pixels they were drawn around, and sizes follow the recipe's rules."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brs_detr.data.build import build_eval_transforms
from brs_detr.data.config import DataConfig
from brs_detr.data.presets import PRESETS, PresetTransforms
from brs_detr.data.ssd_transforms import SSDTransforms
from brs_detr.data.transforms import EvalTransforms, TrainTransforms, resize_sample
from brs_detr.ops.images import resized_size


def painted(h=160, w=240, box=(40, 30, 130, 110)):
    image = torch.zeros(3, h, w, dtype=torch.uint8)
    image[:, box[1] : box[3], box[0] : box[2]] = 255
    return image, {"boxes": torch.tensor([box], dtype=torch.float32), "labels": torch.tensor([3]), "image_id": 7}


def extent(image):
    """The rectangle of bright pixels, xyxy."""
    ys, xs = torch.where(image[0] > 127)
    return torch.tensor([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], dtype=torch.float32)


SMALL = dict(short_sides=(96, 128, 200), long_side=300, crop_short_sides=(120, 160), crop_size=(60, 150))


@pytest.mark.parametrize("policy", [0.0, 1.0])
def test_boxes_follow_pixels(policy):
    transform, seen = TrainTransforms(**SMALL, crop=policy), 0
    for seed in range(60):
        image, target = transform(*painted(), torch.Generator().manual_seed(seed))
        if len(target["boxes"]):
            assert (target["boxes"] - extent(image)).abs().max() <= 1.5, seed
            seen += 1
        else:
            assert (image > 127).sum() == 0
    assert seen > 40


@pytest.mark.parametrize("size", [(160, 240), (240, 160), (50, 400), (300, 300)])
@pytest.mark.parametrize("policy", [0.0, 0.5, 1.0])
def test_no_image_is_larger_than_the_largest_sizes_and_some_come_near(size, policy):
    transform = TrainTransforms(**SMALL, crop=policy)
    bounds = torch.tensor(transform.largest_sizes(*size))
    image, target = painted(*size)
    drawn = [transform(image, target, torch.Generator().manual_seed(seed))[0].shape[1:] for seed in range(300)]
    drawn = torch.tensor(drawn)
    for found, bound in ((drawn, bounds), (drawn.prod(1, keepdim=True), bounds.prod(1, keepdim=True))):
        found, bound = found.amax(0), bound.amax(0)
        assert (found <= bound * 1.02 + 1).all() and (found >= bound * 0.85).all(), (found, bound)


def test_flip_mirrors_pixels_and_boxes():
    transform = TrainTransforms(short_sides=(160,), crop=0, flip=1)
    image, target = transform(*painted(), torch.Generator())
    assert torch.equal(image, painted()[0].flip(-1)) and target["boxes"].tolist() == [[110, 30, 200, 110]]


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(16, 900), st.integers(900, 1400))
@settings(max_examples=200, deadline=None)
def test_resize_keeps_to_both_limits(h, w, short, long):
    new_h, new_w = resized_size(h, w, short, long)
    assert max(new_h, new_w) <= long and min(new_h, new_w) <= max(short, 1)
    assert min(new_h, new_w) == short or max(new_h, new_w) == long
    assert (abs(new_h - h * new_w / w) <= 1 + h / w / 2 and abs(new_w - w * new_h / h) <= 1 + w / h / 2) or 1 in (
        new_h,
        new_w,
    )


def test_published_sizes():
    assert resized_size(480, 640, 800, 1333) == (800, 1067)
    assert resized_size(640, 480, 800, 1333) == (1067, 800)
    assert resized_size(427, 640, 800, 1333) == (800, 1199)
    assert resized_size(375, 1242, 800, 1333) == (402, 1333)


def test_an_image_larger_than_what_it_must_fit_into_is_shrunk():
    assert resized_size(120, 120, 60, 80, None) == (60, 60)
    assert resized_size(120, 120, 60, 80, (60, 80)) == (60, 60)
    assert resized_size(120, 120, 60, 80, (60, 45)) == (45, 45)
    assert resized_size(240, 120, 60, 80, (160, 160)) == (80, 40)  # the long side's limit
    assert EvalTransforms(800, 1333, within=(640, 640)).output_size(480, 640) == (480, 640)
    assert EvalTransforms(800, 1333, within=(800, 1333)).output_size(640, 480) == (800, 600)


def test_policies_are_drawn_equally_often_and_all_sizes_occur():
    transform = TrainTransforms(short_sides=(64, 96, 128), long_side=1000, crop=0)
    heights = [transform(*painted(), torch.Generator().manual_seed(i))[0].shape[1] for i in range(300)]
    assert {h: abs(heights.count(h) - 100) < 35 for h in set(heights)} == {64: True, 96: True, 128: True}


@pytest.mark.parametrize("probability", [0.25, 0.5])
def test_flips_and_crops_are_as_frequent_as_asked_for(probability):
    """Of 400 images, within four standard deviations of at most 10."""
    flip = TrainTransforms(short_sides=(160,), crop=0.0, flip=probability)
    crop = TrainTransforms(**SMALL, crop=probability, flip=0.0)
    whole = {resized_size(160, 240, short, 300) for short in SMALL["short_sides"]}
    flipped = cropped = 0
    for seed in range(400):
        _, target = flip(*painted(), torch.Generator().manual_seed(seed))
        flipped += target["boxes"][0, 0] != 40
        image, _ = crop(*painted(), torch.Generator().manual_seed(seed))
        cropped += tuple(image.shape[1:]) not in whole
    assert abs(flipped - 400 * probability) < 40 and abs(cropped - 400 * probability) < 40


def test_crops_lie_anywhere_in_the_image():
    """Of an image whose colors tell the place: rows in red, columns in green."""
    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(200), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    transform = TrainTransforms(
        short_sides=(50,), long_side=50, crop_short_sides=(100,), crop_size=(50, 50), crop=1, flip=0.0
    )
    cut = [transform(image, target, torch.Generator().manual_seed(seed))[0] for seed in range(400)]
    tops, lefts = (torch.tensor([int(one[channel, 0, 0]) for one in cut]).double() for channel in (0, 1))
    for corner, furthest in ((tops, 50), (lefts, 150)):
        assert corner.min() <= 0.05 * furthest and corner.max() >= 0.95 * furthest
        assert abs(corner.mean() - furthest / 2) < 0.08 * furthest  # over five standard errors


def test_a_crop_is_never_larger_than_its_image_nor_outside_its_range():
    transform = TrainTransforms(
        short_sides=(100,), long_side=10_000, crop_short_sides=(50,), crop_size=(40, 80), crop=1
    )
    for seed in range(50):
        image, _ = transform(*painted(100, 200), torch.Generator().manual_seed(seed))
        # a crop of 40..50 by 40..80 is enlarged to a short side of 100
        assert min(image.shape[1:]) == 100 and max(image.shape[1:]) <= 200


def test_partly_cropped_boxes_are_clipped_and_gone_ones_take_their_label_along():
    boxes = torch.tensor([[0.0, 0, 10, 10], [100, 100, 240, 160]])
    transform = TrainTransforms(**SMALL, crop=1)
    counts = set()
    for seed in range(60):
        image, target = transform(
            painted()[0], {"boxes": boxes, "labels": torch.tensor([1, 2])}, torch.Generator().manual_seed(seed)
        )
        out, (h, w) = target["boxes"], image.shape[1:]
        assert type(out) is torch.Tensor and len(out) == len(target["labels"])
        assert (out >= 0).all() and (out[:, 0::2] <= w).all() and (out[:, 1::2] <= h).all()
        assert (out[:, 2:] > out[:, :2]).all()
        counts.add(tuple(target["labels"].tolist()))
    assert {(), (1,), (2,), (1, 2)} - counts <= {(), (1,)} and (2,) in counts


def test_same_generator_state_same_result_and_input_untouched():
    image, target = painted()
    before = image.clone(), target["boxes"].clone()
    first, second = (TrainTransforms(**SMALL)(image, target, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1]["boxes"], second[1]["boxes"])
    assert torch.equal(image, before[0]) and torch.equal(target["boxes"], before[1])


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 120), st.integers(1, 120)).filter(lambda size: size != (1, 1)),  # torch's kernel asserts
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_order_of_the_pixels_in_memory_changes_nothing(old, new, antialias, flip):
    pixels = torch.randint(0, 256, (*old, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(old)))
    beside, planes = pixels.permute(2, 0, 1), pixels.permute(2, 0, 1).contiguous()
    if flip:
        beside, planes = beside.flip(-1), planes.flip(-1)
    target = {"boxes": torch.zeros(0, 4)}
    (one, _), (other, _) = (resize_sample(image, target, new, antialias) for image in (beside, planes))
    assert torch.equal(one, other) and one.is_contiguous()


@pytest.mark.parametrize("preset", ["none", "strong", "aerial", "industrial"])
@pytest.mark.parametrize("policy", ["detr", "ssd"])
def test_augmented_images_do_not_depend_on_that_order(preset, policy):
    """Sums over an image, as in a change of contrast, would round in another order."""
    transform = PresetTransforms(
        TrainTransforms(**SMALL) if policy == "detr" else SSDTransforms(size=(64, 64)), PRESETS[preset]
    )
    pixels = torch.randint(0, 256, (160, 240, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for seed in range(12):
        images = pixels.permute(2, 0, 1), pixels.permute(2, 0, 1).contiguous()
        results = [transform(image, painted()[1], torch.Generator().manual_seed(seed)) for image in images]
        assert torch.equal(results[0][0], results[1][0]), seed
        assert torch.equal(results[0][1]["boxes"], results[1][1]["boxes"])


def test_images_without_objects_pass_through():
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": 1}
    for seed in range(8):
        image, out = TrainTransforms(**SMALL)(painted()[0], target, torch.Generator().manual_seed(seed))
        assert out["boxes"].shape == (0, 4) and out["image_id"] == 1 and image.dtype == torch.uint8


def test_evaluation_only_resizes():
    image, target = EvalTransforms(80, 1000)(*painted())
    assert image.shape == (3, 80, 120) == (3, *EvalTransforms(80, 1000).output_size(160, 240))
    assert target["boxes"].tolist() == [[20, 15, 65, 55]] and (target["boxes"] - extent(image)).abs().max() <= 1


def test_enlarging_is_the_same_with_and_without_antialias():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    target = {"boxes": torch.zeros(0, 4)}
    a, b = (EvalTransforms(57, 1000, antialias=flag)(image, target)[0] for flag in (True, False))
    assert (a.int() - b.int()).abs().max() <= 1


def scene(h=160, w=240):
    """A disc in the first channel and a turned ellipse in the second, with their bitmaps and boxes."""
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    disc = (x - 80) ** 2 + (y - 70) ** 2 <= 45**2
    ellipse = ((x - y) / 50 - 1.4) ** 2 + ((x + y - 230) / 90) ** 2 <= 1
    masks = torch.stack([disc, ellipse]).to(torch.uint8)
    boxes = torch.stack([torch.cat([torch.stack([c.min(), c.max() + 1]) for c in torch.where(m)[::-1]]) for m in masks])
    target = {"boxes": boxes[:, [0, 2, 1, 3]].float(), "labels": torch.tensor([4, 9]), "masks": masks}
    return torch.stack([disc, ellipse, disc]).to(torch.uint8) * 255, target


def iou(a, b):
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


@pytest.mark.parametrize("policy", [0.0, 1.0])
def test_masks_follow_pixels_and_boxes(policy):
    transform, seen = TrainTransforms(**SMALL, crop=policy), 0
    for seed in range(60):
        image, target = transform(*scene(), torch.Generator().manual_seed(seed))
        assert target["masks"].shape == (len(target["labels"]), *image.shape[1:])
        for label, mask, box in zip(target["labels"].tolist(), target["masks"].bool(), target["boxes"], strict=True):
            if mask.sum() < 1500:
                continue
            assert iou(mask, image[0 if label == 4 else 1] > 127) > 0.97, seed
            ys, xs = torch.where(mask)
            assert (torch.stack([xs.min(), ys.min()]) >= box[:2] - 1.5).all()
            assert (torch.stack([xs.max() + 1, ys.max() + 1]) <= box[2:] + 1.5).all()
            seen += 1
    assert seen > 60


def test_a_mask_through_flip_crop_resize_paste_and_run_lengths():
    """What training cuts out of an augmented mask, pasted again and encoded, is that mask."""
    import numpy as np

    from brs_detr.ops.masks import encode_masks, mask_targets, paste_masks
    from brs_detr.ops.rle import draw, pack_segmentation

    transform, seen = TrainTransforms(**SMALL, crop=0.5), 0
    for seed in range(40):
        image, target = transform(*scene(), torch.Generator().manual_seed(seed))
        count, size = len(target["labels"]), tuple(image.shape[1:])
        squares = mask_targets(target["masks"], target["boxes"], torch.arange(count))
        pasted = paste_masks(squares, target["boxes"], size)
        for mask, rle in zip(target["masks"].bool(), encode_masks(pasted), strict=True):
            back = torch.from_numpy(draw(np.frombuffer(pack_segmentation(rle), np.uint32), size).copy()).bool()
            if mask.sum() > 1500:
                assert iou(back, mask) > 0.97, seed
                seen += 1
    assert seen > 40


def test_flip_mirrors_masks_and_resizing_without_ratio_keeps_them_on_their_boxes():
    image, target = scene()
    flipped = TrainTransforms(short_sides=(160,), crop=0, flip=1)(image, target, torch.Generator())[1]
    assert torch.equal(flipped["masks"], target["masks"].flip(-1))
    assert EvalTransforms(size=(100, 100)).output_size(160, 240) == (100, 100)
    image, target = EvalTransforms(size=(100, 100))(image, target)
    assert image.shape == (3, 100, 100) and target["masks"].shape == (2, 100, 100)
    for mask, box in zip(target["masks"], target["boxes"], strict=True):
        ys, xs = torch.where(mask)
        assert (torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - box).abs().max() <= 1


def test_smaller_images_are_averaged_only_with_antialias():
    board = torch.zeros(3, 64, 64, dtype=torch.uint8)
    board[:, ::2, ::2] = board[:, 1::2, 1::2] = 255  # a checkerboard: gray where it is averaged
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    config = DataConfig(test_short_side=24, test_long_side=24)
    smooth, sharp = (
        build_eval_transforms(replace(config, antialias=on))(board, dict(target))[0].float() for on in (True, False)
    )
    assert smooth.std() < 0.5 * sharp.std()
