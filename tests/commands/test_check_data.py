"""What `check-data` says without a recipe: as the training that it proposes would see the dataset."""

import json
import shlex
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from brs_detr import cli
from brs_detr.commands.check_data import with_paths
from brs_detr.commands.first_recipe import LARGE, SMALL
from brs_detr.config import load_config
from brs_detr.data.build import open_train_set, open_val_set
from brs_detr.data.config import Limits


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def write(folder, sides, name="train"):
    """A json of square images, each with an object but for those of a negative side; returns it."""
    images, annotations = [], []
    for number, side in enumerate(sides):
        path = folder / "images" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (abs(side), abs(side), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        images.append({"id": number, "file_name": path.name, "width": abs(side), "height": abs(side)})
        if side > 0:
            box = {"bbox": [2, 3, 12, 14], "area": 168, "category_id": 1, "iscrowd": 0}
            annotations.append({"id": number, "image_id": number, **box})
    target = folder / "annotations" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    categories = [{"id": 1, "name": "a"}]
    target.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return target


def command_in(printed):
    """The name of the recipe and the settings of the command that was printed."""
    (line,) = [line for line in printed.splitlines() if line.startswith("python -m brs_detr train")]
    return shlex.split(line)[4:]


@pytest.mark.parametrize("as_folder", [True, False])
def test_images_are_left_out_as_the_proposed_recipe_leaves_them_out(tmp_path, capsys, as_folder):
    train, _ = write(tmp_path, [28, 28, 64, -64]), write(tmp_path, [40], "val")
    target = str(tmp_path if as_folder else train)
    for given, used in (
        ([], 4),
        (["data.min_side=40"], 2),
        (["--data.keep_empty=false"], 3),
        (["data.max_image_pixels=2000"], 2),
    ):
        assert cli.main(["check-data", target, "--samples", "0", *given]) == 0
        printed = capsys.readouterr().out
        assert f"{used} of 4 images and" in printed
        name, *settings = command_in(printed)
        assert all(word.lstrip("-") in settings for word in given)
        if not as_folder:
            assert len(open_train_set(load_config(name, settings).data, 0)) == used


def test_the_recipe_for_many_images_leaves_out_what_the_one_for_few_does():
    few, many = (load_config(name).data for name in (SMALL, LARGE))
    assert (few.min_side, few.keep_empty) == (many.min_side, many.keep_empty)
    assert all(getattr(few, field.name) == getattr(many, field.name) for field in fields(Limits))


def test_sizes_of_the_command_line_do_not_stand_beside_those_that_are_proposed(tmp_path, capsys):
    target = write(tmp_path, [64] * 3)
    write(tmp_path, [64], "val")
    assert cli.main(["check-data", str(target), "--samples", "0", "data.test_short_side=500"]) == 0
    assert "500" not in " ".join(command_in(capsys.readouterr().out))


def test_a_json_alone_is_divided_by_the_command(tmp_path, capsys):
    alone = write(tmp_path, [64] * 12, "annotations")
    assert cli.main(["check-data", str(alone), "--samples", "0", "data.min_side=8"]) == 0
    printed = capsys.readouterr().out
    assert "VAL.json" not in printed and "a tenth of its images is held out" in printed
    name, *settings = command_in(printed)
    opened = with_paths(load_config(name, settings), tmp_path / "out").data
    assert (len(open_train_set(opened, 0)), len(open_val_set(opened))) == (11, 1) and opened.min_side == 8


@pytest.mark.parametrize("as_folder", [True, False])
def test_one_image_with_objects_is_not_answered_with_a_command(tmp_path, capsys, as_folder):
    alone = write(tmp_path, [64, -64], "train")
    assert cli.main(["check-data", str(tmp_path if as_folder else alone), "--samples", "0"]) == 0
    printed = capsys.readouterr().out
    assert "one image with objects cannot be divided" in printed and "brs_detr train" not in printed


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        ("there/is/no/such", "there/is/no/such: there is no such folder, json or recipe. Name the folder"),
        ("/there/is/no/dmeo", "no/dmeo: there is no such folder, json or recipe. Name the folder"),
        ("dmeo", "dmeo: there is no such folder, json or recipe. Did you mean the recipe demo? Name the folder"),
        ("data.root=/x", "this is a setting. Name the recipe before it"),
    ],
)
def test_a_target_that_is_not_there_is_answered_in_a_line(tmp_path, monkeypatch, capsys, target, answer):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check-data", target]) == 2
    said = capsys.readouterr().err
    assert answer in said and "The recipes are" not in said


def test_the_folder_of_a_run_is_named_as_one(tmp_path, capsys):
    (tmp_path / "best.safetensors").touch()
    (tmp_path / "config.yaml").touch()
    assert cli.main(["check-data", str(tmp_path)]) == 2
    said = f"{tmp_path}: this is the folder of a run, not a dataset. `brs-detr check-data {tmp_path}/config.yaml`"
    assert said in capsys.readouterr().err
