"""The recipe to start from: chosen from what is there, proposed from the boxes, and trainable as it is printed."""

import json
import shlex

import pytest
import torch
from PIL import Image
from support import ROOT

from brs_detr import cli
from brs_detr.commands import first_recipe as module
from brs_detr.commands.anchor_report import describe_anchors, with_finer_maps, with_sizes
from brs_detr.commands.check_data import facts_of, held_out
from brs_detr.commands.convert_dataset import next_steps
from brs_detr.commands.first_recipe import Dataset, Surroundings, choose_recipe, describe_length, first_recipe, propose
from brs_detr.config import apply_overrides, load_config
from brs_detr.data.anchor_fit import Boxes, at_training_size, boxes_of, fit
from brs_detr.data.build import open_train_set, open_val_set
from brs_detr.data.coco import CocoDetection
from brs_detr.data.synthetic import make_dataset
from brs_detr.run.anchors import fit_heads, layouts

GPU = "NVIDIA T4"


def objects(side, short=480, long=640, number=200, high=None):
    """Squares of a side, or boxes that are so high, anywhere in images of one size."""
    size = torch.tensor([side, high or side])
    low = torch.rand(number, 2, generator=torch.Generator().manual_seed(0)) * (torch.tensor([long, short]) - size)
    sizes = torch.tensor([[float(short), long]]).repeat(number, 1)
    return Boxes(torch.cat([low, low + size], dim=1), sizes, torch.zeros(number, dtype=torch.int64))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("my data"), train=12, val=4, image_size=80)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(module, "where_weights_are", lambda *_: None)


@pytest.mark.parametrize(
    ("images", "here", "name", "reason"),
    [
        (205, Surroundings(None, None), "brs_detr_small_cpu", "no GPU was found"),
        (50_000, Surroundings(None, None), "brs_detr_small_cpu", "no GPU was found"),
        (205, Surroundings(GPU, None), "brs_detr_small_cpu", "model.backbone.checkpoint=FILE"),
        (205, Surroundings(GPU, "cache"), "brs_detr_small", "in timm's cache"),
        (205, Surroundings(GPU, "network"), "brs_detr_small", "downloaded once"),
        (50_000, Surroundings(GPU, "network"), "brs_detr_r50_12e_coco", "enough images"),
    ],
)
def test_the_recipe_follows_from_what_is_there(images, here, name, reason):
    chosen, why = choose_recipe(images, here)
    assert chosen == name and reason in why
    text = first_recipe(Dataset(objects(100), images, {"a.jpg": 20}, {"data.root": "/my data"}), here)
    assert f"start from configs/{name}.yaml: {why}" in text and (ROOT / "configs" / f"{name}.yaml").is_file()
    words = shlex.split(text.splitlines()[-1])
    assert words[:5] == ["python", "-m", "brs_detr", "train", name]
    config = load_config(name, words[5:])
    assert (config.data.root, config.output_dir) == ("/my data", "runs/mine")


def test_nobody_is_asked_for_weights_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "where_weights_are", lambda *_: pytest.fail("asked the network"))
    assert module.look_around() == (None, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    monkeypatch.setattr(module, "where_weights_are", lambda name: "cache" if name == "resnet50.tv_in1k" else None)
    assert module.look_around() == (GPU, "cache")


def test_the_length_is_that_of_the_recipe():
    assert describe_length(load_config("brs_detr_small_cpu"), 205) == "1,040 steps of 4 images are 20 epochs"
    assert describe_length(load_config("brs_detr_small_cpu"), 9000) == "2,250 steps of 4 images are 1 epoch"
    assert describe_length(load_config("brs_detr_r50_12e_coco"), 16_000) == "12,000 steps of 16 images are 12 epochs"


def test_large_objects_keep_the_sizes_of_the_recipe():
    for name in ("brs_detr_small", "brs_detr_small_cpu"):
        recipe = load_config(name)
        assert propose(recipe, objects(250, short=1000, long=1400)) == recipe


def test_small_objects_get_finer_maps_and_then_larger_images():
    recipe = load_config("brs_detr_small_cpu")
    finer = propose(recipe, objects(40))  # 14 pixels at 168
    assert finer.model.backbone.levels == (4, 8, 16) and finer.data == recipe.data
    larger = propose(recipe, objects(22))  # 8 pixels at 168, 12 at 252
    assert larger.model.backbone.levels == (4, 8, 16) and larger.data.test_short_side == 252
    assert larger.data.augment.short_sides == (216, 240, 264, 288)
    for config, boxes in ((finer, objects(40)), (larger, objects(22))):
        before = fit_heads(recipe.model, at_training_size(boxes, recipe.data))["rpn"][1]
        assert fit_heads(config.model, at_training_size(boxes, config.data))["rpn"][1].at_50 > before.at_50 + 0.1


def test_small_images_are_not_enlarged_before_finer_maps_are_tried():
    config = propose(load_config("brs_detr_small_cpu"), objects(12, short=80, long=100))
    assert config.data.test_short_side == 80 and config.model.backbone.levels == (4, 8, 16)


@pytest.mark.parametrize(
    ("name", "sizes", "smallest"),
    [("brs_detr_small_cpu", (96, 168), 1), ("brs_detr_small", (96, 192, 384, 640), 0.6)],
)
def test_small_images_with_smaller_objects_are_enlarged_up_to_the_size_of_the_recipe(name, sizes, smallest):
    recipe, shorts = load_config(name), []
    for side in (8, 4, 2, smallest):
        config = propose(recipe, objects(side, short=32, long=32))
        shorts.append(config.data.test_short_side)
        assert config.model.backbone.levels[0] == 4
    assert shorts == sorted(shorts) and shorts[0] <= 96 and shorts[-1] == recipe.data.test_short_side
    assert set(shorts) <= {32, 48, *sizes}


def test_wide_images_are_neither_enlarged_nor_made_smaller_than_the_recipe_makes_them():
    recipe = load_config("brs_detr_small")
    assert propose(recipe, objects(90, short=375, long=1242)) == recipe  # its long side is what limits them: 1066x322
    assert propose(recipe, objects(90, short=1242, long=375)) == recipe
    data = propose(recipe, objects(100, short=512, long=1024)).data  # the recipe would enlarge them to 1066x533
    assert (data.test_short_side, data.test_long_side) == (615, 1024)
    text = first_recipe(Dataset(objects(90, short=375, long=1242), 100, {"a.jpg": 3}, {}), Surroundings(GPU, "cache"))
    assert "at a short side of 322 pixels" in text


def test_a_finer_map_replaces_the_coarsest_where_there_would_be_too_many():
    assert with_finer_maps(load_config("brs_detr_small_cpu")).model.backbone.levels == (4, 8, 16)
    assert with_finer_maps(load_config("brs_detr_small")).model.backbone.levels == (4, 8, 16, 32)
    assert with_finer_maps(load_config("faster_rcnn_r50_brs_12e_coco")) is None
    assert with_finer_maps(load_config("demo")) is None


def test_all_sizes_grow_together():
    data = with_sizes(load_config("brs_detr_small_cpu"), 1.5).data
    assert (data.test_short_side, data.test_long_side) == (252, 504) and data.augment.long_side == 576
    config = apply_overrides(load_config("demo"), ["data.augment={name: ssd, size: 96}", "data.test_square=96"])
    data = with_sizes(config, 1.5).data
    assert data.augment.size == data.test_square == 144


def crowded(*counts):
    """What is printed for images of so many objects, and the config of the printed command."""
    images = {f"{number}.jpg": count for number, count in enumerate(counts)}
    text = first_recipe(Dataset(objects(100), len(images), images, {}), Surroundings(None, None))
    return load_config("brs_detr_small_cpu", shlex.split(text.splitlines()[-1])[5:]), text


def test_images_full_of_objects_raise_every_limit_that_is_lower():
    recipe = load_config("brs_detr_small_cpu")
    config, text = crowded(60)
    assert (config.model, config.eval) == (recipe.model, recipe.eval) and "objects an image" not in text
    config, text = crowded(369, 8)
    model = config.model
    limits = (model.queries, model.detections_per_image, model.rpn.test_proposals, model.roi.max_detections)
    assert {*limits, model.max_aux_queries, config.eval.max_detections} == {400}  # what is found is counted, too
    assert "up to 369 objects an image; limits are raised to 400" in text and "cannot" not in text


def test_a_few_images_fuller_than_all_others_are_named_instead():
    config, text = crowded(*[110] * 298, 170, 1500)
    assert config.model.queries == config.eval.max_detections == 150
    assert (
        "limits are raised to 150; 2 with more than 150 cannot be found completely: 299.jpg (1,500), 298.jpg (170)"
        in text
    )
    config, text = crowded(*[900] * 5)
    assert config.model.queries == 500 and "5 with more than 500" in text and text.count("(900)") == 3
    config, text = crowded(*[20] * 199, 80)
    assert config.model == load_config("brs_detr_small_cpu").model
    assert "up to 80 objects an image; 1 with more than 60 cannot be found completely: 199.jpg (80)" in text


def test_crowds_are_no_objects_to_make_room_for(tmp_path):
    box = {"category_id": 1, "bbox": [1, 2, 30, 40], "area": 1200}
    data = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 80, "height": 60}],
        "annotations": [{"id": i, "image_id": 1, "iscrowd": int(i > 1), **box} for i in range(1, 72)],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(data))
    Image.new("RGB", (80, 60)).save(tmp_path / "a.jpg")
    dataset = CocoDetection(tmp_path / "train.json", tmp_path, train=True)
    assert facts_of(dataset, {}).counts == {"a.jpg": 1}
    converted = next_steps(tmp_path, str(tmp_path), "train", "val", data)
    assert "start from" in converted and "objects an image" not in converted


def test_the_report_of_a_recipe_says_what_its_anchors_reach_and_what_would_raise_it(data, capsys):
    assert cli.main(["check-data", "demo", f"data.root={data}", "--samples", "0"]) == 0
    printed = capsys.readouterr().out
    config = load_config("demo", [f"data.root={data}"])
    stored = boxes_of(open_train_set(config.data, 0).packed)
    boxes = at_training_size(stored, config.data)
    for name, layout in layouts(config.model).items():
        at_50, at_70 = fit(boxes, layout)
        line = f"model.{name}.anchor_scale={layout.scale:g}: {at_50:.1%} of the objects have an anchor at IoU >= .5, "
        assert f"{line}{at_70:.1%} at IoU >= .7" in printed
    (best, reached) = fit_heads(config.model, boxes)["rpn"]
    raised = f"model.rpn.anchor_scale={best.scale:g}: {reached.at_50:.1%}, {reached.at_70:.1%}"
    assert f"model.anchors=auto fits more: {raised}" in printed
    assert printed.count("have an anchor at IoU") == 2  # of the training set alone
    assert cli.main(["check-data", "foveabox_demo", f"data.root={data}", "--samples", "0"]) == 0
    assert "anchors: foveabox has none" in capsys.readouterr().out


def test_a_report_names_the_finer_maps_that_small_objects_need():
    text = describe_anchors(load_config("bccd_cpu"), objects(30))
    assert "model.backbone.levels=[4, 8, 16]" in text or "images 1.5 times as large" in text
    fitting = apply_overrides(load_config("demo"), ["data.augment.short_sides=[160]", "data.augment.long_side=999"])
    text = describe_anchors(fitting, objects(100, number=50))  # 33 pixels: nothing better is near
    assert "with " not in text


def test_a_json_is_answered_with_a_command_that_works_as_printed(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check-data", str(data / "annotations" / "train.json"), "--samples", "0"]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("python -m brs_detr train")]
    name, *overrides = shlex.split(line)[4:]
    config = load_config(name, overrides)
    train, val = open_train_set(config.data, 0), open_val_set(config.data)
    assert (len(train), len(val)) == (12, 4)
    heads = fit_heads(config.model, at_training_size(boxes_of(train.packed), config.data))
    for head, (layout, fitted) in heads.items():
        assert f"{fitted.at_50:.0%} and {fitted.at_70:.0%} ({head}, anchor_scale {layout.scale:g})" in printed


def test_without_a_validation_json_the_command_says_what_to_replace(data, tmp_path, capsys):
    alone = tmp_path / "objects.json"
    alone.write_text((data / "annotations" / "train.json").read_text())
    assert cli.main(["check-data", str(alone), "--images", str(data / "images" / "train"), "--samples", "0"]) == 0
    printed = capsys.readouterr().out
    assert "data.val_json=VAL.json data.val_images=VAL_IMAGES" in printed and "replace VAL.json" in printed
    assert cli.main(["check-data", str(data / "annotations" / "val.json"), "--samples", "0"]) == 0
    printed = capsys.readouterr().out
    assert "this looks like a validation set" in printed and "brs_detr train" not in printed


def test_names_of_validation_sets_are_recognized():
    assert all(map(held_out, ("val.json", "instances_val2017.json", "my-test.json", "Validation_set.json")))
    assert not any(map(held_out, ("train.json", "objects.json", "valves.json", "train_val.json", "contest.json")))


def test_a_dataset_without_objects_at_hand_has_a_recipe_all_the_same():
    empty = Boxes(torch.zeros(0, 4), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    text = first_recipe(Dataset(empty, 3, {}, {}), Surroundings(None, None))
    assert "start from configs/brs_detr_small_cpu.yaml" in text


def test_what_costs_much_more_than_the_recipe_is_said():
    def printed(side):
        return first_recipe(Dataset(objects(side), 100, {"a.jpg": 3}, {}), Surroundings(None, None))

    assert "times as many cells" not in printed(150)
    assert "the maps have 4 times as many cells as the recipe's" in printed(40)  # half the strides
    assert "the maps have 9 times as many cells" in printed(22)  # and 1.5 times the sides
    assert "take longer and more memory" in printed(22) and "batch_size" not in printed(22)  # of a CPU all are held


def test_on_a_gpu_a_costly_proposal_searches_for_the_images_that_fit():
    def command(side):
        boxes = objects(side, short=1080, long=1920)
        text = first_recipe(Dataset(boxes, 100, {"a.jpg": 3}, {}), Surroundings(GPU, "cache"))
        return load_config("brs_detr_small", shlex.split(text.splitlines()[-1])[5:])

    assert command(200).train == load_config("brs_detr_small").train
    costly = command(13)
    assert costly.data.test_short_side == 960 and costly.model.backbone.levels[0] == 4
    assert (costly.train.per_device_batch_size, costly.train.total_batch_size) == ("auto", 8)


@pytest.mark.parametrize(
    ("side", "here", "tile", "size"),
    [
        (10, Surroundings(None, None), 140, "4800x3600"),
        (10, Surroundings(GPU, "cache"), 533, "4800x3600"),
        (20, Surroundings(GPU, "cache"), 1600, "2400x1800"),
    ],
)
def test_objects_too_small_to_be_found_are_a_warning_with_what_would_help(side, here, tile, size):
    warning = first_recipe(Dataset(objects(side, short=3000, long=4000), 100, {"a.jpg": 3}, {}), here).splitlines()[0]
    assert warning.startswith("warning: objects: half are under ") and f"on images of {size} pixels" in warning
    assert f"into tiles of at most {tile} pixels and predict with --tiles {tile}, or train" in warning
    tiles = first_recipe(Dataset(objects(side, short=tile, long=tile), 100, {"a.jpg": 3}, {}), here)
    assert "warning" not in tiles  # cut as it says, they are large enough


def test_no_tiles_are_proposed_for_images_that_are_smaller():
    warning = first_recipe(
        Dataset(objects(2, short=120, long=150), 100, {"a.jpg": 3}, {}), Surroundings(None, None)
    ).splitlines()[0]
    assert warning.startswith("warning: ") and "tiles" not in warning and "Train on images of 900x720 pixels" in warning
    for side in (40, 100, 200):
        assert "warning" not in first_recipe(Dataset(objects(side), 100, {"a.jpg": 3}, {}), Surroundings(None, None))


def elongated(width, height):
    sizes = [(width * 0.9, height), (width, height), (width * 1.2, height)]
    return Boxes(*(torch.cat(columns) for columns in zip(*(objects(w, high=h) for w, h in sizes), strict=True)))


def test_elongated_objects_get_anchors_of_their_shape():
    for boxes, wanted in ((elongated(160, 20), (0.1, 0.12, 0.14)), (elongated(20, 200), (8.3, 10.0, 11.0))):
        recipe = load_config("brs_detr_small_cpu")
        config = propose(recipe, boxes)
        assert config.model.rpn.anchor_ratios == wanted
        fitted = fit_heads(config.model, at_training_size(boxes, config.data))["rpn"][1]
        assert (
            fitted.at_50 > 0.8 and fit_heads(recipe.model, at_training_size(boxes, recipe.data))["rpn"][1].at_50 < 0.1
        )
        text = first_recipe(Dataset(boxes, 100, {"a.jpg": 3}, {}), Surroundings(None, None))
        assert load_config("brs_detr_small_cpu", shlex.split(text.splitlines()[-1])[5:]).model == config.model
        assert f"with model.rpn.anchor_ratios={list(wanted)} and model.anchors=auto: " in describe_anchors(
            recipe, boxes
        )
    for side in (3, 60):
        assert "anchor_ratios" not in describe_anchors(load_config("brs_detr_small_cpu"), objects(side))


def test_the_report_of_a_recipe_begins_with_the_warning():
    text = describe_anchors(load_config("brs_detr_small_cpu"), objects(10, short=3000, long=4000), names={})
    assert text.startswith("warning: objects: half are under 1 pixels at the size of training, and 0% have an anchor")


def test_of_a_large_dataset_the_fit_of_the_recipe_is_printed_and_what_would_raise_it():
    here = Surroundings(GPU, "cache")
    text = first_recipe(Dataset(objects(10, short=64, long=64), 12_000, {"a.jpg": 3}, {}), here)
    assert "  model.rpn.anchor_scale=4: 100.0% of the objects have an anchor at IoU >= .5" in text
    assert (
        "model.anchors=auto fits more" in text and "\npython -m brs_detr train brs_detr_r50_12e_coco output_dir" in text
    )
    text = first_recipe(Dataset(objects(10, short=3000, long=4000), 12_000, {"a.jpg": 3}, {}), here)
    assert text.startswith("warning: objects: half are under 3 pixels") and text.count("warning") == 1


def test_values_are_written_as_the_command_line_reads_them():
    for value in ("plain", "/my data", "12", "null", "a: b"):
        assert load_config("demo", [f"data.root={module.as_yaml(value)}"]).data.root == value
    assert json.loads(module.as_yaml((4, 8))) == [4, 8]
