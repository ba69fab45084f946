"""YOLO datasets with their images: sizes, backgrounds, and what is noted.

YOLO datasets as exports and people leave them: each leads to the same images and class names.
"""

import json
import os

import pytest

from brs_detr.data.coco import CocoDetection
from brs_detr.data.formats.base import Notes, to_coco
from brs_detr.data.formats.yolo import find_dataset, read_yolo
from brs_detr.data.issues import DataError


@pytest.fixture()
def yolo(tmp_path, write_image):
    """`yolo({stem of an image: text of its label file, None for none})`: a folder with images, labels, classes.txt."""

    def make(labels, orientation=None):
        for name, text in labels.items():
            write_image(tmp_path / "images" / f"{name}.jpg", orientation=orientation)
            (tmp_path / "labels" / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                (tmp_path / "labels" / f"{name}.txt").write_text(text)
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
        return tmp_path

    return make


def notes_of(imported):
    return "\n".join(imported.notes.lines())


def boxes_of(imported, split="train"):
    return {sample.path.name: [item["bbox"] for item in sample.objects] for sample in imported.splits[split]}


def test_fractions_become_pixels_of_each_image(yolo, tmp_path, write_image):
    yolo({"a": "1 0.5 0.5 0.25 0.5\n0 0.1 0.1 0.1 0.6 0.4 0.6"})
    write_image(tmp_path / "images" / "b.png", 20, 30)
    (tmp_path / "labels" / "b.txt").write_text("0 0.5 0.5 1.0000003 1")
    imported = read_yolo(tmp_path)
    assert boxes_of(imported) == {"a.jpg": [[30, 10, 20, 20], [8, 4, 24, 20]], "b.png": [[0, 0, 30, 20]]}
    assert imported.classes == {0: "cat", 1: "dog"} and not imported.notes.places
    box, outline = imported.splits["train"][0].objects
    assert (box["category_id"], box["area"]) == (1, 400) and outline["area"] == pytest.approx(240)


def test_backgrounds_are_kept_and_counted(yolo):
    imported = read_yolo(yolo({"a": "0 .5 .5 .2 .2", "empty": "", "absent": None}))
    assert boxes_of(imported) == {"a.jpg": [[32, 16, 16, 8]], "absent.jpg": [], "empty.jpg": []}
    assert "1 x images without a label file" in notes_of(imported) and "empty label file" in notes_of(imported)


def test_classes_without_a_name_are_left_out_and_counted(yolo):
    imported = read_yolo(yolo({"a": "0 .5 .5 .2 .2\n7 .5 .5 .2 .2\n-1 .5 .5 .2 .2"}))
    assert len(boxes_of(imported)["a.jpg"]) == 1 and "2 x label lines left out whose class has no name" in notes_of(
        imported
    )


def test_names_given_by_hand_and_names_made_up(yolo, tmp_path):
    yolo({"a": "0 .5 .5 .2 .2\n3 .5 .5 .2 .2"})
    assert read_yolo(tmp_path, classes=["x", "y"]).classes == {0: "x", 1: "y"}
    (tmp_path / "classes.txt").unlink()
    imported = read_yolo(tmp_path)
    assert imported.classes == {0: "class_0", 3: "class_3"} and "class names not found; using class_0" in notes_of(
        imported
    )


def test_labels_and_images_without_each_other(yolo, tmp_path, write_image):
    yolo({"a": "0 .5 .5 .2 .2"})
    write_image(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "alone.txt").write_text("0 .5 .5 .2 .2")
    (tmp_path / "images" / "broken.jpg").write_text("no image")
    imported = read_yolo(tmp_path)
    assert boxes_of(imported) == {"a.jpg": [[32, 16, 16, 8]], "a.png": [[32, 16, 16, 8]]}
    for part in ("a.png and ", "alone.txt", "broken.jpg", "classes.txt"):
        assert (part in notes_of(imported)) == (part != "classes.txt")


def test_a_split_that_nobody_labeled_is_left_out(tmp_path, write_image):
    for split in ("train", "test"):
        write_image(tmp_path / "images" / split / "a.jpg")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "a.txt").write_text("0 .5 .5 .2 .2")
    imported = read_yolo(tmp_path)
    assert set(imported.splits) == {"train"} and "test (1 images)" in notes_of(imported)


def test_no_label_file_at_all_is_refused_and_says_where_they_were_looked_for(yolo, tmp_path):
    yolo({"a": None})
    (tmp_path / "images" / "a.xml").touch()
    with pytest.raises(DataError, match=r"labels.a.txt.*1 \.xml"):
        read_yolo(tmp_path)


@pytest.mark.parametrize("height", [40, 80])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("line", ["0 0.25 0.125 0.5 0.25", "0 0 0 0.5 0 0.5 0.25 0 0.25"])
def test_boxes_lie_on_the_same_pixels_whatever_exif_says(yolo, tmp_path, line, orientation, height):
    """The image's own top left as shown is marked; what training loads must show the mark inside the box.

    A square image is read as stored: its size does not tell that it is to be turned.
    """
    from PIL import Image, ImageOps

    yolo({"a": line})
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]  # what turns the shown image to the stored
    shown = Image.new("RGB", (80, height))
    shown.paste((255, 255, 255), (0, 0, 40, height // 4))
    turn = Image.Exif()
    turn[0x0112] = undo
    shown.save(tmp_path / "shown.png", exif=turn)
    ImageOps.exif_transpose(Image.open(tmp_path / "shown.png")).save(
        tmp_path / "images" / "a.jpg", exif=exif, quality=100
    )
    imported = read_yolo(tmp_path)
    datasets, base = to_coco(imported)
    (tmp_path / "x.json").write_text(json.dumps(datasets["train"]))
    image, target = CocoDetection(tmp_path / "x.json", base, train=True)[0]
    is_stored = orientation in (2, 3, 4) or (orientation > 4 and height == 80)
    assert any("stored pixels" in note for note in imported.notes.lines()) == is_stored
    x0, y0, x1, y1 = target["boxes"][0].round().int().tolist()
    white = image[0] > 128
    assert white[y0:y1, x0:x1].all() and white.sum() == (y1 - y0) * (x1 - x0) == 10 * height


def make(root, files):
    """Files by name; what is no text file stays empty (layouts are found without opening images)."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root


def look(source):
    notes = Notes()
    layout = find_dataset(source, notes)
    splits = {split: [path.name for path in paths] for split, paths in layout.splits.items()}
    return layout, splits, "\n".join(notes.lines())


IMAGES = {"images/train/a.jpg": "", "images/val/b.jpg": ""}
BOTH = {"train": ["a.jpg"], "val": ["b.jpg"]}


@pytest.mark.parametrize(
    "text",
    [
        "train: images/train\nval: images/val\n",
        "path: .\ntrain: images/train\nvalid: images/val\ntest:\n",
        "path: ../datasets/gone\ntrain: [images/train]\nval: ./images/val/  # comment\n",
        "path: /content/mine\r\ntrain: /content/mine/images/train\r\nval: D:\\mine\\images\\val\r\n",
        "\ufefftrain: ../images/train\nval: ../images/val\n",
        "train: lists/train.txt\nval: lists/val.txt\n",
    ],
)
def test_entries_of_a_yaml_lead_to_the_images(tmp_path, text):
    lists = {"lists/train.txt": "./images/train/a.jpg\r\n", "lists/val.txt": "\ufeffD:\\x\\images\\val\\b.jpg\n"}
    root = make(tmp_path / "mine", IMAGES | lists | {"data.yaml": text})
    assert look(root)[1] in (BOTH, BOTH | {"test": []}) and look(root / "data.yaml")[1] == look(root)[1]


def test_entries_relative_to_the_working_folder(tmp_path, monkeypatch):
    make(tmp_path, IMAGES | {"cfg/x.yaml": "train: images/train\nval: images/val\n"})
    monkeypatch.chdir(tmp_path)
    assert look(tmp_path / "cfg" / "x.yaml")[1] == BOTH


def test_exports_with_one_step_up_too_many(tmp_path):
    images = {"train/images/a.jpg": "", "valid/images/b.jpg": ""}
    yaml = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: ['cat']\n"
    _, splits, notes = look(make(tmp_path / "mine", images | {"data.yaml": yaml}))
    assert {split: names for split, names in splits.items() if names} == BOTH and "test: ../test/images" in notes


def test_a_missing_split_is_never_guessed_from_a_folder_that_any_dataset_has(tmp_path):
    files = {"images/a.jpg": "", "data.yaml": "train: images\nval: ../valid/images\n"}
    _, splits, notes = look(make(tmp_path / "mine", files))
    assert splits == {"train": ["a.jpg"], "val": []} and "do not exist: data.yaml: val: ../valid/images" in notes


def test_lists_name_images_that_are_not_there(tmp_path):
    files = {"data.yaml": "train: train.txt\n", "train.txt": "images/train/a.jpg\nimages/train/gone.jpg\n\n"}
    _, splits, notes = look(make(tmp_path, IMAGES | files))
    assert splits == {"train": ["a.jpg"]} and "train.txt: images/train/gone.jpg" in notes


@pytest.mark.parametrize("source", ["", "obj.data"])
def test_darknet_files_of_another_folder(tmp_path, source):
    root = make(
        tmp_path,
        {
            "obj.data": "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n",
            "obj.names": "cat\ndog\n",
            "train.txt": "data/obj_train_data/a.jpg\n",
            "valid.txt": "data/obj_valid_data/b.jpg\n",
            "obj_train_data/a.jpg": "",
            "obj_valid_data/b.jpg": "",
        },
    )
    layout, splits, _ = look(root / source)
    assert splits == BOTH and layout.names == {0: "cat", 1: "dog"}


@pytest.mark.parametrize(
    "names",
    [
        ("images/train/a.jpg", "images/val/b.jpg"),
        ("train/images/a.jpg", "valid/images/b.jpg"),
        ("train/a.jpg", "validation/b.jpg"),
        ("images/train2017/a.jpg", "images/val2017/b.jpg"),
        ("unpacked/mine/train/a.jpg", "unpacked/mine/val/b.jpg"),
    ],
)
def test_folders_tell_the_splits_where_there_is_no_yaml(tmp_path, names):
    assert look(make(tmp_path, dict.fromkeys(names, "")))[1] == BOTH


def test_a_folder_without_splits_is_train_or_what_its_name_says(tmp_path):
    assert look(make(tmp_path / "mine", {"a.jpg": "", "a.txt": ""}))[1] == {"train": ["a.jpg"]}
    assert look(make(tmp_path / "valid", {"a.jpg": ""}))[1] == {"val": ["a.jpg"]}


def test_lists_in_a_folder_are_not_mistaken_for_the_labels_of_train_jpg(tmp_path):
    assert look(make(tmp_path / "a", IMAGES | {"train.txt": "images/train/a.jpg\n"}))[1] == {"train": ["a.jpg"]}
    assert look(make(tmp_path / "b", {"train.jpg": "", "train.txt": "0 .5 .5 1 1\n"}))[1] == {"train": ["train.jpg"]}


def test_images_beside_the_split_folders_are_noted(tmp_path):
    _, splits, notes = look(make(tmp_path, {"train/a.jpg": "", "val/b.jpg": "", "preview.png": ""}))
    assert splits == BOTH and "preview.png" in notes


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [cat, no, 007]", {0: "cat", 1: "no", 2: "007"}),
        ("names: {0: cat, 5: 🐕}", {0: "cat", 5: "🐕"}),
        ("names:\n- ' cat '\nnc: 1", {0: "cat"}),
        ("nc: 2", {0: "class_0", 1: "class_1"}),
        ("names: person\nnc: 1", {0: "person"}),
        ("names: my.names", {0: "cat", 1: "dog"}),
        ("names:", {}),
        ("", {}),
    ],
)
def test_class_names_of_a_yaml(tmp_path, text, names):
    files = {"data.yaml": f"train: images/train\n{text}\n", "my.names": "cat\ndog\n\n"}
    assert look(make(tmp_path, IMAGES | files))[0].names == names


@pytest.mark.parametrize(
    "names", ["{outside}/notes.txt", "../outside/notes.txt", "notes.txt", "..\\outside\\notes.txt"]
)
@pytest.mark.parametrize("path", ["", "path: ../outside\n"])
def test_a_file_outside_the_dataset_does_not_name_its_classes(tmp_path, monkeypatch, names, path):
    """A data.yaml may come from anyone; its lines would go into logs and published weights."""
    outside = make(tmp_path / "outside", {"notes.txt": "secret\n", "person": "secret\n"})
    monkeypatch.chdir(outside)
    text = f"{path}train: {tmp_path}/mine/images/train\nnames: {names.format(outside=outside)}\n"
    root = make(tmp_path / "mine", IMAGES | {"data.yaml": text})
    with pytest.raises(DataError, match=r"is a file outside .*mine, which is not read\. Copy it there"):
        look(root)
    (root / "notes.txt").write_text("cat\n")
    (root / "data.yaml").write_text(text.replace(names.format(outside=outside), "notes.txt"))
    assert look(root)[0].names == {0: "cat"}
    (root / "data.yaml").write_text("train: images/train\nnames: person\n")
    assert look(root)[0].names == {0: "person"}


def test_a_yaml_with_names_only_leaves_the_splits_to_the_folders(tmp_path):
    layout, splits, _ = look(make(tmp_path, IMAGES | {"data.yaml": "names: [cat]\n"}))
    assert splits == BOTH and layout.names == {0: "cat"}


def test_settings_of_other_programs_are_not_taken_for_a_datasets(tmp_path):
    files = {"config.yaml": "train: {lr: 0.1}\n", "args.yaml": "mode: train\n", "x.data": "\0\1", "list.yaml": "- 1\n"}
    assert look(make(tmp_path, IMAGES | files))[1] == BOTH


def test_class_names_beside_a_yaml_that_has_none(tmp_path):
    files = {"data.yaml": "train: images/train\n", "classes.txt": "cat\r\ndog\r\n"}
    assert look(make(tmp_path, IMAGES | files))[0].names == {0: "cat", 1: "dog"}


@pytest.mark.parametrize("place", ["classes.txt", "data/obj.names", "labels/classes.txt", "labels/train/classes.txt"])
def test_class_names_of_text_files(tmp_path, place):
    files = {place: "cat\n\ntraffic light\n", "labels/train/a.txt": ""}
    assert look(make(tmp_path, IMAGES | files))[0].names == {0: "cat", 2: "traffic light"}


def test_two_lists_of_classes_that_differ_are_refused(tmp_path):
    files = {"labels/train/classes.txt": "cat\ndog", "labels/val/classes.txt": "dog\ncat"}
    with pytest.raises(DataError, match=r"train.classes.txt and .*val.classes.txt name different classes"):
        look(make(tmp_path, IMAGES | files))


def test_names_that_disagree_with_their_number_are_noted(tmp_path):
    assert "nc is 3, names has 1" in look(make(tmp_path, IMAGES | {"data.yaml": "train: images\nnc: 3\nnames: [a]"}))[2]


def test_shape_of_poses(tmp_path):
    files = {"data.yaml": "train: images\nkpt_shape: [17, 3]\n"}
    assert look(make(tmp_path, IMAGES | files))[0].keypoints == 51


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "no image was found here"),
        ({"data.yaml": "train: [images"}, "not valid YAML"),
        ({"data.yaml": "names: {cat: 0}\ntrain: images"}, "`names` must be"),
        ({"data.yaml": "names: [cat]\nnc: two\ntrain: images"}, "`nc` a number"),
        ({"data.yaml": "kpt_shape: [a, 3]\ntrain: images"}, "kpt_shape must be"),
        ({"data.yaml": "names: [{id: 0}]\ntrain: images"}, "`names` must be"),
        ({"data.yaml": "train: images/none\nnames: [cat]", "images/none/x": ""}, "no image was found"),
        ({"data.yaml": "train: imgaes\nval: images\nnames: [cat]"}, "no image was found for its `train`.*imgaes"),
        ({"data.yaml": "train: pics\nnames: [cat]\ndownload: https://x.y/z.zip"}, "Download the images first"),
        ({"a.yaml": "train: images", "b.yaml": "train: images"}, "Give one of a.yaml, b.yaml"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_sentence(tmp_path, files, sentence):
    with pytest.raises(DataError, match=sentence):
        look(make(tmp_path, files | (IMAGES if files else {})))


@pytest.mark.parametrize("name", ["gone", "archive.zip"])
def test_what_is_no_folder_is_refused(tmp_path, name):
    (tmp_path / "archive.zip").touch()
    with pytest.raises(DataError, match=r"no such file|Unpack an archive first"):
        look(tmp_path / name)


def test_folders_that_are_links(tmp_path):
    make(tmp_path / "store", IMAGES)
    (tmp_path / "mine").mkdir()
    os.symlink(tmp_path / "store" / "images", tmp_path / "mine" / "images")
    layout, splits, _ = look(tmp_path / "mine")
    assert splits == BOTH and layout.splits["train"] == [tmp_path / "mine/images/train/a.jpg"]
