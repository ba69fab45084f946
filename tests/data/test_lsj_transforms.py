"""Large-scale jitter and copy-paste: the canvas, objects on their pixels, and every draw the generator's."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brs_detr.config import ConfigError, load_config
from brs_detr.data.build import build_train_transforms, open_train_set, open_val_set
from brs_detr.data.config import DataConfig, LSJConfig
from brs_detr.data.loader import build_eval_loader, build_train_loader
from brs_detr.data.lsj_transforms import LSJTransforms, paste
from brs_detr.data.presets import PresetTransforms
from brs_detr.data.transforms import EvalTransforms, MultiScaleTransforms
from brs_detr.ops.masks import boxes_around

SMALL = LSJConfig(size=96)


def scene(h=120, w=200, masks=True):
    """Two discs, one in the first channel, one in the second, with bitmaps and boxes; the third channel is 255."""
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    discs = torch.stack([(x - 60) ** 2 + (y - 60) ** 2 <= 40**2, (x - 150) ** 2 + (y - 70) ** 2 <= 30**2])
    target = {"boxes": boxes_around(discs), "labels": torch.tensor([0, 1]), "image_id": 5}
    target |= {"masks": discs.to(torch.uint8)} if masks else {}
    return torch.cat([discs.to(torch.uint8) * 255, torch.full((1, h, w), 255, dtype=torch.uint8)]), target


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def content_of(image):
    """(h, w) of the part of a canvas whose third channel is that of `scene`."""
    bright = image[2] > 200
    return int(bright.any(1).sum()), int(bright.any(0).sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([64, 97, 160]), st.booleans())
def test_boxes_and_masks_follow_pixels_and_the_rest_of_the_canvas_is_gray(seed, side, masks):
    image, target = LSJTransforms(size=side)(*scene(masks=masks), seeded(seed))
    assert image.shape == (3, side, side) and image.dtype == torch.uint8 and target["image_id"] == 5
    height, width = content_of(image)
    gray = torch.ones(side, side, dtype=torch.bool)
    gray[:height, :width] = False
    assert (image[:, gray] == 114).all()
    boxes = target["boxes"]
    assert len(boxes) == len(target["labels"]) and (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
    painted = [image[label, :height, :width] > 127 for label in target["labels"].tolist()]
    for box, plane in zip(boxes, painted, strict=True):
        around = boxes_around(plane[None])[0]
        if masks and plane.sum() > 20:
            assert (box - around).abs().max() <= 2
        elif plane.any():  # a box that is cut is looser than one around what is left of the disc
            assert (box[:2] <= around[:2] + 2).all() and (box[2:] >= around[2:] - 2).all()
    if masks:
        assert target["masks"].shape == (len(boxes), side, side) and not target["masks"][:, gray].any()
        assert torch.equal(boxes, boxes_around(target["masks"]))
        for mask, plane in zip(target["masks"][:, :height, :width].bool(), painted, strict=True):
            if plane.sum() > 400:
                assert (mask & plane).sum() / (mask | plane).sum() > 0.9
    else:
        assert "masks" not in target


def test_the_factor_is_uniform_and_crops_are_of_the_canvas_at_most():
    """Content below the canvas is the image times the factor; above it is cut to the canvas."""
    transform, plain = LSJTransforms(size=100, flip=0.0), torch.full((3, 50, 100), 255, dtype=torch.uint8)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    sizes = [content_of(transform(plain, empty, seeded(seed))[0]) for seed in range(400)]
    assert max(width for _, width in sizes) == 100 == max(height for height, _ in sizes)
    assert 10 <= min(width for _, width in sizes) < 20 and min(height for height, _ in sizes) < 10
    shrunk = [width for _, width in sizes if width < 100]
    assert abs(len(shrunk) / 400 - 0.9 / 1.9) < 0.08  # of factors from 0.1 to 2, those below 1
    assert abs(sum(shrunk) / len(shrunk) - 55) < 5  # uniform between 10 and 100
    assert all(abs(height - width / 2) <= 1 for height, width in sizes if width < 100)
    twice = LSJTransforms(size=100, scales=(2, 2), flip=0)
    assert len({str(twice(*scene(), seeded(seed))[1]["boxes"].tolist()) for seed in range(20)}) > 10  # where it is cut


def test_flips_are_as_frequent_as_asked_and_fixed_factors_are_kept():
    transform = LSJTransforms(size=200, scales=(1.0, 1.0), flip=0.25, max_pasted=0)
    boxes = [tuple(transform(*scene(), seeded(seed))[1]["boxes"][0].tolist()) for seed in range(400)]
    assert set(boxes) == {(20, 20, 100, 100), (100, 20, 180, 100)}
    assert abs(boxes.count((100, 20, 180, 100)) / 400 - 0.25) < 0.06


def slow_paste(target, other):
    """Object by object and pixel by pixel, as the docstring words it."""
    covered = other["masks"].bool().any(0)
    boxes, labels, masks = [], [], []
    for box, label, mask in zip(target["boxes"], target["labels"], target["masks"].bool(), strict=True):
        left = mask & ~covered
        if not left.any():
            continue
        y, x = left.nonzero().unbind(1)
        new = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
        if bool((left == mask).all()):
            new = box
        if (new - box).abs().max() <= 10 or left.sum() > 300:
            boxes, labels, masks = [*boxes, new], [*labels, label], [*masks, left]
    boxes, labels, masks = [*boxes, *other["boxes"]], [*labels, *other["labels"]], [*masks, *other["masks"].bool()]
    return torch.stack(boxes), torch.stack(labels), torch.stack(masks)


def rectangles(corners, size=(64, 80)):
    masks = torch.zeros(len(corners), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, corners, strict=True):
        mask[y1:y2, x1:x2] = 1
    return {"boxes": boxes_around(masks), "labels": torch.arange(len(corners)), "masks": masks}


corner = st.tuples(st.integers(0, 60), st.integers(0, 50), st.integers(2, 40), st.integers(2, 40))
rectangle = corner.map(lambda c: (c[0], c[1], min(c[0] + c[2], 80), min(c[1] + c[3], 64)))


@settings(max_examples=100, deadline=None)
@given(st.lists(rectangle, max_size=4), st.lists(rectangle, min_size=1, max_size=3))
def test_pasting_is_its_definition(own, pasted):
    target, other = rectangles(own), rectangles(pasted)
    image, other_image = torch.zeros(3, 64, 80, dtype=torch.uint8), torch.full((3, 64, 80), 9, dtype=torch.uint8)
    before = {name: value.clone() for name, value in target.items()}
    joined_image, joined = paste(image, {**target, "image_id": 3}, other_image, other)
    boxes, labels, masks = slow_paste(target, other)
    assert torch.equal(joined["boxes"], boxes) and torch.equal(joined["labels"], labels)
    assert torch.equal(joined["masks"].bool(), masks) and joined["image_id"] == 3
    assert torch.equal(joined_image[0] == 9, other["masks"].bool().any(0))
    assert all(torch.equal(target[name], value) for name, value in before.items())
    if not own:
        assert torch.equal(joined["labels"], other["labels"])


def test_covered_objects_by_hand():
    """A strip of 6 pixels left of a narrow object moves its box by 14 and leaves 150 pixels; of a wide one 600."""
    other = rectangles([(20, 0, 40, 30)])
    for own, expected in (
        ((14, 0, 34, 25), []),  # cut to 14..20: 14 pixels less, 150 left
        ((14, 0, 28, 25), [(14, 0, 20, 25)]),  # 8 pixels less
        ((0, 0, 40, 30), [(0, 0, 20, 30)]),  # 20 pixels less, but 600 left
        ((22, 2, 30, 10), []),  # nothing left
        ((20, 0, 40, 30), []),
        ((50, 0, 60, 10), [(50, 0, 60, 10)]),
    ):
        _, joined = paste(torch.zeros(3, 64, 80), rectangles([own]), torch.ones(3, 64, 80), other)
        assert joined["boxes"].tolist() == [*map(list, expected), [20, 0, 40, 30]], own


def test_nothing_is_pasted_where_there_is_nothing_to_paste():
    image, target = scene()
    nothing = {name: target[name][:0] for name in ("boxes", "labels", "masks")}
    same_image, same = paste(image, target, image * 0, nothing)
    assert torch.equal(same_image, image) and torch.equal(same["boxes"], target["boxes"])


@pytest.fixture
def dataset(tmp_path, write_dataset, change):
    """Six images, with polygons of all objects but one that has none; `set.json`."""
    boxes = [[(90, 5 + i, 6, 30, 20), (1, 40, 30, 25, 30)] for i in range(6)]
    path = write_dataset(tmp_path, sizes=[(80, 100)] * 3 + [(100, 64)] * 3, boxes=boxes)

    def add_polygons(data):
        for annotation in data["annotations"][:-1]:
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]

    return change(path, add_polygons)


def config_of(path, **augment):
    folder = {"root": str(path.parent), "train_json": path.name, "val_json": path.name}
    augment = LSJConfig(**{"size": 96, **augment})
    return DataConfig(**folder, train_images="images", val_images="images", augment=augment, test_canvas=96)


def test_objects_are_pasted_from_the_masks_of_the_json(dataset):
    """For detectors with and without masks, which see the same boxes."""
    with_masks = open_train_set(config_of(dataset), seed=0, masks=True)
    without = open_train_set(config_of(dataset), seed=0)
    assert with_masks.masks and without.masks
    counts = []
    for index in range(6):
        for epoch in range(6):
            (image, target), (plain_image, plain) = with_masks[index, epoch], without[index, epoch]
            assert torch.equal(image, plain_image) and torch.equal(target["boxes"], plain["boxes"])
            assert "masks" not in plain and target["masks"].shape == (len(plain["labels"]), 96, 96)
            assert torch.equal(boxes_around(target["masks"]), target["boxes"])
            counts.append(len(plain["labels"]))
    assert max(counts) > 2  # an image has two of its own
    off = open_train_set(config_of(dataset, max_pasted=0), seed=0)
    assert not off.masks and all(len(off[index, 0][1]["labels"]) <= 2 for index in range(6))
    drawn = [with_masks.random_image(seeded(seed))[1] for seed in range(40)]
    assert {len(target["labels"]) for target in drawn} == {1, 2}  # the object without a polygon is not pasted


def test_without_masks_in_the_json_none_are_read(tmp_path, write_dataset):
    path = write_dataset(tmp_path, sizes=[(80, 100)] * 2, boxes=[[(90, 5, 6, 30, 20)]] * 2)
    opened = open_train_set(config_of(path), seed=0)
    assert not opened.masks and "mask_missing" not in opened.report
    assert all(len(opened[index, epoch][1]["labels"]) <= 1 for index in range(2) for epoch in range(5))


@pytest.mark.parametrize("preset", ["none", "aerial"])
def test_what_is_pasted_depends_on_seed_epoch_and_image_alone(dataset, preset):
    """Not on the workers, on what was loaded before, or on the global random numbers."""
    config = config_of(dataset, preset=preset)

    def batches(workers, start=0, seed=0):
        torch.manual_seed(workers + start)
        loader = build_train_loader(open_train_set(config, seed=seed), 2, workers=workers)
        loader.batch_sampler.set_epoch(3, start)
        return list(loader)

    whole, started, resumed = batches(0), batches(2), batches(0, start=1)
    for first, second in zip([*whole, *whole[1:]], [*started, *resumed], strict=True):
        assert torch.equal(first[0].pixels, second[0].pixels)
        for own, other in zip(first[1], second[1], strict=True):
            assert torch.equal(own["boxes"], other["boxes"]) and torch.equal(own["labels"], other["labels"])
    assert not all(torch.equal(a[0].pixels, b[0].pixels) for a, b in zip(whole, batches(0, seed=1), strict=True))


def test_presets_and_the_largest_size():
    transform = build_train_transforms(DataConfig(augment=LSJConfig(size=64, preset="light"), test_canvas=64))
    assert isinstance(transform, PresetTransforms) and transform.largest_sizes(10, 5000) == [(64, 64)]
    image, _ = transform(*scene(), seeded(0))
    assert image.shape == (3, 64, 64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([32, 97, 256]))
def test_a_test_image_fits_into_its_canvas(height, width, side):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=seeded(0))
    target = {"boxes": torch.tensor([[0.0, 0, width, height]]), "labels": torch.tensor([0])}
    transform = EvalTransforms(canvas=side)
    placed, resized = transform(image, target)
    [(own_height, own_width)] = resized["content_sizes"]
    assert placed.shape == (3, side, side) and max(own_height, own_width) == side
    scale = side / max(height, width)  # a side of the thinnest image is still a pixel
    assert abs(own_height - max(1, height * scale)) <= 0.5 and abs(own_width - max(1, width * scale)) <= 0.5
    torch.testing.assert_close(resized["boxes"], torch.tensor([[0.0, 0, own_width, own_height]]))
    assert (placed[:, own_height:] == 114).all() and (placed[:, :, own_width:] == 114).all()
    assert torch.equal(transform.views(image)[0], placed) and transform.output_sizes(height, width) == ((side, side),)
    assert transform.content_sizes(height, width) == ((own_height, own_width),)


def test_batches_of_the_validation_say_where_the_images_are(dataset):
    """All images are on one canvas, so any of them share a batch; several scales have canvases of their own."""
    config = config_of(dataset)
    [batch, *_] = [images for images, _ in build_eval_loader(open_val_set(config), 4)]
    assert batch.sizes == [(96, 96)] * 4 and not batch.padding_mask().any()
    assert batch.content_sizes == [(77, 96)] * 3 + [(96, 61)]
    views = next(iter(build_eval_loader(open_val_set(config, scales=(48, 96)), 2)))[0]
    assert [scale.sizes[0] for scale in views.scales] == [(48, 48), (96, 96)]
    assert [scale.content_sizes for scale in views.scales] == [[(38, 48)] * 2, [(77, 96)] * 2]
    assert MultiScaleTransforms([EvalTransforms(), EvalTransforms(64)]).content_sizes(80, 100) is None


def test_settings_that_do_not_fit():
    recipe = "configs/demo.yaml"
    lsj = ["data.augment.name=lsj", "data.augment.size=640"]
    with pytest.raises(ConfigError, match=r"data\.test_canvas=null tests without\. Set data\.test_canvas=640"):
        load_config(recipe, lsj)
    assert load_config(recipe, [*lsj, "data.test_canvas=640"]).data.augment == LSJConfig(size=640, flip=0.5)
    with pytest.raises(ConfigError, match=r"data\.augment\.min_scale=3 is above data\.augment\.max_scale=2"):
        load_config(recipe, [*lsj, "data.test_canvas=640", "data.augment.min_scale=3"])
    with pytest.raises(ConfigError, match="are two ways to make images square"):
        load_config(recipe, ["data.test_canvas=640", "data.test_square=640"])


def test_masks_of_real_annotations(shared_data):
    """Nuclei: many small objects with masks."""
    folder = shared_data / "nuclei"
    jsons = sorted((folder / "annotations").glob("*.json"))
    data = json.loads(jsons[0].read_text())
    config = DataConfig(
        root=str(folder),
        train_json=str(jsons[0].relative_to(folder)),
        train_images="images",
        augment=LSJConfig(size=256),
        test_canvas=256,
    )
    opened = open_train_set(config, seed=0, masks=True)
    assert len(opened) <= len(data["images"])
    for index in range(0, len(opened), max(1, len(opened) // 6)):
        image, target = opened[index, 0]
        assert image.shape == (3, 256, 256) and torch.equal(boxes_around(target["masks"]), target["boxes"])
