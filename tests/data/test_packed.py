"""Masks of a dataset are those that pycocotools draws; faults are counted and have the box as mask."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from brs_detr.data.coco import CocoDetection
from brs_detr.data.loader import build_eval_loader, build_train_loader
from brs_detr.data.packed import draw_masks, draw_masks_in
from brs_detr.data.synthetic import make_dataset
from brs_detr.data.transforms import EvalTransforms, TrainTransforms
from brs_detr.ops.rle import draw, pack_segmentation


def open_set(path, train=True, **options):
    return CocoDetection(path, path.parent / "images", train=train, masks=True, **options)


@pytest.mark.parametrize("name", ["tiny_coco", "nuclei"])
def test_masks_equal_what_pycocotools_draws(shared_data, name):
    path = shared_data / name / "annotations" / "val.json"
    dataset = CocoDetection(path, shared_data / name / "images", train=False, masks=True)
    truth = COCO(str(path))
    for index in range(0, len(dataset), 5):
        target = dataset.load(index)[1]
        theirs = [a for a in truth.imgToAnns[target["image_id"]] if not a["iscrowd"]]
        expected = np.stack([truth.annToMask(a) for a in theirs]) if theirs else np.zeros((0, *target["original_size"]))
        assert target["masks"].dtype == torch.uint8 and target["masks"].shape == expected.shape
        assert np.array_equal(target["masks"].numpy(), expected)
    ground = {(a["image_id"], *a["bbox"]): a["segmentation"] for a in dataset.ground_truth()["annotations"]}
    for annotation in truth.dataset["annotations"]:
        rle, size = ground[annotation["image_id"], *annotation["bbox"]], truth.annToMask(annotation).shape
        drawn = draw(np.frombuffer(pack_segmentation(json.loads(json.dumps(rle))), np.uint32), size)
        assert np.array_equal(drawn, truth.annToMask(annotation))


def annotations_of(frame):
    """A dataset of one image, of (h, w) pixels by its json, with 20 objects: polygons, run lengths, none, thin."""
    height, width = frame
    shapes = []
    for number in range(20):
        x, y, side = (0.04 * number * width, 0.03 * number * height, 0.2 * min(frame))
        runs = np.zeros(frame, np.uint8, order="F")
        runs[int(y) : int(y + side), int(x) : int(x + side / 2)] = 1
        polygon = [[x, y, x + side, y + 0.1 * side, x + 0.4 * side, y + side, x + 0.1 * side, y + 0.5 * side]]
        thin = [[x, y, x + side, y, x + side, y + 0.01]]
        rle = coco_mask.encode(runs)
        coded = {"size": list(frame), "counts": rle["counts"].decode()}
        shape = {"segmentation": [polygon, coded, None, thin][number % 4], "bbox": [x, y, side, side]}
        shapes.append({"id": number + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": side**2, **shape})
    image = {"id": 1, "file_name": "a.png", "height": height, "width": width}
    return {"images": [image], "annotations": shapes, "categories": [{"id": 1, "name": "a"}]}


@pytest.mark.parametrize("size", [(30, 40), (61, 83), (97, 129), (360, 480), (50, 200), (500, 90)])
def test_masks_of_a_json_of_another_size_are_those_of_its_frame_resized(tmp_path, size):
    """To the nearest center where the aspect ratio is that of the json, else cut or padded."""
    path, frame = tmp_path / "a.json", (240, 320)
    path.write_text(json.dumps(annotations_of(frame)))
    (tmp_path / "images").mkdir()
    Image.new("RGB", frame[::-1]).save(tmp_path / "images" / "a.png")
    packed = open_set(path, inspect=False).packed
    rows = np.arange(20)
    masks = torch.from_numpy(draw_masks(packed, rows, frame))
    resized = torch.nn.functional.interpolate(masks[:, None], size, mode="nearest-exact")[:, 0]
    assert np.array_equal(draw_masks_in(packed, rows, frame, size, is_scaled=True), resized.numpy())
    padded = torch.nn.functional.pad(masks, (0, 500, 0, 500))[:, : size[0], : size[1]]
    assert np.array_equal(draw_masks_in(packed, rows, frame, size, is_scaled=False), padded.numpy())


def test_a_small_image_of_a_large_json_takes_no_memory_of_the_json_s_size(tmp_path):
    """48 megapixels in the json, half a megapixel in the file: the bitmaps of one object would take 48 MB."""
    path = tmp_path / "a.json"
    content = annotations_of((600, 800))
    for shape in content["annotations"]:
        shape["bbox"] = [10 * value for value in shape["bbox"]]
        if isinstance(shape["segmentation"], list):
            shape["segmentation"] = [[10 * value for value in part] for part in shape["segmentation"]]
    content["images"][0] |= {"height": 6000, "width": 8000}
    content["annotations"] = [s for s in content["annotations"] if not isinstance(s["segmentation"], dict)]
    path.write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (800, 600)).save(tmp_path / "images" / "a.png")
    dataset = open_set(path, inspect=False)
    tracemalloc.start()
    target = dataset.load(0)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert target["masks"].shape == (15, 600, 800) and target["masks"].flatten(1).any(1).all()
    assert peak < 30e6, peak  # 7 MB of them are the masks


FAULTS = {
    "absent": ("mask_missing", None),
    "empty": ("mask_missing", []),
    "nan": ("mask_malformed", [[1, 2, 3, 4, 5, float("nan")]]),
    "runs": ("mask_malformed", {"size": [40, 60], "counts": [9999]}),
    "text": ("mask_malformed", {"size": [40, 60], "counts": "o" * 50}),
    "zero": ("mask_malformed", {"size": [0, 2**32], "counts": "0"}),
    "size": ("mask_of_other_size", {"size": [30, 60], "counts": [0, 1800]}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("train", [True, False])
def test_an_unusable_mask_is_counted_and_is_the_box(tmp_path, write_dataset, change, fault, train):
    kind, segmentation = FAULTS[fault]
    path = write_dataset(tmp_path, sizes=[(40, 60)], boxes=[[(1, 5, 6, 20, 10), (17, 0, 0, 8, 8)]])

    def edit(data):
        data["annotations"][0]["segmentation"] = segmentation
        data["annotations"][1]["segmentation"] = [[0, 0, 8, 0, 8, 8]]

    change(path, edit)
    dataset = open_set(path, train)
    assert dataset.report[kind] == 1 and kind.replace("_", " ") in dataset.summary()
    first, second = dataset.load(0)[1]["masks"]
    assert first.sum() == 200 and first[6:16, 5:25].all() and 20 < second.sum() < 45
    if not train:
        rle = dataset.ground_truth()["annotations"][0]["segmentation"]
        assert np.array_equal(draw(np.frombuffer(pack_segmentation(rle), np.uint32), (40, 60)), first.numpy())


DRAWN = {  # of a box at (5, 6) of 20 x 10 pixels
    "thin": ("mask_empty", [[5, 6.2, 25, 6.2, 25, 6.3]]),
    "runs of background": ("mask_empty", {"size": [40, 60], "counts": [2400]}),
    "outside of the image": ("mask_empty", [[70, 6, 90, 6, 90, 16]]),
    "beside": ("mask_not_in_box", [[30, 6, 50, 6, 50, 16, 30, 16]]),
    "half as high, half as wide": ("mask_not_in_box", [[5, 6, 13, 6, 13, 10, 5, 10]]),
    "rows and columns exchanged": ("mask_not_in_box", [[6, 5, 16, 5, 16, 25, 6, 25]]),
    "part of the image": ("mask_not_in_box", {"size": [40, 60], "counts": [0, 2400]}),
    "exact": (None, [[5, 6, 25, 6, 25, 16, 5, 16]]),
    "a triangle": (None, [[5, 6, 25, 6, 5, 16]]),
    "a pixel aside": (None, [[4, 5, 24, 5, 24, 15, 4, 15]]),
}


@pytest.mark.parametrize("case", DRAWN)
@pytest.mark.parametrize("train", [True, False])
def test_a_mask_that_is_empty_or_not_in_its_box_is_counted_where_masks_are_drawn(
    tmp_path, write_dataset, change, case, train
):
    kind, segmentation = DRAWN[case]
    path = write_dataset(tmp_path, sizes=[(40, 60)], boxes=[[(1, 5, 6, 20, 10), (17, 0, 0, 8, 8)]])

    def edit(data):
        data["annotations"][0]["segmentation"] = segmentation
        data["annotations"][1]["segmentation"] = [[0, 0, 8, 0, 8, 8, 0, 8]]

    change(path, edit)
    counted = {name for name in open_set(path, train, draw_all=True).report if name.startswith("mask_")}
    assert counted == ({kind} if kind else set())
    # and nothing else becomes of them
    drawn, plain = open_set(path, train, draw_all=True), open_set(path, train)
    assert not any(name.startswith("mask_") for name in plain.report)
    assert torch.equal(drawn.load(0)[1]["masks"], plain.load(0)[1]["masks"])
    assert drawn.fingerprint() == plain.fingerprint()
    if kind == "mask_empty":
        assert drawn.load(0)[1]["masks"][0].sum() == 200


def test_a_box_that_sticks_out_of_its_image_fits_the_mask_inside(tmp_path, write_dataset, change):
    path = write_dataset(tmp_path, sizes=[(40, 60)], boxes=[[(1, 50, 6, 200, 10)]])
    change(path, lambda data: data["annotations"][0].update(segmentation=[[50, 6, 60, 6, 60, 16, 50, 16]]))
    for train in (True, False):
        assert not any(name.startswith("mask_") for name in open_set(path, train, draw_all=True).report)


def test_the_mask_of_a_crowd_need_not_fit(tmp_path, write_dataset, change):
    path = write_dataset(tmp_path, sizes=[(40, 60)], boxes=[[(1, 5, 6, 20, 10), (17, 0, 0, 8, 8)]])

    def edit(data):
        for annotation in data["annotations"]:
            annotation["segmentation"] = {"size": [40, 60], "counts": [2000, 64, 336]}
        data["annotations"][0]["iscrowd"] = 1

    change(path, edit)
    assert open_set(path, draw_all=True).report["mask_not_in_box"] == 1


@pytest.mark.parametrize("name", ["tiny_coco", "nuclei", "bccd"])
def test_real_masks_fit_their_boxes(shared_data, name):
    for split in ("train", "val"):
        path = shared_data / name / "annotations" / f"{split}.json"
        dataset = CocoDetection(path, shared_data / name / "images", train=True, masks=True, draw_all=True)
        assert not dataset.report.keys() & {"mask_empty", "mask_not_in_box", "mask_malformed", "mask_of_other_size"}


def test_boxes_only_keeps_nothing_of_the_masks(tmp_path):
    make_dataset(tmp_path, train=4, val=1)
    path = tmp_path / "annotations" / "train.json"
    plain = CocoDetection(path, tmp_path / "images/train", train=True)
    masked = CocoDetection(path, tmp_path / "images/train", train=True, masks=True)
    assert plain.packed.mask_words is None and "masks" not in plain[0][1]
    data = json.loads(path.read_text())
    for annotation in data["annotations"]:
        del annotation["segmentation"]
    path.write_text(json.dumps(data))
    assert plain.fingerprint() == CocoDetection(path, tmp_path / "images/train", train=True).fingerprint()
    assert masked.fingerprint() != plain.fingerprint()


def test_masks_take_four_bytes_a_number(tmp_path):
    make_dataset(tmp_path, train=20, val=1)
    path = tmp_path / "annotations" / "train.json"
    dataset = CocoDetection(path, tmp_path / "images/train", train=True, masks=True)
    polygons = [a["segmentation"] for a in json.loads(path.read_text())["annotations"]]
    numbers = sum(1 + sum(1 + len(part) for part in parts) for parts in polygons)
    assert dataset.packed.mask_words.nbytes == 4 * numbers


@pytest.mark.parametrize("factor", [2, 0.5])
def test_masks_follow_an_image_that_was_resized_after_labeling(tmp_path, write_dataset, change, factor):
    path = write_dataset(tmp_path, sizes=[(80, 120)], boxes=[[(1, 20 * factor, 10 * factor, 40 * factor, 30 * factor)]])
    height, width = int(80 * factor), int(120 * factor)

    def edit(data):
        data["images"][0].update(height=height, width=width)
        x, y, w, h = data["annotations"][0]["bbox"]
        data["annotations"][0]["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]

    change(path, edit)
    target = open_set(path, inspect=False).load(0)[1]
    assert target["masks"].shape == (1, 80, 120)
    assert target["masks"][0, 10:40, 20:60].float().mean() > 0.97 and abs(int(target["masks"].sum()) - 1200) < 60


def test_masks_are_collated_and_survive_workers(tmp_path):
    make_dataset(tmp_path, train=8, val=5)
    path = tmp_path / "annotations" / "train.json"
    options = dict(short_sides=(64, 90), long_side=120, crop_short_sides=(70,), crop_size=(30, 60))
    dataset = CocoDetection(
        path, tmp_path / "images/train", train=True, masks=True, transforms=TrainTransforms(**options)
    )
    alone, helped = (list(build_train_loader(dataset, 4, workers)) for workers in (0, 2))
    for (images, targets), (_, others) in zip(alone, helped, strict=True):
        for target, other, size in zip(targets, others, images.sizes, strict=True):
            assert target["masks"].shape == (len(target["labels"]), *size)
            assert torch.equal(target["masks"], other["masks"]) and torch.equal(target["boxes"], other["boxes"])
        assert len({t["masks"].untyped_storage().data_ptr() for t in targets if t["masks"].numel()}) == 1


def test_evaluation_has_the_masks_in_the_ground_truth_alone(tmp_path):
    make_dataset(tmp_path, train=1, val=5)
    path = tmp_path / "annotations" / "val.json"
    dataset = CocoDetection(path, tmp_path / "images/val", train=False, masks=True, transforms=EvalTransforms(60, 200))
    assert all("masks" not in target for _, targets in build_eval_loader(dataset, 2) for target in targets)
    assert all("segmentation" in annotation for annotation in dataset.ground_truth()["annotations"])
    image, target = EvalTransforms(60, 200)(*dataset.load(0))
    assert target["masks"].shape[1:] == image.shape[1:]
