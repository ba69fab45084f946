"""Images on a canvas: every detector trains on them, and what it finds is mapped back to the stored image."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEMO, ROOT, SMALL_DETECTOR
from torchvision.ops import clip_boxes_to_image

from brs_detr.config import load_config
from brs_detr.data.lsj_transforms import LSJTransforms
from brs_detr.data.transforms import EvalTransforms
from brs_detr.models.config import HardNMS
from brs_detr.models.views import detect_in_views, detect_on_canvas
from brs_detr.ops.images import ImageBatch
from brs_detr.ops.masks import as_rles, boxes_around, decode_masks, encode_masks
from brs_detr.run.setup import build_detector

SMALLER = ["model.backbone.name=test_resnet.r160_in1k", "model.backbone.pretrained=false"]
HEADS = {head: (DEMO, [*SMALL_DETECTOR, f"eval.predict_with={head}"]) for head in ("decoder", "roi", "atss")}
CNN = ("retinanet", "foveabox", "atss", "paa", "faster_rcnn", "cascade_rcnn", "mask_rcnn", "yolact", "solov2")
CNNS = {f"cnn_{name}": (str(ROOT / "configs" / "cnn" / f"{name}_small.yaml"), SMALLER) for name in CNN}
CANVAS = 96


def detector(name, *changes):
    recipe, small = (HEADS | CNNS)[name]
    return build_detector(load_config(recipe, [*small, "data.test_canvas=96", *changes]), 3, initial_weights=False)


def batch_of(images, side=CANVAS):
    """The images on canvases, as the predictor and the validation make the batch."""
    transform, stored = EvalTransforms(canvas=side), [(image.shape[1], image.shape[2]) for image in images]
    contents = [transform.content_sizes(*size)[0] for size in stored]
    return ImageBatch.from_list([transform.views(image)[0] for image in images], stored, contents)


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def drawn(canvas_boxes, masks=None):
    """A detector that finds boxes (n, 4) given in pixels of the canvas, and knows no canvas."""

    def detect(images):
        assert images.content_sizes is None
        found = []
        for (h, w), (full_h, full_w) in zip(images.sizes, images.original_sizes, strict=True):
            boxes = canvas_boxes * torch.tensor([full_w / w, full_h / h] * 2)
            own = {"boxes": boxes, "scores": torch.arange(len(boxes)) / 8, "labels": torch.arange(len(boxes))}
            if masks:
                full = torch.zeros(len(boxes), full_h, full_w, dtype=torch.bool)
                for mask, (x1, y1, x2, y2) in zip(full, boxes.round().int().tolist(), strict=True):
                    mask[y1:y2, x1:x2] = True
                own["masks"] = encode_masks(full) if masks == "rle" else full
            found.append(own)
        return {"head": found}

    return detect


side = st.integers(1, 3000)


@settings(max_examples=200, deadline=None)
@given(side, side, st.sampled_from([64, 1024, 1536]), st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.05, 1))
def test_boxes_return_to_where_they_were_in_the_stored_image(height, width, canvas, x, y, part):
    """To a thousandth of a pixel, whatever the rounding of the resized image."""
    content = EvalTransforms(canvas=canvas).resized(height, width)
    box = torch.tensor([[x * width, y * height, min(1, x + part) * width, min(1, y + part) * height]])
    factors = torch.tensor([content[1] / width, content[0] / height] * 2, dtype=torch.float64)
    on_canvas = (box.double() * factors).float()
    images = ImageBatch(torch.zeros(1, 3, 1, 1), [(canvas, canvas)], [(height, width)], [content])
    [found] = detect_on_canvas(drawn(on_canvas), images)["head"]
    assert (found["boxes"] - box).abs().max() <= 1e-3
    plain = replace(images, content_sizes=None)
    assert detect_on_canvas(lambda batch: {"": [batch]}, plain)[""][0] is plain  # without a canvas nothing changes


@pytest.mark.parametrize("masks", [None, "rle", "bitmaps"])
def test_what_is_beside_the_image_is_cut_or_dropped(masks):
    """An image of 40 x 80 pixels fills the upper half of a canvas of 64: a scale of 0.8."""
    images = batch_of([noise(40, 80)], 64)
    boxes = torch.tensor([[8.0, 4, 24, 20], [40, 20, 60, 50], [10, 40, 30, 60]])  # inside, across the edge, beside
    [found] = detect_on_canvas(drawn(boxes, masks), images)["head"]
    torch.testing.assert_close(found["boxes"], torch.tensor([[10.0, 5, 30, 25], [50, 25, 75, 40]]))
    assert found["labels"].tolist() == [0, 1] and found["scores"].tolist() == [0, 0.125]
    if masks:
        bitmaps = decode_masks(as_rles(found["masks"]), (40, 80))
        assert torch.equal(boxes_around(bitmaps), found["boxes"])
        assert torch.equal(bitmaps.sum((1, 2)), torch.tensor([20 * 20, 25 * 15]))


def test_a_mirrored_view_is_mirrored_inside_the_image():
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[:, 5:25, 10:30] = 255

    def bright(batch):
        found = []
        for pixels, (h, w), (full_h, full_w) in zip(batch.pixels, batch.sizes, batch.original_sizes, strict=True):
            boxes = boxes_around(pixels[:1] > 200) * torch.tensor([full_w / w, full_h / h] * 2)
            found.append({"boxes": boxes, "scores": torch.ones(1), "labels": torch.zeros(1, dtype=torch.long)})
        return {"": found}

    images = batch_of([image], 64)
    assert (images.flipped().pixels[0, :, 32:] == 114).all() and not (images.pixels[0, :, :32] == 114).all()
    assert not torch.equal(images.flipped().pixels, images.pixels)
    for flip in (False, True):
        [found] = detect_in_views(bright, images, flip=flip, nms_iou=0.6)[""]
        torch.testing.assert_close(found["boxes"], torch.tensor([[10.0, 5, 30, 25]]))


@pytest.mark.parametrize("name", [*HEADS, *CNNS])
def test_detections_are_those_of_the_canvas_at_the_scale_of_the_image(name):
    """Every detector and head: the canvas as an image of its own, then its boxes scaled and clipped."""
    model = detector(name).eval()
    assert model.test_canvas == CANVAS
    images = batch_of([noise(50, 80), noise(120, 60)])
    assert not images.padding_mask().any() and images.sizes == [(CANVAS, CANVAS)] * 2
    with torch.no_grad():
        mapped, whole = model(images), model(replace(images, original_sizes=images.sizes, content_sizes=None))
    for own, every, content, stored in zip(mapped, whole, images.content_sizes, images.original_sizes, strict=True):
        factors = torch.tensor([stored[1] / content[1], stored[0] / content[0]] * 2)
        boxes = clip_boxes_to_image(every["boxes"] * factors, stored)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        assert len(own["scores"]) == kept.sum()
        apart = (own["boxes"] - boxes[kept]).abs().amax(1)
        if name == "cnn_solov2":  # its boxes are around masks, which are drawn in pixels of the stored image
            assert (apart < 2).float().mean() > 0.9
        else:
            assert apart.max() <= 1e-3
        assert torch.equal(own["labels"], every["labels"][kept])
        if "masks" in own:
            assert decode_masks(as_rles(own["masks"]), stored).shape == (len(own["scores"]), *stored)


def test_suppression_of_the_decoder_is_that_of_the_canvas():
    model = detector("decoder", "eval.nms.kind=soft", "eval.nms.iou=0.3").eval()
    images = batch_of([noise(50, 80)])
    with torch.no_grad():
        soft = model(images)[0]
        model.nms = HardNMS(iou=0.3)
        hard = model(images)[0]
    assert len(soft["scores"]) >= len(hard["scores"]) > 0 and (soft["scores"].diff() <= 0).all()


@pytest.mark.parametrize("name", ["decoder", *CNNS])
def test_every_detector_trains_on_canvases(name):
    """A step on images of large-scale jitter, one of them so small that most of the canvas is gray."""
    model, generator = detector(name).train(), torch.Generator().manual_seed(0)
    transform = LSJTransforms(size=CANVAS, scales=(0.5, 1.5))
    samples = []
    for height, width in ((50, 80), (120, 60)):
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        masks[0, 4:34, 8:40] = masks[1, 12:45, 20:55] = 1
        target = {"boxes": boxes_around(masks), "labels": torch.tensor([0, 2]), "masks": masks}
        samples.append(transform(noise(height, width), target, generator))
    images, targets = zip(*samples, strict=True)
    batch = ImageBatch.from_list(images)
    assert batch.sizes == [(CANVAS, CANVAS)] * 2 and sum(len(target["labels"]) for target in targets) > 0
    losses = model(batch, list(targets))
    total = sum(losses.values())
    total.backward()
    assert total.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters() if p.requires_grad)
