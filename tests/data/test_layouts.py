"""What a dataset argument is recognized as, and that nothing ambiguous is."""

import json
from pathlib import Path

import pytest

from brs_detr.data.issues import DataError
from brs_detr.data.layouts import DatasetLayout, is_yolo_yaml, recognize, split_of_name

COCO = json.dumps({"info": {"description": "x" * 300}, "images": [], "annotations": [], "categories": []})
XML = '<?xml version="1.0"?>\n<annotation verified="yes"><filename>a.jpg</filename></annotation>'
LABEL = "0 0.5 0.5 0.25 0.5\n"
CONTENT = {
    ".json": COCO,
    ".xml": XML,
    ".txt": LABEL,
    ".yaml": "names: [a]\ntrain: images\n",
    ".jpg": "",
    ".data": "train = x",
}


def write(folder, *names, **contents):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents.get(path.stem, CONTENT[path.suffix]))
    return folder


def splits(layout: DatasetLayout):
    return {split: path.relative_to(layout.root).as_posix() for split, path in layout.jsons.items()}


@pytest.mark.parametrize(
    ("files", "kind", "jsons"),
    [
        (
            ["annotations/instances_train2017.json", "annotations/instances_val2017.json", "train2017/1.jpg"],
            "coco",
            {"train": "annotations/instances_train2017.json", "val": "annotations/instances_val2017.json"},
        ),
        (["annotations/train.json", "annotations/val.json", "images/1.jpg"], "coco", None),
        (["train.json", "valid.json", "images/train/1.jpg"], "coco", {"train": "train.json", "val": "valid.json"}),
        (["train/x.json", "val/y.json"], "coco", {"train": "train/x.json", "val": "val/y.json"}),
        (["labels.json", "data/1.jpg"], "coco", {"all": "labels.json"}),
        (["annotations/instances_default.json"], "coco", {"all": "annotations/instances_default.json"}),
        (
            [f"{split}/_annotations.coco.json" for split in ("train", "valid", "test")],
            "roboflow",
            {
                split: f"{folder}/_annotations.coco.json"
                for split, folder in (("train", "train"), ("val", "valid"), ("test", "test"))
            },
        ),
        (
            ["one folder/around/annotations/train.json", "one folder/around/x.jpg"],
            "coco",
            {"train": "annotations/train.json"},
        ),
        (["data.yaml", "train/images/a.jpg", "train/labels/a.txt"], "yolo", {}),
        (["obj.data", "obj_train_data/a.txt"], "yolo", {}),
        (["labels/a.txt", "images/a.jpg"], "yolo", {}),
        (["labels/train/a.txt", "images/train/a.jpg"], "yolo", {}),
        (["train/labels/a.txt", "train/images/a.jpg"], "yolo", {}),
        (["a.txt", "a.jpg"], "yolo", {}),
        (["Annotations/a.xml", "JPEGImages/a.jpg", "ImageSets/Main/train.txt"], "voc", {}),
        (["VOC2007/Annotations/a.xml", "VOC2012/Annotations/b.xml"], "voc", {}),
        (["a.xml", "a.jpg"], "voc", {}),
        (["train/a.xml", "valid/b.xml"], "voc", {}),
    ],
)
def test_usual_layouts(tmp_path, files, kind, jsons):
    layout = recognize(write(tmp_path, *files))
    assert layout.kind == kind and layout.source == tmp_path
    if jsons is not None:
        assert splits(layout) == jsons


@pytest.mark.parametrize("folder", ["labels/", "labels/train/", ""])
def test_labels_of_images_without_objects_and_classes_with_a_point_are_those_of_yolo(tmp_path, folder):
    write(
        tmp_path,
        *(f"{folder}{i}.txt" for i in range(40)),
        **{str(i): "" for i in range(39)} | {"39": "3.0" + LABEL[1:]},
    )
    if not folder:
        write(tmp_path, *(f"{i}.jpg" for i in range(40)))
    assert recognize(tmp_path).kind == "yolo"


def test_a_file_is_taken_at_its_word(tmp_path):
    write(tmp_path, "annotations/train.json", "annotations/val.json", "data.yaml", "obj.data", "labels/a.txt")
    assert splits(recognize(tmp_path / "annotations" / "train.json")) == {"all": "train.json"}
    assert recognize(tmp_path / "data.yaml").place == tmp_path / "data.yaml"
    assert recognize(tmp_path / "obj.data").kind == "yolo"
    assert splits(recognize(tmp_path / "annotations")) == {"train": "train.json", "val": "val.json"}


def test_other_jsons_and_texts_are_no_datasets(tmp_path):
    write(
        tmp_path,
        "annotations/train.json",
        "annotations/val.json",
        "results.json",
        "README.txt",
        results="[]",
        README="hi",
    )
    write(tmp_path, "package.json", "annotations/captions_train.json", package='{"name": "x"}')
    write(tmp_path, "annotations/instances_train.json", "settings.yaml", settings="lr: 3")
    (tmp_path / "labels.xml").write_text("<svg></svg>")
    layout = recognize(tmp_path)
    assert splits(layout) == {"train": "annotations/instances_train.json", "val": "annotations/val.json"}
    assert [path.name for path in layout.passed_over] == ["captions_train.json", "train.json"]


def test_a_json_of_all_images_beside_its_splits_is_passed_over(tmp_path):
    layout = recognize(write(tmp_path, "all.json", "train.json", "val.json"))
    assert splits(layout) == {"train": "train.json", "val": "val.json"} and layout.passed_over == (
        tmp_path / "all.json",
    )


def test_several_tests_do_not_stop_a_training(tmp_path):
    tests = ("lvis_v1_image_info_test_challenge.json", "lvis_v1_image_info_test_dev.json")
    layout = recognize(write(tmp_path, "lvis_v1_train.json", "lvis_v1_val.json", *tests))
    assert splits(layout) == {"train": "lvis_v1_train.json", "val": "lvis_v1_val.json"}
    assert [path.name for path in layout.passed_over] == list(tests)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            ["data.yaml", "annotations/train.json"],
            "annotations of 2 formats are here. Name one of them (COCO json: data={}/annotations; YOLO: data={}/data.y",
        ),
        (
            ["Annotations/a.xml", "labels/a.txt"],
            "(YOLO: `brs-detr convert-dataset yolo {} OUT`; Pascal VOC: data={}/Annotations)",
        ),
        (["train.json", "a.xml"], "COCO json: data.root, data.train_json"),
        (
            ["train_a.json", "train_b.json"],
            "2 annotation files could be the split train: train_a.json, train_b.json. Name one",
        ),
        (["a.json", "b.json"], "2 annotation files could be the dataset: a.json, b.json"),
        (["x/y.jpg", "z.jpg"], "no dataset was recognized here. Known are COCO"),
        ([], "no dataset was recognized here"),
        (["a.txt"], "no dataset was recognized here"),
    ],
)
def test_what_is_ambiguous_or_unknown_is_said(tmp_path, files, sentence):
    with pytest.raises(DataError) as error:
        recognize(write(tmp_path, *files))
    assert str(error.value).startswith(f"{tmp_path}: ") and sentence.replace("{}", str(tmp_path)) in str(error.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gone", "there is no such file or folder. Set data="),
        ("data.zip", "this is an archive. Unpack it"),
        ("recipe.yaml", "this yaml describes no dataset"),
        ("a.png", "this is no dataset. Give a folder"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, sentence):
    if name != "gone":
        (tmp_path / name).write_text("train: {epochs: 3}\n")
    with pytest.raises(DataError, match=sentence) as error:
        recognize(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


def test_a_recipe_is_no_yolo_yaml(tmp_path):
    recipes = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
    assert recipes and not any(map(is_yolo_yaml, recipes))
    (tmp_path / "x.yaml").write_text("a: *b\n")
    assert not is_yolo_yaml(tmp_path / "x.yaml") and not is_yolo_yaml(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("instances_train2017.json", "train"),
        ("val.json", "val"),
        ("my-valid_set.json", "val"),
        ("test-dev.json.gz", "test"),
    ]
    + [("trained.json", None), ("values.json", None), ("instances_default.json", None), ("trainval.json", "train")],
)
def test_words_in_the_names_of_jsons(name, split):
    assert split_of_name(name) == split
