"""The arrays hold what pycocotools reads, labels follow the json's ids, and every fault has its policy."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from brs_detr.config import Config
from brs_detr.data.coco import CocoDetection
from brs_detr.data.config import Limits
from brs_detr.data.image_io import ImageError
from brs_detr.data.issues import POLICY, DataError


@pytest.fixture()
def two(tmp_path, write_dataset):
    return write_dataset(
        tmp_path,
        sizes=[(40, 60), (60, 40), (50, 50)],
        boxes=[[(90, 5, 6, 20, 10), (1, 0, 0, 60, 40)], [(17, 1, 2, 30, 40)], []],
    )


def open_set(path, train=True, **options):
    return CocoDetection(path, path.parent / "images", train=train, **options)


def damage(file):
    """One wrong byte among the pixels: only reading all of them finds it."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def test_labels_are_positions_of_ascending_category_ids(two):
    dataset = open_set(two)
    assert dataset.category_ids == [1, 17, 90] and dataset.classes == ["a", "b", "c"] and dataset.num_classes == 3
    assert [dataset[i][1]["labels"].tolist() for i in range(3)] == [[2, 0], [1], []]
    assert dataset.image_ids == [1000, 993, 986]


def test_sample_has_the_promised_types(two):
    image, target = open_set(two)[2]
    assert image.dtype == torch.uint8 and image.shape == (3, 50, 50)
    assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
    assert target["labels"].dtype == torch.int64 and target["original_size"] == (50, 50)


def test_empty_images_stay_by_default(two):
    path = two
    assert len(open_set(path)) == 3 and len(open_set(path, keep_empty=False)) == 2
    assert len(open_set(path, train=False, keep_empty=False)) == 3


@pytest.mark.parametrize("name", ["tiny_coco", "nuclei", "bccd"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_arrays_equal_what_pycocotools_sees(shared_data, name, split, capsys):
    path = shared_data / name / "annotations" / f"{split}.json"
    dataset = CocoDetection(path, shared_data / name / "images", train=False)
    truth = COCO(str(path))
    packed = dataset.packed
    assert dataset.category_ids == sorted(truth.getCatIds())
    assert dataset.classes == [truth.cats[key]["name"] for key in dataset.category_ids]
    assert sorted(dataset.image_ids) == sorted(truth.getImgIds())
    for i, key in enumerate(dataset.image_ids):
        rows = slice(packed.offsets[i], packed.offsets[i + 1])
        theirs = truth.imgToAnns[key]
        xywh = np.array([a["bbox"] for a in theirs], float).reshape(-1, 4)
        xywh[:, 2:] += xywh[:, :2]
        assert np.allclose(packed.boxes[rows], xywh, rtol=1e-6)
        assert [dataset.category_ids[label] for label in packed.labels[rows]] == [a["category_id"] for a in theirs]
        assert packed.iscrowd[rows].tolist() == [bool(a["iscrowd"]) for a in theirs]
        assert np.allclose(packed.areas[rows], [a["area"] for a in theirs])
        assert dataset.file_name(i) == truth.imgs[key]["file_name"]
    ground = dataset.ground_truth()
    mine = sorted((a["image_id"], a["category_id"], *a["bbox"], a["area"], a["iscrowd"]) for a in ground["annotations"])
    theirs = truth.dataset["annotations"]
    assert mine == sorted((a["image_id"], a["category_id"], *a["bbox"], a["area"], a["iscrowd"]) for a in theirs)


def test_no_python_object_per_annotation(tmp_path, write_dataset):
    many = [[(1, x % 30, x // 30, 5, 5) for x in range(500)]]
    dataset = open_set(write_dataset(tmp_path, sizes=[(60, 60)], boxes=many))
    assert len(dataset.packed.labels) == 500
    arrays = [value for value in vars(dataset.packed).values() if value is not None]  # there are no masks
    assert all(isinstance(value, np.ndarray) for value in arrays)


FAULTS = {
    "box_negative": {"bbox": [5, 5, -4, 5]},
    "box_empty": {"bbox": [5, 5, 0, 5]},
    "box_not_finite": {"bbox": [5, float("nan"), 4, 5]},
    "box_not_four_numbers": {"bbox": [5, 5, 4]},
    "box_missing": {"bbox": None},
    "box_outside": {"bbox": [70, 5, 5, 5]},
    "box_too_small": {"bbox": [5, 5, 0.5, 5]},
    "image_id_unknown": {"image_id": 4},
    "category_id_unknown": {"category_id": 2},
    "crowd": {"iscrowd": 1},
    "ignored": {"ignore": 1},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_annotation_is_left_out_and_counted(kind, two, change):
    path = change(two, lambda data: data["annotations"][0].update(FAULTS[kind]))
    dataset = open_set(path)
    assert dataset.report[kind] == 1 and dataset.report["objects"] == 2
    assert dataset[0][1]["labels"].tolist() == [0]
    assert POLICY[kind][1] in dataset.summary()


def test_ground_truth_is_what_the_json_means_and_no_more(two, change):
    """COCO's code would miss an annotation 0, count one to ignore, and end at a missing area."""

    def edit(data):
        data["annotations"][0].update(id=0, area=7.5)
        data["annotations"][1].update(ignore=1)
        del data["annotations"][2]["area"], data["annotations"][2]["iscrowd"]
        data["annotations"].append({**data["annotations"][0], "id": 4, "bbox": [0, 0, float("nan"), 5]})

    before = json.loads(two.read_text())["annotations"]
    truth = open_set(change(two, edit), train=False).ground_truth()
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3]
    assert [a["bbox"] for a in truth["annotations"]] == [a["bbox"] for a in before]
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 1, 0]
    width, height = before[2]["bbox"][2:]
    assert [truth["annotations"][i]["area"] for i in (0, 2)] == [7.5, width * height]


def test_boxes_are_clipped_in_training_and_kept_in_evaluation(two, change):
    path = change(two, lambda data: data["annotations"][0].update(bbox=[-5, 30, 20, 30]))
    assert open_set(path)[0][1]["boxes"][0].tolist() == [0, 30, 15, 40]
    assert open_set(path, train=False).ground_truth()["annotations"][0]["bbox"] == [-5, 30, 20, 30]


def test_boxes_beyond_the_stated_size_are_in_the_frame_of_the_image(two, change):
    path = change(two, lambda data: data["images"][0].update(width=30, height=20))
    for train in (True, False):
        image, target = open_set(path, train)[0]
        assert image.shape == (3, 40, 60) and target["original_size"] == (40, 60)
        assert target["boxes"].tolist() == [[5, 6, 25, 16], [0, 0, 60, 40]]


def test_boxes_within_the_stated_size_are_scaled_to_a_shrunk_image(two, change):
    path = change(two, lambda data: data["images"][0].update(width=120, height=80))
    for train in (True, False):
        _, target = open_set(path, train)[0]
        assert target["boxes"].tolist() == [[2.5, 3, 12.5, 8], [0, 0, 30, 20]]
        assert target["original_size"] == (80, 120)  # detections are reported where the json's boxes are


def test_a_json_without_sizes_takes_them_from_the_images(two, change):
    path = change(two, lambda data: [image.pop("width") for image in data["images"]])
    dataset = open_set(path)
    assert dataset.report["size_missing"] == 3 and dataset.packed.frames.tolist() == [[40, 60], [60, 40], [50, 50]]


def test_an_unreadable_image_is_replaced_in_training_and_left_out_of_evaluation(two, caplog):
    path = two
    damage(path.parent / "images" / "000.png")
    dataset = open_set(path)
    assert dataset[0][1]["image_id"] == dataset[0][1]["image_id"] == 993
    assert caplog.text.count("000.png") == 1
    assert ["image 1000 (000.png)" in line for line in dataset.met_while_reading()] == [True]
    assert dataset.report["image_unreadable"] == 1
    assert (dataset.report["images"], dataset.report["objects"]) == (2, 1)  # what is really trained on
    (path.parent / "images" / "000.png").write_bytes(b"")
    assert open_set(path, train=False).image_ids == open_set(path).image_ids == [993, 986]  # the header tells


def test_a_image_that_proves_damaged_when_read_is_marked_in_evaluation(two, caplog):
    """Its header is fine, so that only reading it tells; the rest of the epoch goes on."""
    damage(two.parent / "images" / "000.png")
    dataset = open_set(two, train=False)
    size = tuple(dataset.packed.image_sizes[0].tolist())
    image, target = dataset[0]
    assert "000.png" in caplog.text and "excluded from the evaluation" in caplog.text
    assert target["unreadable"] and target["original_size"] == size and tuple(image.shape) == (3, *size)
    assert len(target["boxes"]) == 0 and "unreadable" not in dataset[1][1]
    assert dataset.report["image_unreadable"] == 1


def test_workers_report_the_unreadable_image_they_met(two):
    path = two
    damage(path.parent / "images" / "000.png")
    dataset = open_set(path)
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, collate_fn=list)
    assert [batch[0][1]["image_id"] for batch in loader] == [993, 993, 986]
    assert dataset.report["image_unreadable"] == 1


def test_the_augmentation_depends_on_seed_epoch_and_image_only(two):
    draw = lambda image, target, generator: (torch.rand(3, generator=generator), target)  # noqa: E731
    dataset, other = (open_set(two, transforms=draw, seed=seed) for seed in (1, 2))
    assert torch.equal(dataset[(1, 5)][0], dataset[(1, 5)][0])
    distinct = {tuple(values.tolist()) for values in (dataset[(1, 5)][0], dataset[(1, 6)][0], dataset[(2, 5)][0])}
    assert len(distinct | {tuple(other[(1, 5)][0].tolist())}) == 4


UNTRAINABLE = {
    "does not exist": lambda path, _: path.unlink(),
    "not a JSON file": lambda path, _: path.write_text("{"),
    "as detection results are": lambda path, _: path.write_text("[]"),
    "no list `categories`": lambda path, change: change(path, lambda data: data.pop("categories")),
    "nothing to detect": lambda path, change: change(path, lambda data: data.update(categories=[])),
    "two categories have the id 1": lambda path, change: change(
        path, lambda data: data["categories"].append({"id": 1})
    ),
    "no integer id": lambda path, change: change(path, lambda data: data["categories"].append({"id": "x"})),
    "Check the image folder": lambda path, _: shutil.rmtree(path.parent / "images"),
    "none of its 3 image entries": lambda path, change: change(path, lambda d: [i.update(id="x") for i in d["images"]]),
    "is empty": lambda path, change: change(path, lambda data: data.update(images=[])),
    "0 of its 3 annotations": lambda path, change: change(
        path, lambda data: [a.update(bbox=0) for a in data["annotations"]]
    ),
}


@pytest.mark.parametrize("message", UNTRAINABLE)
def test_what_cannot_be_trained_on_says_so_in_one_sentence(message, two, change):
    path = two
    UNTRAINABLE[message](path, change)
    with pytest.raises(DataError, match=message) as error:
        open_set(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_image_entry_with_a_used_id_does_not_replace_the_first(two, change):
    path = change(two, lambda data: data["images"].append({**data["images"][1], "id": 1000}))
    dataset = open_set(path)
    assert dataset.report["image_id_duplicate"] == 1 and dataset.file_name(0) == "000.png" and len(dataset) == 3


def test_the_dirty_set_gives_what_its_readme_calls_reasonable(shared_data):
    folder = shared_data / "dirty"
    dataset = CocoDetection(folder / "annotations" / "faulty.json", folder / "images", train=False)
    expected = json.loads((folder / "annotations" / "expected_clean.json").read_text())
    key = lambda a: (a["image_id"], a["category_id"], *a["bbox"])  # noqa: E731
    mine = sorted(map(key, dataset.ground_truth()["annotations"]))
    assert sorted(dataset.image_ids) == sorted(image["id"] for image in expected["images"])
    theirs = {key(a) for a in expected["annotations"]}
    # where its readme leaves the repair open: boxes are not clipped, and a repeated annotation id and numbers in quotes
    # are kept
    assert set(mine) - theirs == {(5, 1, 600, 440, 80, 70), (5, 1, 300, 60, 60, 60), (5, 1, 10, 10, 20, 20)}
    assert theirs - set(mine) == {(5, 1, 600, 440, 40, 40)}


def test_every_dirty_file_can_be_read_through(shared_data):
    folder = shared_data / "dirty"
    for path in sorted((folder / "annotations" / "one_fault").glob("*.json")):
        dataset = CocoDetection(path, folder / "images", train=True)
        dataset._states.fill_(0)
        for i in range(len(dataset)):
            if dataset.file_name(i) not in ("truncated.jpg", "not_an_image.jpg", "empty_file.jpg"):
                image, target = dataset[i]
                assert 20 < image.float().mean() < 250
                boxes = target["boxes"]
                assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
                assert (boxes[:, 2] <= image.shape[2]).all() and (boxes[:, 3] <= image.shape[1]).all()


def test_small_images_are_left_out_of_training_only(two, change):
    change(two, lambda data: data["annotations"][2].update(image_id=986))
    assert len(open_set(two, min_side=45)) == 1 and len(open_set(two, train=False, min_side=45)) == 3
    assert open_set(two, min_side=45).report["image_too_small"] == 2


def test_quoted_numbers_are_numbers(two, change):
    def quote(data):
        for image in data["images"]:
            image.update(id=str(image["id"]), width=str(image["width"]))
        for annotation in data["annotations"]:
            annotation.update(image_id=str(annotation["image_id"]), category_id=str(annotation["category_id"]))

    before = [open_set(two)[i][1]["labels"].tolist() for i in range(3)]
    dataset = open_set(change(two, quote))
    assert dataset.image_ids == [1000, 993, 986] and "size_missing" not in dataset.report
    assert [dataset[i][1]["labels"].tolist() for i in range(3)] == before


def test_annotations_counted_from_0_and_categories_from_1_are_doubted(two, change):
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}]
    path = change(two, lambda data: data.update(categories=categories))
    for first, doubted in ((0, 1), (1, 0)):
        change(
            path, lambda data, first=first: [a.update(category_id=first + i) for i, a in enumerate(data["annotations"])]
        )
        dataset = open_set(path)
        assert dataset.report.get("category_ids_shifted", 0) == doubted
        assert ("  warning: 1 x category ids shifted" in dataset.summary()) == doubted


def test_entries_that_share_a_file_or_an_id_are_warned_about(two, change):
    def share(data):
        data["images"] += [{**data["images"][0], "id": 7}, {**data["images"][1], "id": 1000}]

    report = open_set(change(two, share)).report
    assert report["image_listed_twice"] == report["image_id_duplicate"] == 1 and report["images"] == 4


@pytest.mark.parametrize(
    ("value", "crowds"), [(True, 1), ("1", 1), ("true", 1), (False, 0), ("0", 0), ("False", 0), ("no", 0), (None, 0)]
)
def test_iscrowd_as_tools_write_it(two, change, value, crowds):
    dataset = open_set(change(two, lambda data: data["annotations"][0].update(iscrowd=value)))
    assert dataset.report["objects"] == 3 - crowds and dataset.report.get("crowd", 0) == crowds


def test_annotations_without_ids_are_named_by_their_place(two, change):
    def strip(data):
        for annotation in data["annotations"]:
            del annotation["id"], annotation["area"]

    assert "first: annotation entry 0 (000.png)" in open_set(change(two, strip)).summary()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("inspect", [True, False])
def test_boxes_on_a_scaled_copy_of_a_photo_that_exif_turns_stay_on_their_object(tmp_path, train, inspect):
    """Of 300 images a third of the headers is read when the dataset is opened, and the boxes must not depend on it."""
    (tmp_path / "images").mkdir()
    pixels = np.zeros((300, 400, 3), np.uint8)
    pixels[20:80, 40:160] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: x becomes 299 - y, y becomes x
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png", exif=exif)
    images = [{"id": i, "file_name": "a.png", "height": 200, "width": 150} for i in range(300 if not inspect else 1)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [110, 20, 30, 60]} for i in range(len(images))]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    dataset = open_set(tmp_path / "set.json", train, inspect=inspect)
    assert dataset.report["image_turned"] and "size_of_other_shape" not in dataset.report
    for index in {0, len(dataset) // 2 + 1} if not inspect else {0}:
        image, target = dataset.load(index)
        [[x1, y1, x2, y2]] = target["boxes"].int().tolist()
        assert image.shape == (3, 400, 300) and target["original_size"] == (200, 150)
        assert (image[:, y1:y2, x1:x2] == 255).all() and (image == 255).sum() == 3 * (y2 - y1) * (x2 - x1)


def test_a_image_of_another_shape_than_stated_is_doubted_but_not_one_with_its_sides_interchanged(two, change):
    change(two, lambda data: data["images"][0].update(width=300, height=300))
    assert open_set(two).report["size_of_other_shape"] == 1
    change(two, lambda data: (data["images"][0].update(width=40, height=60), data["annotations"].pop(1)))
    report = open_set(two).report
    assert report["size_mismatch"] == 1 and "size_of_other_shape" not in report


def test_fewer_than_half_of_the_annotations_is_a_warning(two, change):
    change(two, lambda data: [annotation.update(bbox=[0, 0, 0, 5]) for annotation in data["annotations"][:2]])
    assert "warning: fewer than half of the annotations are used" in open_set(two).summary()


@pytest.mark.parametrize("train", [True, False])
def test_images_that_all_cannot_be_read_are_refused_at_the_start(two, train):
    for file in (two.parent / "images").iterdir():
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(DataError, match=r"none of 3 inspected images can be read\. .* begins with 'version https"):
        open_set(two, train)


def test_the_sentence_of_a_worker_comes_without_its_traceback(two):
    dataset = open_set(two)
    for file in (two.parent / "images").iterdir():
        damage(file)  # after the start, as when a disk fails
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, collate_fn=list)
    with pytest.raises(ImageError) as error:
        list(loader)
    assert str(error.value) == f"{dataset.path(0)}: neither this image nor the next ones can be read."


def test_the_folder_that_holds_the_images_is_named(two):
    (two.parent / "images").rename(two.parent / "train2017")
    with pytest.raises(DataError, match=r"none of its 3 images is in .*images .* 3 images .* are in .*train2017\.$"):
        open_set(two)


def test_images_known_by_their_url_alone(two, change):
    def as_lvis(data):
        for image in data["images"]:
            image["coco_url"] = "http://images.cocodataset.org/train2017/" + image.pop("file_name")

    dataset = open_set(change(two, as_lvis))
    assert [dataset.file_name(i) for i in range(3)] == ["000.png", "001.png", "002.png"]
    assert dataset[0][0].shape == (3, 40, 60)


def test_a_name_that_leads_out_is_refused_unless_allowed(two, change):
    def rename(data):
        for image in data["images"]:
            image["file_name"] = str(two.parent / "images" / image["file_name"])

    change(two, rename)
    (two.parent / "other").mkdir()
    with pytest.raises(DataError, match=r"file names of 3 of its 3 .*Set data.allow_outside_images=true"):
        CocoDetection(two, two.parent / "other", train=True)
    dataset = CocoDetection(two, two.parent / "other", train=True, limits=Limits(allow_outside_images=True))
    assert len(dataset) == 3 and dataset[0][0].shape == (3, 40, 60)


@pytest.mark.parametrize("train", [True, False])
def test_a_image_above_the_limit_is_left_out_with_the_setting(two, train):
    dataset = open_set(two, train, limits=Limits(max_image_pixels=2400))
    assert dataset.report["image_unreadable"] == 1 and "more than data.max_image_pixels=2400" in dataset.summary()
    with pytest.raises(DataError, match=r"more than data\.max_json_bytes=10"):
        open_set(two, limits=Limits(max_json_bytes=10))


def test_the_limits_of_the_settings_are_the_usual_ones():
    assert all(getattr(Config().data, name) == value for name, value in vars(Limits()).items())
