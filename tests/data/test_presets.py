"""Presets of the augmentation: boxes and masks follow the pixels, and every draw is the generator's."""

import pytest
import torch

from brs_detr.config import ConfigError, load_config
from brs_detr.data.build import build_train_transforms, open_train_set
from brs_detr.data.config import AugmentConfig, DataConfig, SSDConfig
from brs_detr.data.loader import build_train_loader
from brs_detr.data.presets import PRESETS, PresetTransforms, Strength, change_pixels, turn_sample
from brs_detr.data.ssd_transforms import SSDTransforms
from brs_detr.data.transforms import TrainTransforms

SMALL = {"short_sides": (96, 128), "long_side": 300, "crop_short_sides": (120, 160), "crop_min": 60, "crop_max": 150}


def painted(h=160, w=240, box=(40, 30, 130, 110)):
    """A bright rectangle on black, its box and its mask."""
    image = torch.zeros(3, h, w, dtype=torch.uint8)
    image[:, box[1] : box[3], box[0] : box[2]] = 255
    target = {"boxes": torch.tensor([box], dtype=torch.float32), "labels": torch.tensor([3]), "image_id": 7}
    return image, {**target, "masks": (image[:1] > 0).to(torch.uint8)}


def extent(plane):
    """The rectangle of bright pixels, xyxy."""
    ys, xs = torch.where(plane > 127)
    return torch.tensor([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], dtype=torch.float32)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("turns", range(5))
def test_a_turn_moves_pixels_boxes_and_masks_alike(turns):
    image, target = turn_sample(*painted(), turns)
    assert torch.equal(image, torch.rot90(painted()[0], turns, (-2, -1)))
    assert torch.equal(target["boxes"], extent(image[0])) and torch.equal(target["masks"][0] * 255, image[0])


def test_a_quarter_turn_by_hand():
    """Counterclockwise, the top right corner of 240 x 160 becomes the top left one."""
    image, target = turn_sample(*painted(box=(200, 0, 240, 10)), 1)
    assert image.shape == (3, 240, 160) and target["boxes"].tolist() == [[0, 0, 10, 40]]


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("policy", ["detr", "ssd"])
def test_boxes_and_masks_follow_pixels(preset, policy):
    augment = AugmentConfig(**SMALL, preset=preset) if policy == "detr" else SSDConfig(size=128, preset=preset)
    transform, seen = build_train_transforms(DataConfig(augment=augment)), 0
    for seed in range(40):
        image, target = transform(*painted(), seeded(seed))
        assert image.dtype == torch.uint8 and image.is_contiguous() and len(target["boxes"]) == len(target["labels"])
        assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
        if len(target["boxes"]):
            assert (target["boxes"] - extent(target["masks"][0] * 255)).abs().max() <= 2, seed
            inside = image[:, target["masks"][0] > 0].float().mean()
            assert inside > image.float().mean() or (target["masks"][0] > 0).float().mean() > 0.9, seed
            seen += 1
    assert seen > 25


def test_aerial_gives_all_eight_views_about_equally_often():
    policy = TrainTransforms(short_sides=(160,), crop=0, flip=0.5)
    transform = PresetTransforms(policy, Strength(turns=(0, 1, 2, 3), flip=0.5))
    corner = (0, 0, 20, 10)  # of a square, at one corner and longer than high: each view has another box
    views = [tuple(transform(*painted(160, 160, corner), seeded(i))[1]["boxes"][0].tolist()) for i in range(800)]
    counts = [views.count(view) for view in set(views)]
    assert len(counts) == 8 and max(abs(count - 100) for count in counts) < 40
    assert PRESETS["aerial"].turns == (0, 1, 2, 3) and PRESETS["aerial"].flip == 0.5


def test_industrial_keeps_left_and_right_and_colors():
    """A half turn and no flip; without noise and blur a gray image stays gray and hues stay."""
    policy = TrainTransforms(short_sides=(160,), crop=0, flip=0)
    transform = PresetTransforms(policy, PRESETS["industrial"])
    boxes = {tuple(transform(*painted(), seeded(i))[1]["boxes"][0].tolist()) for i in range(30)}
    assert boxes == {(40, 30, 130, 110), (110, 50, 200, 130)}
    assert PRESETS["industrial"].saturation == PRESETS["industrial"].hue == PRESETS["industrial"].gray == 0


def test_changes_of_pixels_stay_within_their_ranges():
    image = torch.full((3, 40, 50), 100, dtype=torch.uint8)
    means = [change_pixels(image, Strength(brightness=0.2), seeded(i)).float().mean() for i in range(300)]
    assert 80 <= min(means) < 85 and 115 < max(means) <= 120
    noisy = [change_pixels(image, Strength(noise=1, max_noise=10), seeded(i)).float() for i in range(100)]
    deviations = torch.stack([image.std() for image in noisy])
    assert deviations.max() < 11 and deviations.mean() == pytest.approx(5, abs=1)
    edge = torch.zeros(3, 40, 50, dtype=torch.uint8)
    edge[..., 25:] = 255
    blurred = change_pixels(edge, Strength(blur=1, max_sigma=3), seeded(0))
    assert torch.unique(blurred).numel() > 4 and (blurred[0, 0].int().diff() >= 0).all()
    assert (
        change_pixels(torch.rand(3, 40, 50).mul(255).to(torch.uint8), Strength(gray=1), seeded(0)).float().std(0).max()
        == 0
    )


def test_the_smallest_images_are_changed_too():
    for h, w in ((1, 1), (1, 200), (3, 2)):
        for seed in range(30):
            assert change_pixels(torch.zeros(3, h, w, dtype=torch.uint8), PRESETS["strong"], seeded(seed)).shape == (
                3,
                h,
                w,
            )


def test_without_a_preset_the_policy_is_as_before():
    """The same draws: runs of before go on as they began."""
    assert type(build_train_transforms(DataConfig())) is TrainTransforms
    assert type(build_train_transforms(DataConfig(augment=SSDConfig()))) is SSDTransforms


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_only_the_generator_decides(preset):
    transform = PresetTransforms(TrainTransforms(short_sides=(96, 128), crop_size=(60, 150)), PRESETS[preset])
    state = torch.get_rng_state()
    first = transform(*painted(), seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = transform(*painted(), seeded(5))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1]["boxes"], second[1]["boxes"])


def test_turned_images_count_for_the_largest_size():
    plain, turned = (
        build_train_transforms(DataConfig(augment=AugmentConfig(**SMALL, crop_policy=False, preset=preset)))
        for preset in ("strong", "aerial")
    )
    assert set(turned.largest_sizes(100, 200)) == set(plain.largest_sizes(100, 200) + plain.largest_sizes(200, 100))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_nor_on_where_an_epoch_begins(tmp_path, write_dataset, workers):
    """Those of a full epoch, of one resumed after a batch, and of the dataset read without a loader are the same."""
    path = write_dataset(
        tmp_path, sizes=[(40, 60)] * 8, boxes=[[(1, 2, 3, 20, 20), (17, 30, 3, 9, 9)]] * 7 + [[(90, 1, 1, 9, 9)]]
    )
    augment = AugmentConfig(short_sides=(48, 64), long_side=90, crop_policy=False, preset="strong")
    config = DataConfig(root=str(tmp_path), train_json=path.name, train_images="images", augment=augment)
    dataset = open_train_set(config, seed=3)
    loader = build_train_loader(dataset, 2, workers=workers, seed=3, repeat_threshold=0.5)
    loader.batch_sampler.set_epoch(4)
    batches = [(batch.pixels.clone(), targets) for batch, targets in loader]
    loader.batch_sampler.set_epoch(4, 1)
    resumed = [(batch.pixels.clone(), targets) for batch, targets in loader]
    assert len(resumed) == len(batches) - 1
    for (images, targets), (again, same) in zip(batches[1:], resumed, strict=True):
        assert torch.equal(images, again) and all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, same))
    loader.batch_sampler.set_epoch(4)
    for indices, (images, _) in zip(loader.batch_sampler, batches, strict=True):
        for index, image in zip(indices, images):
            alone, _ = dataset[index]
            assert torch.equal(image[:, : alone.shape[1], : alone.shape[2]], alone)
    loader.close()


def test_a_preset_with_a_typo_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean aerial"):
        load_config("demo", ["data.augment.preset=arial"])
    config = load_config("demo", ["data.augment.preset=strong", "data.augment.name=ssd"])
    assert config.data.augment.name == "ssd" and config.data.augment.preset == "strong"
