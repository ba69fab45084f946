"""Opening a dataset argument: the splits of each purpose, what is written where, and what is refused."""

import errno
import json
import os
import shlex
from dataclasses import replace

import pytest

from brs_detr import cli
from brs_detr.config import Config, ConfigError, load_config
from brs_detr.data import dataset_source, json_file, layouts
from brs_detr.data.build import open_train_set, open_val_set
from brs_detr.data.dataset_source import open_source
from brs_detr.data.formats import coco
from brs_detr.data.issues import DataError
from brs_detr.data.storage import ReadError

BOXES = [[(1, 2, 3, 20, 20)], [(17, 2, 3, 20, 20)], [(1, 2, 3, 9, 9), (90, 9, 9, 9, 9)]] * 4


@pytest.fixture
def single(tmp_path, write_dataset):
    """Twelve images and a json of all of them."""
    return write_dataset(tmp_path / "data", sizes=[(40, 60)] * 12, boxes=BOXES)


def opened(source, folder, fraction=None, purposes=("train", "val")):
    return open_source(replace(Config().data, source=str(source), val_fraction=fraction), folder, purposes)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def split(single, tmp_path):
    """The same as train.json and val.json in a folder of their own, beside the images."""
    source = opened(single, tmp_path / "made", 0.25)
    (single.parent / "annotations").mkdir()
    for part in source.splits.values():
        part.json.rename(single.parent / "annotations" / part.json.name)
    single.unlink()
    return single.parent


def test_a_single_json_is_divided_by_image_and_keeps_what_it_has(single, tmp_path):
    source = opened(single, tmp_path / "out", 0.25)
    whole, parts = read(single), {name: read(part.json) for name, part in source.splits.items()}
    for key in ("images", "annotations"):
        assert sorted(e["id"] for part in parts.values() for e in part[key]) == sorted(e["id"] for e in whole[key])
    for part in parts.values():
        own = {image["id"] for image in part["images"]}
        assert part["categories"] == whole["categories"] and {a["image_id"] for a in part["annotations"]} <= own
    assert (source.splits["train"].number, source.splits["val"].number) == (9, 3)
    line, written = source.describe()
    assert line == (
        f"data={single}: COCO json; train 9 images (set.json, images in images), "
        "val 3 images (set.json, images in images)"
    )
    assert written == f"  written: {tmp_path}/out/train.json, {tmp_path}/out/val.json"
    config = source.settings(Config().data)
    assert (config.root, config.train_images) == (str(single.parent), "images") and config.source == str(single)


def test_without_a_fraction_it_can_be_evaluated_on_but_not_trained_on(single, tmp_path):
    with pytest.raises(DataError, match=r"no validation split .one annotation file for all images.. Set data.val_fra"):
        opened(single, tmp_path / "out")
    source = opened(single, tmp_path / "out", purposes=("val",))
    assert source.splits["val"].json == single and source.splits["val"].number == 12
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["images/train", "images"])
def test_a_training_split_alone_is_not_evaluated_on_but_a_dataset_without_splits_is(tmp_path, write_image, folder):
    """As of COCO, where a train json alone is refused."""
    for i in range(4):
        write_image(tmp_path / "data" / folder / f"{i}.jpg")
        label = tmp_path / "data" / folder.replace("images", "labels") / f"{i}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 0.5 0.5 0.5 0.5\n")
    source = tmp_path / "data"
    if folder == "images":
        whole = opened(source, tmp_path / "out", purposes=("val",))
        assert whole.splits["val"].number == 4 and not whole.divided
    else:
        with pytest.raises(DataError, match=r"no validation split .found: train.. Set data.val_fraction as in"):
            opened(source, tmp_path / "out", purposes=("val",))
        assert opened(source, tmp_path / "out", 0.25, ("val",)).splits["val"].number == 1
        for place in ("images", "labels"):  # what the error advises
            (source / place / "train").rename(source / place / "val")
        assert opened(source, tmp_path / "out", purposes=("val",)).splits["val"].number == 4


def test_a_train_json_alone_is_evaluated_on_where_it_is_named(split, tmp_path):
    (split / "annotations" / "val.json").unlink()
    with pytest.raises(DataError, match=r"To measure all its images.*give its json, data=.*train.json\.") as error:
        opened(split, tmp_path / "out", purposes=("val",))
    advised = str(error.value).rpartition("data=")[2].removesuffix(".")
    assert opened(advised, tmp_path / "out", purposes=("val",)).splits["val"].number == 9


def test_annotations_of_voc_in_no_split_are_evaluated_on_and_those_listed_for_training_not(tmp_path, write_image):
    data = tmp_path / "data"
    for i in range(3):
        write_image(data / "JPEGImages" / f"{i}.jpg")
        box = "<bndbox><xmin>20</xmin><ymin>10</ymin><xmax>60</xmax><ymax>30</ymax></bndbox>"
        (data / "Annotations").mkdir(exist_ok=True)
        (data / "Annotations" / f"{i}.xml").write_text(f"<annotation><object><name>a</name>{box}</object></annotation>")
    whole = opened(data, tmp_path / "out", purposes=("val",))
    assert whole.splits["val"].number == 3 and not whole.divided
    (data / "ImageSets" / "Main").mkdir(parents=True)
    (data / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n2\n")
    with pytest.raises(DataError, match="no validation split"):
        opened(data, tmp_path / "out", purposes=("val",))


def test_an_evaluation_sees_the_images_that_training_holds_out(single, tmp_path):
    first, second = opened(single, tmp_path / "a", 0.25), opened(single, tmp_path / "b", 0.25, ("val",))
    assert read(first.splits["val"].json) == read(second.splits["val"].json)


def test_two_jsons_are_used_where_they_lie(split, tmp_path):
    source = opened(split, tmp_path / "out")
    assert source.splits["train"].json == split / "annotations" / "train.json" and not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"data.val_fraction=0.1: .* has a val split already. Leave it out."):
        opened(split, tmp_path / "out", 0.1)
    (split / "annotations" / "val.json").rename(split / "annotations" / "test.json")
    assert opened(split, tmp_path / "out").splits["val"].json.name == "test.json"
    (split / "annotations" / "train.json").unlink()
    with pytest.raises(DataError, match=r"there is no training split .found: test."):
        opened(split, tmp_path / "out")
    with pytest.raises(DataError, match="has no train split to divide"):
        opened(split, tmp_path / "out", 0.1)


def test_a_large_json_is_not_read_twice(split, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_source, "_LARGE", 100)
    monkeypatch.setattr(dataset_source, "load_json", None)
    source = opened(split, tmp_path / "out")
    assert source.splits["train"].number is None and source.splits["train"].images == split / "images"
    assert "; train (annotations/train.json, images in images), val (" in source.describe()[0]


def test_images_that_are_not_near_are_asked_for(split, tmp_path):
    (split / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"no image was found in the usual folders. Name both: data.root"):
        opened(split, tmp_path / "out")


@pytest.mark.parametrize("used", [False, True])
def test_the_grouping_category_of_roboflow_is_no_class_unless_it_is_used(single, tmp_path, used):
    data = read(single)
    for entry in data["categories"]:
        entry["supercategory"] = "things"
    data["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})
    data["annotations"][0]["category_id"] = 0 if used else data["annotations"][0]["category_id"]
    data["annotations"][0]["segmentation"] = [[2, 3, 22, 3, 22, 23]]
    folder = tmp_path / "export" / "train"
    folder.parent.mkdir()
    (single.parent / "images").rename(folder)
    (folder / "_annotations.coco.json").write_text(json.dumps(data))
    source = opened(folder.parent, tmp_path / "out", 0.25)
    names = [entry["name"] for entry in read(source.splits["train"].json)["categories"]]
    assert names == (["things"] if used else []) + ["c", "a", "b"]
    assert any("category 0, things, is no class" in line for line in source.describe()) != used
    both = [a for part in source.splits.values() for a in read(part.json)["annotations"]]
    assert sum("segmentation" in annotation for annotation in both) == 1


def test_the_held_out_images_are_the_same_in_every_format(tmp_path, write_image):
    for i in range(9):
        for folder in ("yolo/images", "voc"):
            write_image(tmp_path / folder / f"{i}.jpg")
        label = tmp_path / "yolo" / "labels" / f"{i}.txt"
        label.parent.mkdir(exist_ok=True)
        label.write_text(f"{i % 2} 0.5 0.5 0.5 0.5\n")
        box = "<bndbox><xmin>20</xmin><ymin>10</ymin><xmax>60</xmax><ymax>30</ymax></bndbox>"
        xml = f"<annotation><object><name>{'ab'[i % 2]}</name>{box}</object></annotation>"
        (tmp_path / "voc" / f"{i}.xml").write_text(xml)
    found = []
    for kind in ("yolo", "voc"):
        part = opened(tmp_path / kind, tmp_path / "out", 0.3).splits["val"]
        found.append({(image["file_name"], image["width"]) for image in read(part.json)["images"]})
    assert found[0] == found[1] and len(found[0]) == 3


def test_notes_of_a_conversion_are_counted_and_kept(tmp_path, write_image):
    for i in range(4):
        write_image(tmp_path / "data" / f"{i}.jpg")
        (tmp_path / "data" / f"{i}.txt").write_text("0 0.5 0.5 0.5 0.5\n" if i else "")
    lines = opened(tmp_path / "data", tmp_path / "out", 0.25).describe()
    assert any("1 x images with an empty label file: kept as background" in line for line in lines)
    assert f"  every case: {tmp_path / 'out' / 'notes.txt'}" in lines and (tmp_path / "out" / "notes.txt").is_file()


def test_a_check_names_no_file_that_is_gone_when_it_ends_and_shows_more_cases(tmp_path, write_image, capsys):
    for i in range(5):
        write_image(tmp_path / "data" / f"{i}.jpg")
        (tmp_path / "data" / f"{i}.txt").write_text("0 0.5 0.5 0.5 0.5\n" if i < 2 else "")
    for words in ([str(tmp_path / "data")], ["demo", f"data={tmp_path / 'data'}"]):
        assert cli.main(["check-data", *words, "data.val_fraction=0.25", "--samples", "0"]) == 0
        said = capsys.readouterr().out
        assert "every case" not in said and "written:" not in said
        (note,) = [line for line in said.splitlines() if "3 x images with an empty label file" in line]
        assert all(f"{i}.txt" in note or f"{i}.jpg" in note for i in (2, 3, 4))
        assert "convert-dataset --classes" in said


# the argument beside the paths


def test_the_argument_and_the_paths_replace_each_other(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {source: there, val_fraction: 0.2}\n")
    assert load_config(recipe).data.val_fraction == 0.2
    other = load_config(recipe, ["data=here"]).data
    assert (other.source, other.val_fraction) == ("here", None)
    paths = load_config(recipe, ["data.root=x"]).data
    assert (paths.source, paths.val_fraction, paths.root) == (None, None, "x")
    recipe.write_text("data: there\n")
    assert load_config(recipe).data.source == "there"
    assert load_config("demo", ["data=12"]).data.source == "12"
    assert load_config("demo", ["data=C:\\my data: #1"]).data.source == "C:\\my data: #1"
    assert load_config("demo", ['data="a b"']).data.source == "a b"


def test_what_makes_no_sense_together_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data=x stands for all paths of the dataset, and data.val_json is one of them"
    ):
        load_config("demo", ["data=x", "data.val_json=y"])
    with pytest.raises(ConfigError, match=r"Write data=FOLDER_OR_JSON data.val_fraction=0.1, without the paths"):
        load_config("demo", ["data.val_fraction=0.1"])
    for value in ("0", "1", "1.5"):
        with pytest.raises(ConfigError, match="val_fraction"):
            load_config("demo", ["data=x", f"data.val_fraction={value}"])


# check-data and convert-dataset coco


def test_check_data_takes_a_folder_and_prints_the_command_that_trains_on_it(split, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check-data", str(split)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"data={split}: COCO json; train 9 images") and "val.json: 3 of 3 images" in said
    assert f" brs_detr train brs_detr_small_cpu data={split} " in said
    assert (tmp_path / "check-data.png").is_file() and (tmp_path / "check-data-2.png").is_file()
    (split / "annotations" / "val.json").unlink()
    assert cli.main(["check-data", str(split), "--samples", "0"]) == 0
    assert f"data={split} data.val_fraction=0.1" in capsys.readouterr().out
    (split / "annotations" / "train.json").unlink()
    assert cli.main(["check-data", str(split)]) == 2
    assert "no dataset was recognized here" in capsys.readouterr().err


def test_check_data_takes_a_yolo_yaml_and_a_recipe_does_not(tmp_path, write_image, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "y" / "images" / "a.jpg")
    (tmp_path / "y" / "labels").mkdir()
    (tmp_path / "y" / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "y" / "data.yaml").write_text("train: images\nnames: [cat]\n")
    assert cli.main(["check-data", "y/data.yaml", "--samples", "0"]) == 0
    assert "YOLO; train 1 images" in capsys.readouterr().out
    assert cli.main(["train", "y/data.yaml"]) == 2
    assert "this describes a YOLO dataset, not a recipe. Name a recipe first, e.g. brs_detr_small data=y/data.yaml" in (
        capsys.readouterr().err
    )


def test_convert_dataset_coco_splits_a_json(single, tmp_path, capsys):
    words = ["convert-dataset", "coco", str(single)]
    assert cli.main([*words, "--val-fraction", "0.25"]) == 0
    said = capsys.readouterr().out
    assert f"{single.parent}/train.json: 9 images, 12 objects, 3 classes" in said
    assert f"check-data {single.parent}/val.json --images {single.parent}/images" in said
    (training,) = [shlex.split(line) for line in said.splitlines() if " brs_detr train " in line]
    data = load_config(training[4], training[5:]).data
    assert (len(open_train_set(data, 0)), len(open_val_set(data))) == (9, 3)
    first = read(single.parent / "val.json")
    assert cli.main([*words, "--val-fraction", "0.25", "--out", str(tmp_path / "again")]) == 0
    assert read(tmp_path / "again" / "val.json") == first
    assert cli.main([*words, str(tmp_path / "seeded"), "--val-fraction", "0.25", "--seed", "5"]) == 0
    assert read(tmp_path / "seeded" / "val.json")["images"] != first["images"]


def test_no_recipe_is_proposed_for_a_json_that_cannot_be_trained_on(single, tmp_path, capsys):
    content = read(single)
    for annotation in content["annotations"]:
        annotation["bbox"] = "none"
    single.write_text(json.dumps(content))
    assert cli.main(["convert-dataset", "coco", str(single), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "check-data" in said and " brs_detr train " not in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--val-fraction", "2"], "--val-fraction 2: it needs a number between 0 and 1"),
        (["--classes", "a,b"], "a COCO json says these itself"),
        (["out", "--out", "other"], "given twice (out)"),
        (["--images", "nowhere", "--one-based"], "Leave them out"),
    ],
)
def test_a_split_that_cannot_be_is_refused(single, tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert-dataset", "coco", str(single), *words]) == 2
    assert sentence in capsys.readouterr().err and not (single.parent / "train.json").exists()


def test_a_split_does_not_take_the_place_of_its_source_nor_of_another_json(single, capsys):
    single.rename(single.parent / "train.json")
    assert cli.main(["convert-dataset", "coco", str(single.parent / "train.json")]) == 2
    assert "its own split would take its place" in capsys.readouterr().err
    (single.parent / "train.json").rename(single)
    (single.parent / "val.json").write_text("{}")
    assert cli.main(["convert-dataset", "coco", str(single)]) == 2
    assert "was not made by this command" in capsys.readouterr().err and not (single.parent / "train.json").exists()


def test_a_storage_that_fails_is_not_taken_for_a_wrong_dataset(single, tmp_path, monkeypatch):
    """A scheduler starts a run again after a fault of the storage, and not after a mistake of the user."""

    def fail(number):
        def failing(*_, **__):
            raise OSError(number, os.strerror(number))

        return failing

    for place, name in ((json_file, "read_file"), (layouts, "_of_file"), (dataset_source, "load_json")):
        with monkeypatch.context() as broken, pytest.raises(ReadError, match=rf"{single}: the storage fails: Stale fi"):
            broken.setattr(place, name, fail(errno.ESTALE))
            opened(single, tmp_path / "out", 0.25)
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space left") as error:
        full.setattr(coco.os, "replace", fail(errno.ENOSPC))
        opened(single, tmp_path / "out", 0.25)
    assert not isinstance(error.value, DataError) and not list((tmp_path / "out").iterdir())
    with monkeypatch.context() as closed, pytest.raises(DataError, match="Permission denied"):
        closed.setattr(coco.os, "replace", fail(errno.EACCES))
        opened(single, tmp_path / "out", 0.25)


def test_a_complete_download_of_coco(split, tmp_path, capsys):
    """Captions, keypoints and lists of test images lie beside the instances of each split."""
    images, notes = split / "images", split / "annotations"
    for part in ("train", "val"):
        (split / f"{part}2017").mkdir()
        for image in read(notes / f"{part}.json")["images"]:
            (images / image["file_name"]).rename(split / f"{part}2017" / image["file_name"])
        for kind in ("captions", "person_keypoints"):
            (notes / f"{kind}_{part}2017.json").write_text((notes / f"{part}.json").read_text())
        (notes / f"{part}.json").rename(notes / f"instances_{part}2017.json")
    images.rename(split / "test2017")
    for part in ("test-dev2017", "test2017", "unlabeled2017"):
        (notes / f"image_info_{part}.json").write_text(json.dumps({"images": [], "categories": []}))
    source = opened(split, tmp_path / "out")
    assert {name: (part.json.name, part.images.name) for name, part in source.splits.items()} == {
        name: (f"instances_{name}2017.json", f"{name}2017") for name in ("train", "val")
    }
    assert cli.main(["check-data", str(split), "--samples", "0"]) == 0
    assert "not used: annotations/captions_train2017.json" in capsys.readouterr().out

    (notes / "instances_val2017.json").unlink()
    for kind in ("captions", "person_keypoints"):
        (notes / f"{kind}_val2017.json").unlink()
    with pytest.raises(DataError, match=r"no validation split .found: train; not used: .*image_info_test2017.json"):
        opened(split, tmp_path / "out")
    assert set(opened(split, tmp_path / "out", 0.25).splits) == {"train", "val"}
