"""What a line of a YOLO label file says, and which file belongs to which image."""

import numpy as np
import pytest

from brs_detr.data.formats.base import Notes
from brs_detr.data.formats.yolo_labels import find_label_files, read_labels, to_annotation

BOX = [0.5, 0.5, 0.25, 0.5]
OUTLINE = [[0.1, 0.1], [0.1, 0.6], [0.4, 0.6]]


def read(tmp_path, text, keypoints=0):
    path = tmp_path / "x.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    notes = Notes()
    return [line for _, line in read_labels(path, keypoints, notes)], "\n".join(notes.lines())


@pytest.mark.parametrize(
    "text",
    [
        "1 0.5 0.5 0.25 0.5",
        "1.0\t.5\t.5\t.25\t5e-1\r\n\r\n",
        "1,0.5,0.5,0.25,0.5",
        "1, 0.5, 0.5, 0.25, 0.5",
        "1;0.5;0.5;0.25;0.5",
    ]
    + [
        "1 0,5 0,5 0,25 0,5",
        "\ufeff1 0.5 0.5 0.25 0.5",
        "\n 1 0.5 0.5 0.25 0.5  ",
        "1 0.5 0.5 0.25 0.5\n".encode("utf-16"),
    ],
)
def test_one_box_however_its_numbers_are_written(tmp_path, text):
    (line,), notes = read(tmp_path, text)
    assert line.label == 1 and line.shape.tolist() == BOX and not notes


@pytest.mark.parametrize(
    ("text", "shape", "note"),
    [
        ("0 0.1 0.1 0.1 0.6 0.4 0.6", OUTLINE, ""),
        ("0 0.1,0.1 0.1,0.6 0.4,0.6", OUTLINE, ""),
        ("0 0.1 0.1 0.1 0.6 0.4 0.6 0.87", OUTLINE, "confidence"),
        ("0 .1 .1 .1 .6 .4 .6 .4 .1", [*OUTLINE, [0.4, 0.1]], ""),  # an oriented box is an outline of four corners
        ("0 0.5 0.5 0.25 0.5 0.93", BOX, "confidence"),
        ("0 0.5 0.5 0.25 0.5 .1 .1 2 .2 .2 0 .3 .3 1", BOX, "keypoints"),
    ],
)
def test_kinds_of_lines_differ_in_their_count_of_numbers(tmp_path, text, shape, note):
    (line,), notes = read(tmp_path, text)
    assert line.shape.tolist() == shape and (note in notes if note else not notes)


def test_poses_without_visibilities_are_known_by_the_settings(tmp_path):
    text = "0 0.5 0.5 0.25 0.5 .1 .1 .2 .2"
    assert read(tmp_path, text, keypoints=4)[0][0].shape.tolist() == BOX
    assert read(tmp_path, text)[0][0].shape.shape == (4, 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cat 0.5 0.5 0.2 0.2", "not `class"),
        ("0 0.5 0.5", "not `class"),
        ("0 0.5 0.5 0.2", "not `class"),
        ("\0\1", "not `class"),
    ]
    + [("1.5 0.5 0.5 0.2 0.2", "not an integer"), ("nan 0.5 0.5 0.2 0.2", "not an integer")]
    + [("0 nan 0.5 0.2 0.2", "NaN"), ("0 0.5 -inf 0.2 0.2", "NaN"), ("0 40 20 10 10", "pixels?")],
)
def test_lines_that_say_nothing_are_noted_with_their_number(tmp_path, text, reason):
    lines, notes = read(tmp_path, "\n" + text)
    assert lines == [] and reason in notes and "x.txt:2" in notes


@pytest.mark.parametrize(
    ("image", "label"),
    [("images/train/a.jpg", "labels/train/a.txt"), ("train/images/a.jpg", "train/labels/a.txt"), ("a.jpg", "a.txt")]
    + [
        ("train/a.jpg", "labels/train/a.txt"),
        ("images/a.b.JPG", "labels/a.b.txt"),
        ("JPEGImages/a.jpg", "labels/a.txt"),
    ]
    + [("images/train/a.jpg", "labels/a.txt"), ("Images/a.jpg", "Labels/a.txt"), ("images/a.jpg", "images/a.txt")]
    + [("train/a.jpg", "train/labels/a.txt"), ("images/sub/a.jpg", "labels/sub/a.txt")],
)
def test_label_files_are_found_in_the_usual_places(tmp_path, image, label):
    for name in (image, label):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_label_files([tmp_path / image]) == {tmp_path / image: tmp_path / label}


def test_the_folder_of_labels_comes_before_a_text_beside_the_image(tmp_path):
    for name in ("images/a.jpg", "images/a.txt", "labels/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_label_files([tmp_path / "images/a.jpg"])[tmp_path / "images/a.jpg"] == tmp_path / "labels/a.txt"


@pytest.mark.parametrize("orientation", [1, 2, 3, 4])
def test_boxes_follow_the_pixels_that_exif_mirrors(orientation):
    shown = np.zeros((40, 80), bool)
    shown[4:12, 0:16] = True
    # from the image as shown to the image as stored: these four undo themselves
    stored = {1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1]}[orientation]
    rows, columns = np.nonzero(stored)
    expected = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    box = to_annotation(np.array([0.1, 0.2, 0.2, 0.2]), (40, 80), orientation)
    corners = np.array([[0, 0.1], [0.2, 0.1], [0.2, 0.3], [0, 0.3]])
    outline = to_annotation(corners, (40, 80), orientation)
    assert box["bbox"] == pytest.approx(expected) == outline["bbox"]
    assert outline["area"] == pytest.approx(16 * 8) and len(outline["segmentation"][0]) == 8
