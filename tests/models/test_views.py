"""Several scales and a mirrored image: boxes and masks of all views in the stored image, one of each object."""

from dataclasses import replace

import pytest
import torch
from support import DEMO, ROOT, SMALL_DETECTOR

from brs_detr.config import load_config
from brs_detr.data.build import build_eval_transforms
from brs_detr.data.config import DataConfig
from brs_detr.data.loader import to_batch
from brs_detr.models.views import detect_in_views, flip_boxes, join
from brs_detr.ops.images import ImageBatch, ImageViews
from brs_detr.ops.masks import as_rles, decode_masks, encode_masks
from brs_detr.run.setup import build_detector

SMALLER = ["model.backbone.name=test_resnet.r160_in1k", "model.backbone.pretrained=false"]
DETECTORS = {
    "decoder": (DEMO, [*SMALL_DETECTOR, "eval.predict_with=decoder"]),
    "roi": (DEMO, [*SMALL_DETECTOR, "model.rpn.test_proposals=20", "eval.predict_with=roi"]),
    "atss": (DEMO, [*SMALL_DETECTOR, "eval.predict_with=atss"]),
    **{
        name: (str(ROOT / "configs" / "cnn" / f"{name}_small.yaml"), [*SMALLER, "model.dim=32"])
        for name in ("retinanet", "paa", "faster_rcnn", "mask_rcnn", "yolact", "solov2")
    },
}


def detector(name, *settings):
    recipe, small = DETECTORS[name]
    return build_detector(load_config(recipe, [*small, *settings]), 3, initial_weights=False).eval()


def noise(height=64, width=90):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def views_of(images, scales):
    transforms = build_eval_transforms(DataConfig(), scales)
    return to_batch([transforms.views(image) for image in images], [tuple(image.shape[1:]) for image in images])


def rectangle(batch):
    """A detector of the bright pixels of each image, whose score is the width of what it looks at."""
    found = []
    for pixels, (h, w), (full_h, full_w) in zip(batch.pixels, batch.sizes, batch.original_sizes, strict=True):
        y, x = (pixels[0, :h, :w] > 128).nonzero().unbind(1)
        box = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
        box = box * torch.tensor([full_w / w, full_h / h] * 2)
        mask = torch.zeros(1, full_h, full_w, dtype=torch.bool)
        x1, y1, x2, y2 = box.round().int().tolist()
        mask[0, y1:y2, x1:x2] = True
        score = torch.tensor([w / 1000])
        found.append({"boxes": box[None], "scores": score, "labels": torch.tensor([1]), "masks": encode_masks(mask)})
    return {"": found}


def test_boxes_and_masks_of_every_view_lie_where_the_object_is():
    images = []
    for height, width in ((60, 90), (60, 96)):  # of two sizes, so that one is padded
        images.append(torch.zeros(3, height, width, dtype=torch.uint8))
        images[-1][:, 12:30, 6:36] = 255
    for scales, flip in (((60, 120), False), ((60,), True), ((30, 60, 120), True)):
        found = detect_in_views(rectangle, views_of(images, scales), flip=flip, nms_iou=0.6)[""]
        for own, image in zip(found, images, strict=True):
            torch.testing.assert_close(own["boxes"], torch.tensor([[6.0, 12, 36, 30]]))
            assert torch.equal(decode_masks(own["masks"], tuple(image.shape[1:]))[0] > 0, image[0] > 0)
            assert own["scores"].item() == pytest.approx(max(scales) / 60 * image.shape[2] / 1000)
            assert own["labels"].tolist() == [1]


def test_the_best_of_the_boxes_of_a_class_that_overlap_stays():
    first = {"boxes": torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]), "scores": torch.tensor([0.5, 0.3])}
    second = {"boxes": torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10]]), "scores": torch.tensor([0.7, 0.4])}
    joined = join([first | {"labels": torch.tensor([0, 0])}, second | {"labels": torch.tensor([0, 1])}], 0.6)
    torch.testing.assert_close(joined["scores"], torch.tensor([0.7, 0.4, 0.3]))
    assert joined["labels"].tolist() == [0, 1, 0] and joined["boxes"][0].tolist() == [0, 0, 10, 9]


def test_boxes_are_mirrored_to_boxes_and_back():
    boxes = torch.tensor([[1.0, 2, 4, 8], [0, 0, 10, 10]])
    assert flip_boxes(boxes, 10).tolist() == [[6, 2, 9, 8], [0, 0, 10, 10]]
    assert torch.equal(flip_boxes(flip_boxes(boxes, 10), 10), boxes)


def test_a_batch_is_mirrored_inside_the_size_of_each_image():
    images = [torch.arange(12).view(1, 2, 6).expand(3, 2, 6), torch.arange(4).view(1, 1, 4).expand(3, 1, 4)]
    flipped = ImageBatch.from_list(images).flipped()
    for pixels, image in zip(flipped.pixels, images, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(pixels[:, :height, :width], image.flip(-1))
        assert not pixels[:, height:].any() and not pixels[:, :, width:].any()


@torch.no_grad()
@pytest.mark.parametrize("name", DETECTORS)
def test_with_the_mirrored_view_a_mirrored_image_has_mirrored_detections(name):
    """Both look at the same two images, so this holds exactly for any detector, whatever its weights."""
    model, image = detector(name, "eval.test_flip=true"), noise()
    found = model(ImageBatch.from_list([image]))[0]
    mirrored = model(ImageBatch.from_list([image.flip(-1)]))[0]
    assert len(found["scores"]) == len(mirrored["scores"]) > 0
    best = slice(0, 20)
    same = found["labels"][best, None] == mirrored["labels"]
    # of class-agnostic proposals several may have the score of the last bit: compared as sets
    far = (flip_boxes(found["boxes"][best], 90)[:, None] - mirrored["boxes"]).abs().amax(2).masked_fill(~same, 1e9)
    nearest, index = far.min(1)
    assert nearest.max() < 1e-3
    torch.testing.assert_close(found["scores"][best], mirrored["scores"][index], atol=1e-6, rtol=1e-4)
    if "masks" in found:
        own, other = (
            decode_masks(as_rles(one["masks"])[:1], (64, 90))
            for one in (found, {**mirrored, "masks": [as_rles(mirrored["masks"])[index[0]]]})
        )
        assert (own.flip(-1) != other).float().mean() < 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", ["decoder", "retinanet", "mask_rcnn"])
def test_one_scale_equals_no_scale(name):
    model, image = detector(name), noise()
    transforms = build_eval_transforms(replace(DataConfig(), test_short_side=80))
    plain = model(ImageBatch.from_list(transforms.views(image), [(64, 90)]))[0]
    one = views_of([image], [80])
    assert isinstance(one, ImageBatch)
    for views in (one, ImageViews([one])):
        found = model(views)[0]
        assert all(torch.equal(found[key], plain[key]) for key in ("boxes", "scores", "labels"))


@torch.no_grad()
def test_every_head_is_joined_over_the_views_and_the_best_first():
    model = detector("roi", "eval.predict_with=auto")
    views = views_of([noise(), noise(50, 90)], [64, 96])
    by_head = model.detect_with_all_heads(views)
    assert set(by_head) == set(model.heads)
    for head, found in by_head.items():
        alone = [model.detect_with_all_heads(scale)[head] for scale in views.scales]
        for image, own in enumerate(found):
            joined = join([view[image] for view in alone], 0.6)
            assert all(torch.equal(own[key], joined[key]) for key in ("boxes", "scores", "labels"))
            assert torch.equal(own["scores"], own["scores"].sort(descending=True).values)


def test_the_long_side_may_grow_with_the_scale():
    config = replace(DataConfig(), test_short_side=800, test_long_side=1332)
    transforms = build_eval_transforms(config, [400, 1200])
    assert transforms.output_sizes(800, 1332) == ((400, 666), (1200, 1998))
    squares = build_eval_transforms(replace(config, test_square=512), [256, 512])
    assert squares.output_sizes(100, 300) == ((256, 256), (512, 512))


def test_training_has_one_size():
    model = detector("retinanet").train()
    with pytest.raises(ValueError, match="one size"):
        model(
            ImageViews([ImageBatch.from_list([noise()])]),
            [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}],
        )
