"""YOLACT and SOLOv2 from images to losses and to masks of the stored images."""

from dataclasses import replace

import pytest
import torch
from pycocotools import mask as coco_mask
from support import SMALL_BACKBONE
from torchvision.ops import masks_to_boxes

from brs_detr.config import Config, apply_overrides
from brs_detr.models.build import build_model
from brs_detr.ops.images import ImageBatch
from brs_detr.ops.masks import mask_iou

SMALL = {
    "yolact": ["model.dim=32", "model.head.prototypes=8"],
    "solov2": [
        "model.dim=32",
        "model.head.conv_dim=32",
        "model.head.mask_hidden=32",
        "model.head.mask_dim=32",
        "model.head.norm_groups=4",
        "model.head.stacked_convs=1",
    ],
}
LOSSES = ["brs", "rs", "bap", "ap", "balrp", "alrp", "focal"]


def build(name, *overrides, classes=2):
    torch.manual_seed(0)
    settings = apply_overrides(Config(), [f"model.name={name}", *SMALL[name], *overrides]).model
    assert settings.has_masks
    levels = settings.backbone.levels
    return build_model(replace(settings, backbone=replace(SMALL_BACKBONE, levels=levels)), classes)


def scene(height, width):
    """An image of noise with a bright disc of class 0 and a dim rectangle of class 1, and its objects."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    disc = (x - 28) ** 2 + (y - 30) ** 2 <= 18**2
    block = (x >= width - 40) & (x < width - 8) & (y >= height - 36) & (y < height - 12) & ~disc
    image = torch.rand(3, height, width) * 50
    image[0, disc] += 180
    image[2, block] += 120
    masks = torch.stack([disc, block])
    boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0, 1, 1])
    return image, {"boxes": boxes, "labels": torch.tensor([0, 1]), "masks": masks.to(torch.uint8)}


def batch():
    images, targets = zip(scene(96, 112), scene(88, 96))
    return ImageBatch.from_list(images), list(targets)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SMALL)
def test_five_steps_descend(name, loss):
    """Of all terms together; the boxes' and masks' own losses follow the ranking by the balance."""
    # by the value: over an epoch, the published way, the weight of the localization changes within these steps
    balance = ["model.balance=value"] if "alrp" in loss else []
    model, (images, targets) = build(name, f"model.loss={loss}", *balance), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(6):
        terms = model(images, targets)
        loss_value = sum(terms.values())
        optimizer.zero_grad()
        loss_value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        values.append(float(loss_value.detach()))
    assert values[-1] < 0.9 * values[0], values


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_masks_are_learned(name):
    smaller = ["model.head.grids=[12, 10, 8, 6, 4]"] if name == "solov2" else []  # cells, and so steps, are fewer
    model, (images, targets) = build(name, *smaller), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    with torch.no_grad():
        detections = model.eval()(images)
    for found, target in zip(detections, targets):
        assert sorted(found["labels"][:2].tolist()) == [0, 1]
        best = torch.from_numpy(coco_mask.decode(found["masks"][:2])).permute(2, 0, 1)
        assert mask_iou(best[found["labels"][:2].argsort()], target["masks"]).diagonal().min() > 0.7


@pytest.mark.parametrize("name", SMALL)
def test_batches_without_objects_train(name):
    """All images empty, and one."""
    images, targets = batch()
    empty = {key: value[:0] for key, value in targets[0].items()}
    for own in ([empty, empty], [empty, targets[1]]):
        model = build(name)
        terms = model(images, own)
        sum(terms.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        assert any(own[1]["labels"].shape) == any(float(value.detach()) for value in terms.values())


@pytest.mark.parametrize("name", SMALL)
def test_detections_are_in_the_frame_of_the_stored_images(name):
    model = build(name).eval()
    images, _ = batch()
    stored = ImageBatch(images.pixels, images.sizes, [(192, 224), (44, 48)])
    with torch.no_grad():
        resized, detections = model(images), model(stored)
    for image, (found, own) in enumerate(zip(detections, resized, strict=True)):
        h, w = stored.original_sizes[image]
        assert {len(found[key]) for key in ("boxes", "scores", "labels", "masks")} == {len(found["boxes"])}
        assert len(found["boxes"]) > 0 and (found["scores"].diff() <= 0).all()
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([w, h, w, h]) + 1e-3).all()
        assert all(rle["size"] == [h, w] for rle in found["masks"])
        if name == "yolact":
            scale = torch.tensor([w, h, w, h]) / torch.tensor([*images.sizes[image]]).flip(0).repeat(2)
            torch.testing.assert_close(found["boxes"], own["boxes"] * scale)


def test_masks_cover_the_part_of_the_batch_that_the_image_is():
    """A mask of the left half of the padded batch, 112 pixels wide, ends at pixel 56 of every image."""
    model, (images, _) = build("solov2"), batch()
    masks = torch.zeros(2, 24, 28)
    masks[0, :, :14] = 1.0
    masks[1, 23:, 26:] = 1.0  # in the padding of the second image
    stored = ImageBatch(images.pixels, images.sizes, [(96, 112), (176, 192)])
    found = {"scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([1, 0]), "masks": masks}
    model.head.predict = lambda output, sizes: [found, found]
    with torch.no_grad():
        first, second = model.eval()(stored)
    assert first["boxes"][0].tolist() == [0, 0, 56, 96] and len(first["masks"]) == 2
    assert second["boxes"].tolist() == [[0, 0, 112, 176]] and second["labels"].tolist() == [1]
    assert coco_mask.decode(second["masks"][0])[:, :112].all()


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("yolact", "model.loss=cross_entropy", "needs a background class"),
        ("solov2", "model.head.grids=[40, 36]", "must have one number per level, model.levels=5"),
        ("solov2", "model.head.conv_dim=30", "model.head.conv_dim=30 must be a multiple of model.head.norm_groups=4"),
        ("solov2", "model.levels=3", "less than the 4 of model.backbone.levels=.*raise it"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, override, message):
    with pytest.raises(ValueError, match=message):
        build(name, override)


@pytest.mark.parametrize("name", SMALL)
def test_masks_left_untrained_are_refused(name):
    with pytest.raises(
        ValueError, match=r"model\.head\.objective\.weights\.mask=0 leaves a part of the head untrained"
    ):
        build(name, "model.loss=focal", "model.head.objective.weights.mask=0")
