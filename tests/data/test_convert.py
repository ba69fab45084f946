"""Converted folders hold the boxes that were drawn, and open as datasets."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image

from brs_detr.data import convert
from brs_detr.data.coco import CocoDetection
from brs_detr.data.faults import DataError
from brs_detr.data.voc import read_voc
from brs_detr.data.yolo import read_yolo


def picture(path, h=40, w=80, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path, **options)


def voc_object(name, box, difficult=0):
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


@pytest.fixture()
def voc(tmp_path):
    root = tmp_path / "VOC"
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    objects = [
        voc_object("dog", (11, 6, 30, 25)) + voc_object("cat", (1, 1, 80, 40), 1),
        voc_object("ant", (5, 5, 9, 9)),
        "",
    ]
    for i, text in enumerate(objects):
        picture(root / "JPEGImages" / f"{i}.jpg")
        size = "<size><width>80</width><height>40</height><depth>3</depth></size>" if i else ""
        xml = f"<annotation><filename>{i}.jpg</filename>{size}{text}</annotation>"
        (root / "Annotations" / f"{i}.xml").write_text(xml)
    (root / "ImageSets" / "Main" / "train.txt").write_text("0\n2\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("1\n")
    (root / "ImageSets" / "Main" / "dog_train.txt").write_text("0 1\n")
    return root


def test_voc_boxes_splits_and_classes(voc):
    datasets, pictures, skipped = read_voc(voc)
    assert set(datasets) == {"train", "val"} and pictures == str(voc / "JPEGImages") and not skipped
    train, val = datasets["train"], datasets["val"]
    assert (
        train["categories"]
        == val["categories"]
        == [{"id": i + 1, "name": n} for i, n in enumerate(["ant", "cat", "dog"])]
    )
    assert train["annotations"][0]["bbox"] == [11, 6, 19, 19] and train["annotations"][0]["category_id"] == 3
    assert [a["iscrowd"] for a in train["annotations"]] == [0, 1]
    assert [(image["height"], image["width"]) for image in train["images"]] == [(40, 80)] * 2


def test_voc_original_convention_counts_from_one(voc):
    train = read_voc(voc, one_based=True, keep_difficult=True)[0]["train"]
    assert [a["bbox"] for a in train["annotations"]] == [[10, 5, 20, 20], [0, 0, 80, 40]]
    assert [a["iscrowd"] for a in train["annotations"]] == [0, 0]


def test_voc_order_of_classes_and_unknown_ones(voc):
    assert read_voc(voc, classes=["dog", "cat", "ant"])[0]["val"]["annotations"][0]["category_id"] == 3
    with pytest.raises(DataError, match="ant are not among the classes"):
        read_voc(voc, classes=["dog", "cat"])


def test_voc_faults_are_listed_not_fatal(voc):
    (voc / "Annotations" / "0.xml").write_text("<annotation>")
    (voc / "JPEGImages" / "2.jpg").unlink()
    datasets, _, skipped = read_voc(voc)
    assert len(skipped) == 2 and "0.xml" in skipped[0] and "2.xml" in skipped[1]
    assert not datasets["train"]["images"] and len(datasets["val"]["images"]) == 1


@pytest.fixture()
def yolo(tmp_path):
    root = tmp_path / "yolo"
    for split, label in (
        ("train", "1 0.5 0.5 0.25 0.5\n0 0.1 0.1 0.1 0.6 0.4 0.6\n"),
        ("valid", "0 0.25 0.5 0.5 1\n9 0 0 1 1\n\nx\n"),
    ):
        picture(root / split / "images" / "a b.jpg")
        picture(root / split / "images" / "empty.png")
        (root / split / "labels").mkdir(parents=True)
        (root / split / "labels" / "a b.txt").write_text(label)
    (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n")
    return root


@pytest.mark.parametrize("target", ["", "data.yaml"])
def test_yolo_boxes_outlines_and_a_roboflow_layout(yolo, target):
    datasets, base, skipped = read_yolo(yolo / target)
    train, val = datasets["train"], datasets["val"]
    assert [image["file_name"] for image in train["images"]] == ["train/images/a b.jpg", "train/images/empty.png"]
    assert base == str(yolo) and train["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    assert train["annotations"][0]["bbox"] == [30, 10, 20, 20] and train["annotations"][0]["category_id"] == 1
    outline = train["annotations"][1]
    assert (
        outline["bbox"] == [8, 4, 24, 20]
        and outline["area"] == pytest.approx(240)
        and len(outline["segmentation"][0]) == 6
    )
    assert len(val["annotations"]) == 1 and len(skipped) == 2 and "a b.txt:2" in skipped[0]


def test_yolo_without_a_yaml(tmp_path):
    picture(tmp_path / "images" / "train" / "x.jpg")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "x.txt").write_text("0 0.5 0.5 1 1")
    (tmp_path / "classes.txt").write_text("thing\n")
    data = read_yolo(tmp_path)[0]["train"]
    assert data["annotations"][0]["bbox"] == [0, 0, 80, 40] and data["categories"] == [{"id": 0, "name": "thing"}]


def test_yolo_fractions_are_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "images" / "x.jpg", exif=exif)
    (tmp_path / "images" / "x.txt").write_text("0 0.5 0.5 1 1")
    (tmp_path / "classes.txt").write_text("thing")
    data = read_yolo(tmp_path)[0]["all"]
    assert (data["images"][0]["height"], data["images"][0]["width"]) == (80, 40)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    image, target = CocoDetection(path, tmp_path / "images", train=True)[0]
    assert image.shape == (3, 80, 40) and target["boxes"].tolist() == [[0, 0, 40, 80]]


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_command_writes_what_training_opens(kind, voc, yolo, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    source = {"voc": voc, "yolo": yolo}[kind]
    assert convert.run(parser.parse_args([kind, str(source), str(tmp_path / "out")])) == 0
    pictures = {"voc": voc / "JPEGImages", "yolo": yolo}[kind]
    assert f"--images {pictures}" in capsys.readouterr().out
    for split in ("train", "val"):
        assert len(CocoDetection(tmp_path / "out" / f"{split}.json", pictures, train=True)) == 2 - (
            kind == "voc" and split == "val"
        )


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_an_empty_folder_is_refused_with_a_sentence(kind, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    assert convert.run(parser.parse_args([kind, str(tmp_path), str(tmp_path / "out")])) == 1
    assert "cannot be converted: " in capsys.readouterr().err
