"""The fit of anchors, against every anchor of the real grid compared with every object, one by one."""

from dataclasses import replace

import pytest
import torch
from support import valid_rows
from torchvision.ops import box_iou

from brs_detr.config import apply_overrides, load_config
from brs_detr.data.anchor_fit import (
    AS_GOOD,
    CLEARLY,
    MAX_OBJECTS,
    SCALES,
    AnchorLayout,
    Boxes,
    Fit,
    at_training_size,
    best_overlap,
    best_scale,
    boxes_of,
    boxes_of_json,
    class_shares,
    evenly_spaced,
    fit,
    resized_sizes,
)
from brs_detr.data.coco import CocoDetection
from brs_detr.data.json_file import load_json
from brs_detr.data.synthetic import make_dataset
from brs_detr.ops.anchors import AnchorGrid, inside_image, octave_scales, valid_extents
from brs_detr.ops.images import resized_size

LAYOUTS = {
    "rpn": AnchorLayout((4, 8, 16, 32), 2.0, 3, (0.5, 1.0, 2.0)),
    "one a cell": AnchorLayout((8, 16, 32), 4.0, 1, (1.0,)),
    "not beyond the border": AnchorLayout((4, 8, 16, 32, 64), 3.0, 2, (0.5, 1.0, 2.0), border=0.0),
    "a little beyond the border": AnchorLayout((8, 16), 4.0, 1, (0.5, 2.0), border=5.0),
    "points": AnchorLayout((8, 16, 32), 3.0, 1, (1.0, 2.0), offset=0.5),
    "cells divide the image": AnchorLayout((8, 16, 32), 3.0, 1, (0.5, 1.0), offset=0.5, even=True),
}


def objects(number=60):
    """Of images of many sizes, a tenth of them at the border."""
    generator = torch.Generator().manual_seed(7)
    sizes = torch.randint(20, 140, (number, 2), generator=generator).float()
    low = torch.rand(number, 2, generator=generator) * (sizes.flip(1) - 6)
    side = 2 + torch.rand(number, 2, generator=generator) ** 2 * 80
    high = torch.minimum(low + side, sizes.flip(1))
    high[::10] = sizes[::10].flip(1)
    return Boxes(torch.cat([low, high], dim=1), sizes, torch.zeros(number, dtype=torch.int64))


def slow_overlap(box, size, layout):
    """The best IoU of one object with every anchor that its image gives the detector."""
    height, width = (int(side) for side in size)
    shapes = [(-(-height // stride), -(-width // stride)) for stride in layout.strides]
    grid = AnchorGrid(layout.strides, octave_scales(layout.scale, layout.per_octave), layout.ratios, layout.offset)
    if layout.even:  # one level at a time, whose cells divide the image between them
        levels = [
            AnchorGrid((stride,), octave_scales(layout.scale, layout.per_octave), layout.ratios, layout.offset)(
                [shape], frame=(height, width)
            )[0]
            for stride, shape in zip(layout.strides, shapes, strict=True)
        ]
    else:
        levels = grid(shapes)
    anchors = valid_rows(levels, valid_extents((height, width), shapes, layout.strides))
    if layout.border is not None:
        anchors = anchors[inside_image(anchors, (height, width), layout.border)]
    return box_iou(box[None], anchors).max() if len(anchors) else torch.tensor(0.0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_best_overlap_is_that_with_every_anchor_of_the_grid(name):
    boxes = objects()
    pairs = zip(boxes.boxes, boxes.sizes, strict=True)
    slow = torch.stack([slow_overlap(box, size, LAYOUTS[name]) for box, size in pairs])
    torch.testing.assert_close(best_overlap(boxes, LAYOUTS[name]), slow, rtol=1e-4, atol=1e-6)
    assert slow.max() > 0.6  # the test sees good and bad anchors
    shares = [float((slow >= iou).double().mean()) for iou in (0.5, 0.7)]
    assert fit(boxes, LAYOUTS[name]) == pytest.approx(shares, abs=1 / len(slow))


def test_an_anchor_beside_its_object_by_half_a_cell_overlaps_it_as_counted_by_hand():
    """8 pixels, 2 pixels beside it both ways: 36 of 128 - 36; of the same shape and place: all of it."""
    boxes = Boxes(torch.tensor([[6.0, 6, 14, 14], [4, 4, 12, 12]]), torch.full((2, 2), 64.0), torch.tensor([0, 1]))
    assert best_overlap(boxes, AnchorLayout((4,), 2.0, 1, (1.0,))).tolist() == pytest.approx([36 / 92, 1.0])


def squares(side, number, label):
    """Of one class, at the centers of cells of stride 8."""
    low = 48 + 8 * torch.arange(number)[:, None].expand(-1, 2) - side / 2
    return Boxes(torch.cat([low, low + side], dim=1), torch.full((number, 2), 400.0), torch.full((number,), label))


def joined(*boxes):
    return Boxes(*(torch.cat(columns) for columns in zip(*boxes, strict=True)))


def test_of_a_head_that_adapts_to_each_object_tight_anchors_count_as_much():
    layout = AnchorLayout((8, 16, 32, 64), 2.0, 3, (1.0,))
    boxes = joined(*(squares(side, 40, label=0) for side in (28, 31, 34, 40)), squares(12, 15, label=1))
    chosen, fitted = best_scale(boxes, replace(layout, adaptive=True))
    assert fitted.both == max(fit(boxes, layout.with_scale(scale)).both for scale in SCALES)
    assert fitted.both > best_scale(boxes, layout)[1].both and chosen.adaptive
    # one that fits a little worse is kept, one that fits much worse is not
    fits = {scale: fit(boxes, layout.with_scale(scale)).both for scale in SCALES}
    for scale, both in fits.items():
        kept = best_scale(boxes, replace(layout, adaptive=True, scale=scale))[0].scale == scale
        assert kept == (both > max(fits.values()) - CLEARLY)
    assert sum(both > max(fits.values()) - CLEARLY for both in fits.values()) > 1


def test_shares_are_means_over_classes():
    layout = AnchorLayout((8,), 4.0, 1, (1.0,))  # of 32 pixels
    frequent, rare, missing = squares(32, 30, label=9), squares(26, 3, label=2), squares(8, 1, label=4)
    assert fit(joined(frequent, rare), layout) == (1.0, pytest.approx(0.5))  # 26 ** 2 / 32 ** 2 = 0.66
    assert fit(joined(frequent, rare, missing), layout) == pytest.approx((2 / 3, 1 / 3))
    labels, shares = class_shares(joined(frequent, rare, missing), layout)
    assert (labels.tolist(), shares.tolist()) == ([2, 4, 9], [[1, 0], [0, 0], [1, 1]])


def test_a_rare_class_of_other_sizes_keeps_its_anchors():
    """As BCCD's platelets: anchors that fit the cells a little better would leave them without any."""
    layout = AnchorLayout((8, 16, 32, 64), 2.0, 3, (1.0,))
    cells, platelets = joined(*(squares(side, 40, label=0) for side in (28, 31, 34, 40))), squares(12, 15, label=1)
    alone, both = best_scale(cells, layout)[0], best_scale(joined(cells, platelets), layout)[0]
    assert fit(platelets, alone).at_50 == 0 and fit(cells, alone).at_70 >= fit(cells, both).at_70
    assert fit(platelets, both).at_50 == 1 and fit(cells, both).at_50 == 1


def test_no_objects_fit_nothing():
    assert fit(Boxes(torch.zeros(0, 4), torch.zeros(0, 2), torch.zeros(0)), LAYOUTS["rpn"]) == (0, 0)


def test_the_best_scale_leaves_fewest_objects_without_an_anchor_and_is_the_same_each_time():
    boxes, layout = objects(400), LAYOUTS["rpn"]
    chosen, fitted = best_scale(boxes, layout)
    fits = [fit(boxes, layout.with_scale(scale)) for scale in SCALES]
    good = [each for each in fits if each.at_50 >= max(each.at_50 for each in fits) - AS_GOOD]
    assert fitted.at_70 == max(each.at_70 for each in good) and fitted == fit(boxes, chosen)
    assert best_scale(boxes, layout.with_scale(16.0))[0] == chosen == best_scale(boxes, chosen)[0]


def test_a_scale_that_fits_no_better_does_not_replace_the_own_one():
    boxes = Boxes(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[64.0, 64]]), torch.tensor([5]))  # no anchor reaches .5
    assert best_scale(boxes, LAYOUTS["rpn"].with_scale(2.7))[0].scale == 2.7


def test_objects_as_large_as_the_anchors_of_a_scale_have_that_scale():
    """On the grid of the finest level, at cells in whole images."""
    centers = torch.arange(40, 60, 4.0)
    boxes = torch.stack([centers - 16, centers - 16, centers + 16, centers + 16], dim=1)
    everything = Boxes(boxes, torch.full((5, 2), 128.0), torch.arange(5))
    chosen, fitted = best_scale(everything, AnchorLayout((4,), 2.0, 1, (1.0,)))
    assert fitted == Fit(1.0, 1.0) and 6.8 <= chosen.scale <= 9.6  # nearest to 2 of those above .7


@pytest.mark.parametrize(("short", "long"), [(70, 88), (640, 1066), (33, 1000)])
def test_sizes_are_those_of_the_transforms(short, long):
    sizes = torch.randint(1, 2000, (50, 2), generator=torch.Generator().manual_seed(1)).float()
    expected = [resized_size(*map(float, size), short, long) for size in sizes]
    assert resized_sizes(sizes, short, long).int().tolist() == [list(size) for size in expected]


def test_boxes_are_those_of_training_and_of_its_json(tmp_path):
    root = make_dataset(tmp_path, train=12, val=2, image_size=72)
    path = root / "annotations" / "train.json"
    dataset = CocoDetection(path, root / "images" / "train", train=True)
    ours, theirs = boxes_of(dataset.packed), boxes_of_json(load_json(path, 2**30))
    weights = torch.tensor([1.0, 3, 7, 11], dtype=torch.float64)
    order, other = (torch.argsort(boxes.boxes.double() @ weights) for boxes in (ours, theirs))
    torch.testing.assert_close(ours.boxes[order], theirs.boxes[other], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(ours.sizes[order], theirs.sizes[other])
    ids = torch.tensor(dataset.category_ids)
    assert torch.equal(ids[ours.labels[order]], theirs.labels[other])
    data = load_config("demo").data
    trained = at_training_size(ours, data)
    assert len(trained.boxes) == len(ours.boxes) * len(data.augment.short_sides)
    assert set(trained.sizes.amin(dim=1).tolist()) <= {56.0, 62.0, 68.0, 74.0} | set(range(50, 75))
    scales = (trained.sizes / ours.sizes.repeat(len(data.augment.short_sides), 1)).flip(1).repeat(1, 2)
    assert torch.equal(trained.labels, ours.labels.repeat(len(data.augment.short_sides)))
    torch.testing.assert_close(trained.boxes, ours.boxes.repeat(len(data.augment.short_sides), 1) * scales)


def test_a_square_is_the_only_size_of_ssd_augmentation():
    data = apply_overrides(load_config("demo"), ["data.augment={name: ssd, size: 96}"]).data
    boxes = at_training_size(objects(), data)
    assert boxes.sizes.unique().tolist() == [96.0] and len(boxes.boxes) == 60
    assert (boxes.boxes <= 96 + 1e-3).all()


def test_large_datasets_are_sampled_evenly():
    rows = torch.arange(100_000)
    few = evenly_spaced(rows, 1001)
    assert (len(few), few[0], few[-1]) == (1001, 0, 99_999) and (few.diff() - 100).abs().max() <= 1
    stored = Boxes(*(column.repeat(500, *[1] * (column.dim() - 1)) for column in objects()))
    assert len(at_training_size(stored, load_config("demo").data).boxes) <= MAX_OBJECTS
