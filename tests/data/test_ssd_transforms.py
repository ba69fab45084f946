"""Boxes and masks stay on their pixels, and every range and share is the published one."""

import colorsys

import pytest
import torch
from torchvision.ops import box_iou

from brs_detr.data.ssd_transforms import SSDTransforms, _usable

OFF = dict(probability=0.0, crop_ious=(), flip=0.0)


def scene(h=120, w=200):
    """Two discs, one in the first channel, one in the second, with bitmaps and boxes; the third channel is 255."""
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    discs = torch.stack([(x - 60) ** 2 + (y - 60) ** 2 <= 40**2, (x - 150) ** 2 + (y - 70) ** 2 <= 30**2])
    boxes = torch.tensor([[20.0, 20, 100, 100], [120, 40, 180, 100]])
    target = {"boxes": boxes, "labels": torch.tensor([0, 1]), "masks": discs.to(torch.uint8), "image_id": 5}
    return torch.cat([discs.to(torch.uint8) * 255, torch.full((1, h, w), 255, dtype=torch.uint8)]), target


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_masks_and_boxes_follow_pixels():
    transform, seen = SSDTransforms(size=(160, 144), brightness=0, contrast=(1, 1), saturation=(1, 1), hue=0), 0
    for seed in range(120):
        image, target = transform(*scene(), seeded(seed))
        assert image.shape == (3, 160, 144) and image.dtype == torch.uint8 and target["image_id"] == 5
        assert target["masks"].shape == (len(target["labels"]), 160, 144) and len(target["boxes"]) == len(
            target["labels"]
        )
        inside = image[2] > 200  # the canvas has the mean color
        for label, mask, box in zip(target["labels"].tolist(), target["masks"].bool(), target["boxes"], strict=True):
            painted = (image[label] > 200) & inside
            if mask.sum() > 1500:
                assert (mask & painted).sum() / (mask | painted).sum() > 0.95, seed
                seen += 1
            if mask.any():
                ys, xs = torch.where(mask)
                assert (torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - box).abs().max() <= 2.5
    assert seen > 60


def test_same_generator_same_result_and_input_untouched():
    image, target = scene()
    before = image.clone(), target["boxes"].clone(), target["masks"].clone()
    torch.manual_seed(3)
    a = SSDTransforms()(image, target, seeded(4))
    torch.manual_seed(99)
    b = SSDTransforms()(image, target, seeded(4))
    assert torch.equal(a[0], b[0]) and all(torch.equal(a[1][k], b[1][k]) for k in ("boxes", "labels", "masks"))
    assert torch.equal(image, before[0]) and torch.equal(target["boxes"], before[1])
    assert torch.equal(target["masks"], before[2])


def test_without_anything_it_is_a_resize():
    image, target = SSDTransforms(size=(60, 100), **OFF)(*scene(), seeded(0))
    assert target["boxes"].tolist() == [[10, 10, 50, 50], [60, 20, 90, 50]] and image.shape == (3, 60, 100)
    assert SSDTransforms(size=(60, 100)).largest_sizes(777, 333) == [(60, 100)]


def test_images_without_objects_are_cropped_too():
    target = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 120, 200),
    }
    sizes = set()
    for seed in range(20):
        image, out = SSDTransforms(size=(64, 64))(scene()[0], target, seeded(seed))
        assert out["boxes"].shape == (0, 4) and out["masks"].shape == (0, 64, 64)
        sizes.add(int(image.float().mean()))
    assert len(sizes) > 10


def test_expansion_has_the_mean_around_the_image_in_half_of_the_cases():
    transform = SSDTransforms(
        size=(120, 200), crop_ious=(), flip=0, brightness=0, contrast=(1, 1), saturation=(1, 1), hue=0
    )
    shares = []
    for seed in range(300):
        image, target = transform(*scene(), seeded(seed))
        if torch.equal(target["boxes"], scene()[1]["boxes"]):
            continue
        assert (image == torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]).all(0).any()
        box = target["boxes"][0]
        shares.append(80 / float(box[2] - box[0]))  # the factor of the canvas
    assert abs(len(shares) - 150) < 35
    assert 1 <= min(shares) < 1.2 and 3.8 < max(shares) <= 4.05 and abs(sum(shares) / len(shares) - 2.5) < 0.25


@pytest.mark.parametrize("min_iou", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_crops_keep_their_promise(min_iou):
    """The part of the image is read off the box of an object that it contains wholly."""
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[2.0, 2, 98, 98]]), "labels": torch.tensor([0])}
    marks = torch.arange(100, dtype=torch.uint8).expand(100, 100)
    image[0], image[1] = marks, marks.T
    transform, cropped = SSDTransforms(probability=0, crop_ious=(min_iou,), flip=0, antialias=False), 0
    for seed in range(60):
        transform.size = (100, 100)
        result, _ = transform(image, target, seeded(seed))
        x0, x1, y0, y1 = (int(v) for v in (result[0].min(), result[0].max(), result[1].min(), result[1].max()))
        part = torch.tensor([[x0, y0, x1 + 1, y1 + 1]], dtype=torch.float32)
        assert box_iou(part, target["boxes"]) >= min_iou - 0.05
        width, height = x1 + 1 - x0, y1 + 1 - y0
        assert width >= 29 and height >= 29 and 0.45 < width / height < 2.2
        cropped += width * height < 9900
    assert 10 < cropped < 50  # in half of the cases the image stays as it is


def test_a_part_needs_an_object_center_and_the_minimum_with_every_object():
    boxes = torch.tensor([[10.0, 10, 30, 30], [60, 60, 80, 80]])
    parts = torch.tensor([[0.0, 0, 40, 40], [31, 31, 59, 59], [0, 0, 100, 100], [0, 0, 90, 40]])
    valid, inside = _usable(parts, boxes, 0.0)
    assert valid.tolist() == [True, False, True, False]  # the last is more than twice as wide as high
    assert inside.tolist() == [[True, False], [False, False], [True, True], [True, False]]
    assert _usable(parts, boxes, 0.04)[0].tolist() == [False, False, True, False]


def test_saturation_and_hue_are_those_of_hsv():
    colors = torch.tensor([[200, 40, 90], [30, 220, 120], [77, 80, 150]], dtype=torch.uint8)
    image = colors.T.reshape(3, 1, 3).contiguous()
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    options = dict(size=(1, 3), brightness=0, contrast=(1, 1), max_expand=1, probability=1.0, crop_ious=(), flip=0)
    turned = set()
    for seed in range(20):
        saturated = SSDTransforms(**options, saturation=(0.7, 0.7), hue=0)(image, target, seeded(seed))[0]
        rotated = SSDTransforms(**options, saturation=(1, 1), hue=18)(image, target, seeded(seed))[0]
        for i, color in enumerate(colors.tolist()):
            h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in color))
            expected = torch.tensor(colorsys.hsv_to_rgb(h, 0.7 * s, v)) * 255
            assert (saturated[:, 0, i] - expected).abs().max() <= 1
            h2, s2, v2 = colorsys.rgb_to_hsv(*(c / 255 for c in rotated[:, 0, i].tolist()))
            angle = ((h2 - h + 0.5) % 1 - 0.5) * 360
            assert abs(s2 - s) < 0.02 and abs(v2 - v) < 0.01 and abs(angle) < 18.5
            turned.add(round(angle))
    assert min(turned) < -12 and max(turned) > 12


def test_brightness_is_added_and_contrast_multiplies():
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    options = dict(size=(4, 4), max_expand=1, crop_ious=(), flip=0, saturation=(1, 1), hue=0)
    added = [int(SSDTransforms(**options, contrast=(1, 1))(image, target, seeded(s))[0][0, 0, 0]) for s in range(200)]
    assert 68 <= min(added) < 75 and 125 < max(added) <= 132 and 70 < added.count(100) < 130
    scaled = [int(SSDTransforms(**options, brightness=0)(image, target, seeded(s))[0][0, 0, 0]) for s in range(200)]
    assert 50 <= min(scaled) < 60 and 140 < max(scaled) <= 150 and 70 < scaled.count(100) < 130


def test_a_large_photo_is_shrunk_first_and_augmented_as_a_smaller_one():
    """Never below the pixels of the smallest part: what follows has the same draws and, but for resampling, results."""
    image, target = scene(240, 400)
    large = image.repeat_interleave(8, 1).repeat_interleave(8, 2)
    masks = target["masks"].repeat_interleave(8, 1).repeat_interleave(8, 2)
    target_of_large = {**target, "boxes": 8 * target["boxes"], "masks": masks}
    transform = SSDTransforms(size=(60, 60), min_crop=0.3)
    sizes, distort = [], SSDTransforms._distort

    def watched(self, pixels, generator):
        sizes.append(tuple(pixels.shape[-2:]))
        return distort(self, pixels, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SSDTransforms, "_distort", watched)
        for seed in range(20):
            ours = transform(large, target_of_large, seeded(seed))
            theirs = transform(image, target, seeded(seed))
            assert ours[0].shape == theirs[0].shape == (3, 60, 60) and len(ours[1]["masks"]) == len(ours[1]["boxes"])
            if len(ours[1]["boxes"]) == len(theirs[1]["boxes"]):
                assert (ours[1]["boxes"] - theirs[1]["boxes"]).abs().max() < 1.5, seed
                assert (ours[0].float() - theirs[0].float()).abs().mean() < 8, seed
    assert set(sizes) == {(200, 334)}  # 60 / 0.3 is 200: a part of 0.3 of each side has 60 rows
    assert large.shape == (3, 1920, 3200) and target_of_large["boxes"].max() == 1440


def test_images_of_common_sizes_are_not_shrunk():
    """As in the papers: no image of COCO has 512 / 0.3 pixels a side."""
    image = torch.randint(256, (3, 640, 640), dtype=torch.uint8, generator=seeded(0))
    target = {"boxes": torch.tensor([[1.5, 2.5, 300, 400]]), "labels": torch.tensor([0])}
    shrunk, same = SSDTransforms()._shrunk(image, target)
    assert shrunk is image and same is target


@pytest.mark.parametrize("wrong", [{"min_crop": 0}, {"max_expand": 0.5}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SSDTransforms(**wrong)
