"""`convert-dataset`: what it writes, prints and refuses; and that boxes survive the way there and back."""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest

from brs_detr import cli
from brs_detr.commands.convert_dataset import NOTES_FILE
from brs_detr.config import load_config
from brs_detr.data.build import open_train_set, open_val_set
from brs_detr.data.dataset_source import open_source
from brs_detr.data.formats.voc import read_voc
from brs_detr.data.formats.yolo import read_yolo

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture()
def yolo(tmp_path, write_image):
    """Twelve images in one folder, eleven of them with the same box, in a place with blanks in its name."""
    folder = tmp_path / "my data: #1" / "flat"
    for i in range(12):
        write_image(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text("1 0.5 0.5 0.25 0.5\n" if i else "")
    (folder / "classes.txt").write_text("cat\n🐕 dog\n")
    return folder


def convert(*arguments):
    return cli.main(["convert-dataset", *map(str, arguments)])


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_printed_commands_work_as_printed(yolo, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out put"
    assert convert("yolo", yolo, out, "--val-fraction", 0.25) == 0
    printed = capsys.readouterr().out
    assert f"{out}/train.json: 9 images, " in printed and "2 classes" in printed
    monkeypatch.chdir(tmp_path)
    checks = [line for line in printed.splitlines() if "check-data" in line]
    for line in checks:
        python, m, package, *arguments = shlex.split(line)
        assert (python, m, package) == ("python", "-m", "brs_detr") and cli.main([*arguments, "--samples", "1"]) == 0
    (training,) = [shlex.split(line) for line in printed.splitlines() if " brs_detr train " in line]
    config = load_config(training[4], training[5:])
    train, val = open_train_set(config.data, 0), open_val_set(config.data)
    assert len(checks) == 2 and (len(train), len(val)) == (9, 3) and train.classes == ["cat", "🐕 dog"]


def test_without_a_val_split_it_says_how_to_make_one_and_trains_on_a_part(yolo, tmp_path, capsys):
    assert convert("yolo", yolo, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "--val-fraction" in printed
    (training,) = [shlex.split(line) for line in printed.splitlines() if " brs_detr train " in line]
    data = load_config(training[4], training[5:]).data
    assert (data.source, data.val_fraction) == (str(yolo), 0.1)
    opened = open_source(data, tmp_path / "run")
    assert {name: split.number for name, split in opened.splits.items()} == {"train": 11, "val": 1}
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [NOTES_FILE, "train.json"]


def test_what_another_reading_would_change_is_not_proposed(yolo, tmp_path, capsys):
    """`data=` takes no names of classes."""
    assert convert("yolo", yolo, tmp_path / "out", "--classes", "x, y") == 0
    printed = capsys.readouterr().out
    assert "--val-fraction 0.1 splits val off train" in printed and " brs_detr train " not in printed


def test_every_note_is_written_down(yolo, tmp_path, capsys):
    for i in range(5):
        (yolo / f"{i}.txt").write_text("9 0.5 0.5 0.25 0.5\n1 0.5 0.5 0.25 0.5")
    convert("yolo", yolo, tmp_path / "out")
    assert "5 x label lines left out whose class has no name" in capsys.readouterr().out
    assert (tmp_path / "out" / NOTES_FILE).read_text(encoding="utf-8").count("no name") == 5


def test_converting_again_gives_the_same_bytes(yolo, tmp_path):
    for name in ("a", "b", "b"):
        convert("yolo", yolo, tmp_path / name, "--val-fraction", "0.5")
    for split in ("train", "val"):
        assert (tmp_path / "a" / f"{split}.json").read_bytes() == (tmp_path / "b" / f"{split}.json").read_bytes()


def test_a_json_of_someone_else_is_not_overwritten(yolo, tmp_path, capsys):
    theirs = tmp_path / "out" / "val.json"
    theirs.parent.mkdir()
    theirs.write_text('{"images": []}')
    assert convert("yolo", yolo, theirs.parent, "--val-fraction", "0.1") == 2
    assert list(theirs.parent.iterdir()) == [theirs]
    assert theirs.read_text() == '{"images": []}' and "not made by this command" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_named(yolo, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert convert("yolo", yolo, tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/out")


@pytest.mark.parametrize("as_file", [False, True])
def test_names_given_by_hand(yolo, tmp_path, as_file):
    names = tmp_path / "names.txt"
    names.write_text("x\ny\n\n")
    assert convert("yolo", yolo, tmp_path / "out", "--classes", names if as_file else "x, y") == 0
    assert read(tmp_path / "out" / "train.json")["categories"] == [{"id": 0, "name": "x"}, {"id": 1, "name": "y"}]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--classes", "x,,y"], "--classes x,,y"),
        (["--classes", "x,x"], "without duplicates"),
        (["--classes", ""], "--classes"),
        (["--one-based"], "are for VOC only"),
        (["--val-fraction", "10"], "between 0 and 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(yolo, tmp_path, capsys, options, sentence):
    assert convert("yolo", yolo, tmp_path / "out", *options) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_an_empty_folder_is_refused_with_one_sentence(kind, tmp_path, capsys):
    assert convert(kind, tmp_path, tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()


# COCO to the other formats and back


def write_yolo(data, images, root):
    """A YOLO folder with six digits, as most tools write them; class numbers are ranks of the category ids."""
    rank = {
        entry["id"]: number for number, entry in enumerate(sorted(data["categories"], key=lambda entry: entry["id"]))
    }
    (root / "images").symlink_to(images)
    (root / "labels").mkdir()
    names = {rank[entry["id"]]: entry["name"] for entry in data["categories"]}
    (root / "data.yaml").write_text(f"train: list.txt\nnames: {json.dumps([names[i] for i in sorted(names)])}\n")
    (root / "list.txt").write_text("".join(f"./images/{image['file_name']}\n" for image in data["images"]))
    for image in data["images"]:
        scale = np.array([image["width"], image["height"]] * 2)
        lines = []
        for entry in of_image(data, image):
            x, y, w, h = entry["bbox"]
            fractions = np.array([x + w / 2, y + h / 2, w, h]) / scale
            lines.append(f"{rank[entry['category_id']]} " + " ".join(f"{value:.6f}" for value in fractions) + "\n")
        (root / "labels" / image["file_name"]).with_suffix(".txt").write_text("".join(lines))


def write_voc(data, images, root):
    """A VOC folder; corners have two digits after the point."""
    names = {entry["id"]: entry["name"] for entry in data["categories"]}
    (root / "JPEGImages").symlink_to(images)
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n".join(Path(i["file_name"]).stem for i in data["images"]))
    for image in data["images"]:
        objects = ""
        for entry in of_image(data, image):
            x, y, w, h = entry["bbox"]
            corners = zip(("xmin", "ymin", "xmax", "ymax"), (round(v, 2) for v in (x, y, x + w, y + h)))
            box = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
            objects += f"<object><name>{names[entry['category_id']]}</name><bndbox>{box}</bndbox></object>"
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        text = f"<annotation><filename>{image['file_name']}</filename>{size}{objects}</annotation>"
        (root / "Annotations" / image["file_name"]).with_suffix(".xml").write_text(text, encoding="utf-8")


def of_image(data, image):
    return [entry for entry in data["annotations"] if entry["image_id"] == image["id"] and not entry["iscrowd"]]


@pytest.mark.parametrize("name", ["bccd", "nuclei", "tiny_coco"])
@pytest.mark.parametrize(("write", "read_back"), [(write_yolo, read_yolo), (write_voc, read_voc)])
def test_boxes_of_real_images_survive_the_way_there_and_back(shared_data, tmp_path, name, write, read_back):
    data = read(shared_data / name / "annotations" / "val.json")
    write(data, shared_data / name / "images", tmp_path)
    imported = read_back(tmp_path)
    assert not any(kind.startswith(("boxes", "label lines", "objects")) for kind in imported.notes.places)
    samples = {sample.path.name: sample for sample in imported.splits["train"]}
    names = {entry["id"]: entry["name"] for entry in data["categories"]}
    assert samples.keys() == {image["file_name"] for image in data["images"]}
    for image in data["images"]:
        sample, entries = samples[image["file_name"]], of_image(data, image)
        assert sample.size == (image["height"], image["width"])
        assert [imported.classes[item["category_id"]] for item in sample.objects] == [
            names[e["category_id"]] for e in entries
        ]
        # half a unit of the last digit for each of the numbers that a side is made of
        tolerance = 1.01e-6 * max(sample.size) if write is write_yolo else 0.0101
        for item, entry in zip(sample.objects, entries, strict=True):
            assert item["bbox"] == pytest.approx(entry["bbox"], abs=tolerance + 1e-4)


def test_pipes_in_a_folder_are_not_waited_for(yolo, tmp_path, capsys, write_image):
    """As image, label file, list, annotation, and as what would be written over."""
    os.mkfifo(yolo / "x.jpg")
    os.mkfifo(yolo / "y.txt")
    os.mkfifo(yolo / "z.yaml")
    write_image(yolo / "y.jpg")
    assert convert("yolo", yolo, tmp_path / "out") == 0
    assert "x.jpg: this image cannot be read: it is a named pipe" in capsys.readouterr().out
    assert len(read(tmp_path / "out" / "train.json")["images"]) == 13
    os.mkfifo(yolo / "data.yaml")
    assert convert("yolo", yolo, tmp_path / "out") == 2
    assert "data.yaml: this file is not read: it is a named pipe" in capsys.readouterr().err
    (tmp_path / "out" / "train.json").unlink()
    os.mkfifo(tmp_path / "out" / "train.json")
    (yolo / "data.yaml").unlink()
    assert convert("yolo", yolo, tmp_path / "out") == 2
    assert "was not made by this command" in capsys.readouterr().err


VOC = (
    "<annotation><filename>{0}.jpg</filename><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
    "<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
)


def test_a_hostile_xml_is_left_out_and_said(tmp_path, write_image, capsys):
    folder = tmp_path / "voc"
    laughs = "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 9))
    bomb = f"<!DOCTYPE x [<!ENTITY a0 'ha'>{laughs}]>" + VOC.replace("cat", "&a8;")
    contents = {
        "good": VOC.format("good").encode(),
        "laughs": bomb.encode(),
        "wide": f'<?xml version="1.0" encoding="utf-16"?>{bomb}'.encode("utf-16"),
        "deep": b"<annotation>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</annotation>",
    }
    for name, content in contents.items():
        write_image(folder / f"{name}.jpg")
        (folder / f"{name}.xml").write_bytes(content)
    os.mkfifo(folder / "pipe.xml")
    with open(folder / "holes.xml", "wb") as file:
        file.truncate(8 * 2**30)
    assert convert("voc", folder, tmp_path / "out") == 0
    said = capsys.readouterr().out + (tmp_path / "out" / NOTES_FILE).read_text()
    assert "laughs.xml (it declares entities)" in said and "wide.xml (it declares entities)" in said
    assert "pipe.xml: this file is not read: it is a named pipe" in said
    assert "holes.xml: this file is not read: it has 8,589,934,592 bytes" in said
    assert {"good.jpg", "deep.jpg"} >= {image["file_name"] for image in read(tmp_path / "out" / "train.json")["images"]}


def test_names_in_notes_are_printed_safely(yolo, tmp_path, capsys, write_image):
    write_image(yolo / "a\x1b[31m\nb.jpg")
    assert convert("yolo", yolo, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and r"a\x1b[31m\x0ab.jpg" in said


def test_a_large_image_is_converted_for_it_is_not_decoded(yolo, tmp_path, capsys):
    size = (yolo / "0.jpg").stat().st_size
    assert convert("yolo", yolo, tmp_path / "out", "--max-image-bytes", size - 1) == 2
    assert "more than data.max_image_bytes=" in capsys.readouterr().err
