"""The list of published numbers, its recipes, and an evaluation of a converted file as the list describes it."""

import json
import math
import re

import pytest
import torch
from support import reset_accelerate, script

from brs_detr import cli
from brs_detr.checkpoints.keys import to_official
from brs_detr.config import differences, load_config
from brs_detr.data.synthetic import make_dataset
from brs_detr.models.build import build_model
from brs_detr.run.setup import restore


def test_every_recipe_for_coco_is_listed_and_every_listed_recipe_exists(recipes):
    docs = recipes.parent / "docs"
    text = (docs / "reproduce.md").read_text(encoding="utf-8")
    of_dino = re.findall(
        r"^\| .*`configs/(\w+)\.yaml`", (docs / "co_dino.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    listed = [*re.findall(r"configs/(?:cnn/)?(\w+)\.yaml", text), *of_dino]
    published = [
        path
        for kind in ("*_coco*", "*_lvis", "cnn/*_coco*", "cnn/*_lvis", "cnn/*_cityscapes")
        for path in recipes.glob(f"{kind}.yaml")
    ]
    assert set(listed) == {path.stem for path in published}
    in_tables = re.findall(r"^\| .*`configs/cnn/(\w+)\.yaml`", text, re.MULTILINE)
    assert len(in_tables) == len(set(in_tables)) == sum(path.parent.name == "cnn" for path in published)


def test_the_figures_of_the_tables_are_those_of_the_recipes(recipes):
    """Every figure that a row names is in the first lines of its recipe, which say where it comes from."""
    text = (recipes.parent / "docs" / "reproduce.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*`configs/cnn/(\w+)\.yaml` \| ([^|]+) \| not yet run \|$", text, re.MULTILINE)
    assert len(rows) > 40
    for name, figures in rows:
        comments = [line for line in (recipes / "cnn" / f"{name}.yaml").read_text().splitlines() if line[:1] == "#"]
        assert all(figure in " ".join(comments) for figure in re.findall(r"\d\d\.\d", figures)), name


def test_an_epoch_of_coco_has_the_published_number_of_steps(recipes):
    for path in recipes.glob("*_12e_coco*.yaml"):
        config = load_config(path)
        assert config.data.keep_empty
        assert math.ceil(118287 / config.train.total_batch_size) == 7393


def test_recipes_beside_the_papers_tables_change_only_what_they_name(recipes):
    released = load_config(recipes / "brs_detr_r50_12e_coco.yaml")
    rank_sort = load_config(recipes / "rs_detr_r50_12e_coco.yaml")
    assert differences(released, rank_sort)[1:] == [
        f"model.{head}objective.loss: brs -> rs" for head in ("", "rpn.", "roi.", "atss.")
    ]
    assert rank_sort.optim == released.optim and rank_sort.train == released.train
    printed = load_config(recipes / "brs_detr_r50_12e_coco_as_printed.yaml").model
    heads = (printed, printed.rpn, printed.roi, printed.atss)
    assert [head.objective.weight for head in heads] == [1, 5, 5, 5]
    small, base = (load_config(recipes / f"co_detr_swin_{size}_12e_coco.yaml").model for size in "sb")
    tiny = load_config(recipes / "co_detr_swin_t_12e_coco.yaml").model
    assert tiny.matcher == small.matcher == base.matcher and tiny.roi == small.roi == base.roi


@pytest.fixture
def evaluate():
    """eval.py as a function."""
    reset_accelerate()
    return script("eval")


def test_a_converted_co_dino_is_evaluated_on_its_canvas(small_dino, tmp_path, evaluate):
    """With the settings that the conversion stored, and no other."""
    data = make_dataset(tmp_path / "data", train=1, val=2, image_size=64)
    truth = data / "annotations" / "val.json"
    model = build_model(small_dino(), len(json.loads(truth.read_text())["categories"]))
    torch.save({"state_dict": to_official(model.state_dict())[0]}, tmp_path / "epoch_12.pth")
    weights = tmp_path / "converted.safetensors"
    options = ["--num-classes-from", str(truth), "--augmentation", "lsj", "--canvas", "96"]
    assert cli.main(["convert", str(tmp_path / "epoch_12.pth"), str(weights), *options]) == 0
    places = [f"data.root={data}", "data.val_json=annotations/val.json", "data.val_images=images/val"]
    assert evaluate([str(weights), *places, "--images", "0"]) == 0
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert 0 < len(results) <= 2 * 12 * model.num_classes
    assert restore(weights)[0].test_canvas == 96


def test_a_converted_file_evaluates_as_it_is(small_model, tmp_path, evaluate):
    """Of a detector with random weights; what eval.py finds is what the detector itself finds."""
    data = make_dataset(tmp_path / "data", train=1, val=2, image_size=64)
    truth = data / "annotations" / "val.json"
    classes = len(json.loads(truth.read_text())["categories"])
    settings = small_model(False)
    model = build_model(settings, classes)
    torch.save({"state_dict": to_official(model.state_dict())[0]}, tmp_path / "official.pth")
    weights = tmp_path / "converted.safetensors"
    assert cli.main(["convert", str(tmp_path / "official.pth"), str(weights), "--num-classes-from", str(truth)]) == 0
    places = [f"data.root={data}", "data.val_json=annotations/val.json", "data.val_images=images/val"]
    assert evaluate([str(weights), *places, "data.test_short_side=64", "--images", "0"]) == 0
    figures = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["stats"]
    assert 0 <= figures["AP"] <= 1
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert len(results) == 2 * min(100, settings.queries * classes)
