"""`model.anchors=auto`: chosen from the boxes, stored as numbers; and the anchors of every detector by its settings."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from support import DEMO, SMALL_BACKBONE, SMALL_DETECTOR, SMALL_IMAGES, reset_accelerate, script

from brs_detr import cli
from brs_detr.config import Config, ConfigError, apply_overrides, load_config, to_dict
from brs_detr.data.anchor_fit import Boxes, at_training_size, best_scale, boxes_of
from brs_detr.data.build import open_train_set
from brs_detr.data.synthetic import make_dataset
from brs_detr.engine.checkpoint import Weights, load_weights, save_weights
from brs_detr.engine.logging import read_metrics
from brs_detr.models.build import build_model
from brs_detr.models.heads.dense import DenseHead
from brs_detr.models.model_config import MODELS
from brs_detr.ops.anchors import base_anchors, octave_scales
from brs_detr.run.anchors import choose_anchors, fit_heads, layouts, scales_of, warn_of_misfit, with_scales
from brs_detr.run.dataset import TrainSet
from brs_detr.run.setup import restore

WITHOUT = ("foveabox", "solov2")
train = script("train")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    reset_accelerate()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), train=10, val=3, image_size=72)


def automatic(data, *overrides):
    return load_config(DEMO, [f"data.root={data}", "model.anchors=auto", *overrides])


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_anchors_of_the_settings_are_those_of_the_detector(model):
    backbone = replace(SMALL_BACKBONE, levels=model.backbone.levels)
    found = layouts(model)
    detector = build_model(replace(model, backbone=backbone, dim=64), 2)
    heads = {
        name: part
        for name, part in detector.named_children()
        if isinstance(part, DenseHead) and model.name not in WITHOUT
    }
    assert set(found) == set(heads) and bool(heads) == (model.name not in WITHOUT)
    for name, head in heads.items():
        layout, grid = found[name], head.anchors
        assert layout.strides == grid.strides and layout.offset == grid.offset
        scales = octave_scales(layout.scale, layout.per_octave)
        bases = [base_anchors(stride, scales, layout.ratios) for stride in layout.strides]
        torch.testing.assert_close(torch.stack(bases), grid.bases)
        assert layout.border == getattr(head, "allowed_border", None)
        assert layout.even == (model.name == "yolact")


@pytest.mark.parametrize("name", [model.name for model in MODELS])
def test_anchors_are_automatic_where_there_are_any(name):
    overrides = [f"model.name={name}", "model.anchors=auto"]
    if name not in WITHOUT:
        assert apply_overrides(Config(), overrides).model.anchors == "auto"
        return
    with pytest.raises(
        ConfigError, match=rf"model\.anchors is not a setting of model\.name={name}; .*brs_detr, .*atss"
    ):
        apply_overrides(Config(), overrides)


@pytest.mark.parametrize("name", ["brs_detr", "atss", "retinanet", "paa", "faster_rcnn", "cascade_rcnn", "yolact"])
def test_the_scales_chosen_are_the_best_for_the_boxes_of_training(data, name):
    config = automatic(data, f"model.name={name}")
    chosen, [line] = choose_anchors(config, None, Accelerator(cpu=True), TrainSet())
    boxes = at_training_size(boxes_of(open_train_set(config.data, 0).packed), config.data)
    wanted = {head: best_scale(boxes, layout)[0].scale for head, layout in layouts(config.model).items()}
    assert scales_of(chosen.model) == wanted and chosen.model.anchors == "fixed"
    for head, scale in wanted.items():
        assert f"model.{head}.anchor_scale={scale:g}" in line
    assert choose_anchors(config, None, Accelerator(cpu=True), TrainSet()) == (chosen, [line])
    assert with_scales(config.model, wanted) == chosen.model  # nothing else has changed
    assert choose_anchors(chosen, None, Accelerator(cpu=True), TrainSet()) == (chosen, [])


def test_the_log_warns_where_objects_are_too_small_or_shaped_otherwise(data):
    tiny = automatic(data, "data.augment.short_sides=[24]", "data.augment.long_side=24")
    _, [line, warning] = choose_anchors(tiny, None, Accelerator(cpu=True), TrainSet())
    assert "anchors chosen from" in line and warning.startswith("warning: objects: half are under ")
    assert "on images of " in warning and "--tiles" not in warning  # the images are smaller than such a tile
    flat = automatic(data, "model.rpn.anchor_ratios=[0.05]")
    _, [line, warning] = choose_anchors(flat, None, Accelerator(cpu=True), TrainSet())
    assert warning.startswith("warning: objects: only 0% have an anchor at IoU >= .5. ")


def squares(side, label, number=40):
    """Objects of one class in images of 160 x 160 pixels."""
    low = torch.rand(number, 2, generator=torch.Generator().manual_seed(0)) * (160 - side)
    return Boxes(torch.cat([low, low + side], dim=1), torch.full((number, 2), 160.0), torch.full((number,), label))


def warnings_of(name, *objects):
    """What is warned of with the best scale of a recipe's first head, at the size of the images."""
    overrides = ["data.augment.short_sides=[160]", "data.augment.long_side=160"]
    config = apply_overrides(load_config(name), overrides)
    boxes = Boxes(*(torch.cat(columns) for columns in zip(*objects, strict=True)))
    head = next(iter(fit_heads(config.model, boxes).values()))
    return warn_of_misfit(config.data, boxes, head, {0: "cells", 6: "rods\n", 7: "dots"})


def test_classes_that_no_anchor_fits_are_named():
    """By the mean over the classes such a dataset fits well, and the class is never found."""
    others = [squares(side, label) for label, side in enumerate((34, 40, 60, 80, 100, 50))]
    rods, dots = squares(8, 6), squares(7, 7)
    assert warnings_of("brs_detr_small_cpu", *others) == []
    (warning,) = warnings_of("brs_detr_small_cpu", *others, rods)
    assert warning == (
        "warning: objects: only 0% of rods\\x0a have an anchor at IoU >= .5. "
        "Look with `check-data RECIPE` for settings that fit more."
    )
    (warning,) = warnings_of("brs_detr_small_cpu", *others, squares(4, 8), squares(5, 9), dots, rods)
    assert "only 0% of rods\\x0a, 0% of dots, 0% of class 8, ... (4 classes) have an anchor" in warning
    assert warnings_of("cnn/atss_demo", *others, rods) == []  # there each object has positives


def test_a_resumed_run_keeps_the_anchors_that_it_began_with():
    began = load_config(DEMO, ["model.rpn.anchor_scale=3.25", "model.atss.anchor_scale=5.5"])
    config = load_config(DEMO, ["model.anchors=auto", "data.root=nowhere"])
    resumed, [line] = choose_anchors(config, {"config": to_dict(began)}, Accelerator(cpu=True), TrainSet())
    assert resumed.model == began.model and "of the resumed run: model.rpn.anchor_scale=3.25" in line


def test_weights_to_start_from_keep_theirs_if_they_are_of_the_same_detector(data, tmp_path):
    def weights(config):
        tensors = {"x": torch.zeros(1)}
        save_weights(tmp_path / "w.safetensors", Weights(tensors, ["a"], [1], to_dict(config), {}))
        return f"train.init_from={tmp_path / 'w.safetensors'}"

    file = weights(load_config(DEMO, ["model.rpn.anchor_scale=6.5"]))
    started, [line] = choose_anchors(automatic(data, file), None, Accelerator(cpu=True), TrainSet())
    assert scales_of(started.model) == {"rpn": 6.5, "atss": 4.0} and "w.safetensors" in line
    file = weights(load_config(DEMO, ["model.name=atss", "model.head.anchor_scale=6.5"]))
    started, [line] = choose_anchors(automatic(data, file), None, Accelerator(cpu=True), TrainSet())
    assert "anchors chosen from" in line


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The command line of a run with automatic anchors that has trained for an epoch."""
    folder = tmp_path_factory.mktemp("run")
    settings = [*SMALL_DETECTOR, *SMALL_IMAGES, "train.total_batch_size=4", "train.epochs=2", "model.anchors=auto"]
    command = [DEMO, *settings, f"data.root={data}", f"output_dir={folder}"]
    reset_accelerate()
    assert train(command) == 0
    return folder, command


def test_a_run_stores_the_numbers_and_not_where_they_came_from(run):
    folder, _ = run
    config = load_config(folder / "config.yaml")
    assert config.model.anchors == "fixed" and scales_of(config.model) != scales_of(load_config(DEMO).model)
    assert "anchors chosen from" in (folder / "log.txt").read_text()
    stored = load_weights(folder / "best.safetensors").config["model"]
    assert {name: stored[name]["anchor_scale"] for name in ("rpn", "atss")} == scales_of(config.model)
    model, built = restore(folder)[0], build_model(config.model, 5)  # as eval, predict and export load it
    for head in ("rpn", "atss"):
        ours, theirs = (detector.get_submodule(head).anchors.bases for detector in (model, built))
        assert torch.equal(ours, theirs)


def test_a_run_is_resumed_with_the_same_command_or_its_own_config(run, capsys):
    folder, command = run
    assert train([*command, "--resume", "train.epochs=3", "train.allow_changes=true"]) == 0
    said = (folder / "log.txt").read_text()
    assert "anchors of the resumed run: model.rpn.anchor_scale=" in said and "model.anchors: " not in said
    assert "changed since: train.epochs: 2 -> 3" in said and "anchor_scale: " not in said
    reset_accelerate()
    own = [str(folder / "config.yaml"), "--resume", "train.epochs=4", "train.allow_changes=true"]
    assert train(own) == 0
    assert [line["epoch"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "val"] == [1, 2, 3, 4]


def test_weights_have_anchors_that_are_not_chosen_again(run, capsys):
    folder, _ = run
    assert cli.main(["eval", str(folder), "model.anchors=auto"]) == 2
    assert "model.anchors=auto: anchors are chosen when a training begins" in capsys.readouterr().err


def test_the_training_set_of_a_run_is_read_once(data):
    config, train_set = automatic(data), TrainSet()
    chosen, _ = choose_anchors(config, None, Accelerator(cpu=True), train_set)
    opened = train_set(chosen)
    assert train_set(chosen) is opened is train_set(config)
    assert train_set(replace(config, seed=config.seed + 1)) is not opened
