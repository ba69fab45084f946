"""YOLO datasets with their pictures: sizes, backgrounds, and what is noted."""

import json

import pytest

from brs_detr.data.coco import CocoDetection
from brs_detr.data.faults import DataError
from brs_detr.data.labelled import to_coco
from brs_detr.data.yolo import read_yolo


@pytest.fixture()
def yolo(tmp_path, write_picture):
    """`yolo({stem of a picture: text of its label file, None for none})`: a folder with images, labels, classes.txt."""

    def make(labels, orientation=None):
        for name, text in labels.items():
            write_picture(tmp_path / "images" / f"{name}.jpg", orientation=orientation)
            (tmp_path / "labels" / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                (tmp_path / "labels" / f"{name}.txt").write_text(text)
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
        return tmp_path

    return make


def notes_of(labelled):
    return "\n".join(labelled.notes.lines())


def boxes_of(labelled, split="train"):
    return {sample.path.name: [item["bbox"] for item in sample.objects] for sample in labelled.splits[split]}


def test_fractions_become_pixels_of_each_picture(yolo, tmp_path, write_picture):
    yolo({"a": "1 0.5 0.5 0.25 0.5\n0 0.1 0.1 0.1 0.6 0.4 0.6"})
    write_picture(tmp_path / "images" / "b.png", 20, 30)
    (tmp_path / "labels" / "b.txt").write_text("0 0.5 0.5 1.0000003 1")
    labelled = read_yolo(tmp_path)
    assert boxes_of(labelled) == {"a.jpg": [[30, 10, 20, 20], [8, 4, 24, 20]], "b.png": [[0, 0, 30, 20]]}
    assert labelled.classes == {0: "cat", 1: "dog"} and not labelled.notes.places
    box, outline = labelled.splits["train"][0].objects
    assert (box["category_id"], box["area"]) == (1, 400) and outline["area"] == pytest.approx(240)


def test_backgrounds_are_kept_and_counted(yolo):
    labelled = read_yolo(yolo({"a": "0 .5 .5 .2 .2", "empty": "", "absent": None}))
    assert boxes_of(labelled) == {"a.jpg": [[32, 16, 16, 8]], "absent.jpg": [], "empty.jpg": []}
    assert "1 x pictures without a label file" in notes_of(labelled) and "empty label file" in notes_of(labelled)


def test_classes_without_a_name_are_left_out_and_counted(yolo):
    labelled = read_yolo(yolo({"a": "0 .5 .5 .2 .2\n7 .5 .5 .2 .2\n-1 .5 .5 .2 .2"}))
    assert len(boxes_of(labelled)["a.jpg"]) == 1 and "2 x label lines left out whose class has no name" in notes_of(
        labelled
    )


def test_names_given_by_hand_and_names_made_up(yolo, tmp_path):
    yolo({"a": "0 .5 .5 .2 .2\n3 .5 .5 .2 .2"})
    assert read_yolo(tmp_path, classes=["x", "y"]).classes == {0: "x", 1: "y"}
    (tmp_path / "classes.txt").unlink()
    labelled = read_yolo(tmp_path)
    assert labelled.classes == {0: "class_0", 3: "class_3"} and "made up" in notes_of(labelled)


def test_labels_and_pictures_without_each_other(yolo, tmp_path, write_picture):
    yolo({"a": "0 .5 .5 .2 .2"})
    write_picture(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "alone.txt").write_text("0 .5 .5 .2 .2")
    (tmp_path / "images" / "broken.jpg").write_text("no picture")
    labelled = read_yolo(tmp_path)
    assert boxes_of(labelled) == {"a.jpg": [[32, 16, 16, 8]], "a.png": [[32, 16, 16, 8]]}
    for part in ("a.png and ", "alone.txt", "broken.jpg", "classes.txt"):
        assert (part in notes_of(labelled)) == (part != "classes.txt")


def test_a_split_that_nobody_labelled_is_left_out(tmp_path, write_picture):
    for split in ("train", "test"):
        write_picture(tmp_path / "images" / split / "a.jpg")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "a.txt").write_text("0 .5 .5 .2 .2")
    labelled = read_yolo(tmp_path)
    assert set(labelled.splits) == {"train"} and "test (1 pictures)" in notes_of(labelled)


def test_no_label_file_at_all_is_refused_and_says_where_they_were_looked_for(yolo, tmp_path):
    yolo({"a": None})
    (tmp_path / "images" / "a.xml").touch()
    with pytest.raises(DataError, match=r"labels.a.txt.*1 \.xml"):
        read_yolo(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_lie_on_the_same_pixels_whatever_exif_says(yolo, tmp_path, orientation):
    """The picture's own top left as shown is marked; what training loads must show the mark inside the box."""
    from PIL import Image, ImageOps

    yolo({"a": "0 0.25 0.125 0.5 0.25"})
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]  # what turns the shown picture to the stored
    shown = Image.new("RGB", (80, 40))
    shown.paste((255, 255, 255), (0, 0, 40, 10))
    turn = Image.Exif()
    turn[0x0112] = undo
    shown.save(tmp_path / "shown.png", exif=turn)
    ImageOps.exif_transpose(Image.open(tmp_path / "shown.png")).save(
        tmp_path / "images" / "a.jpg", exif=exif, quality=100
    )
    datasets, base = to_coco(read_yolo(tmp_path))
    (tmp_path / "x.json").write_text(json.dumps(datasets["train"]))
    image, target = CocoDetection(tmp_path / "x.json", base, train=True)[0]
    x0, y0, x1, y1 = target["boxes"][0].round().int().tolist()
    white = image[0] > 128
    assert white[y0:y1, x0:x1].all() and white.sum() == (y1 - y0) * (x1 - x0) == 400
