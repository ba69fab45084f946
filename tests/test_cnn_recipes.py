"""Recipes of the CNN detectors: each builds and trains a step, and has the numbers of its paper or log."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from support import ROOT, SMALL_BACKBONE

from brs_detr.checkpoints.official import expected_shapes
from brs_detr.cli import main
from brs_detr.config import Config, ConfigError, apply_overrides, load_config
from brs_detr.engine.optim import Schedule, build_optimizer, set_learning_rate
from brs_detr.models.build import build_model
from brs_detr.models.objective_config import RankingConfig

DETECTORS = ("retinanet", "foveabox", "atss", "paa", "faster_rcnn", "cascade_rcnn", "mask_rcnn")
DATASETS = ("coco", "coco_ablation", "lvis", "cityscapes")
CNN = {  # the recipes with a published figure, and not the small ones beside them
    path.stem: path
    for path in sorted((ROOT / "configs" / "cnn").glob("*.yaml"))
    if path.stem.startswith(DETECTORS) and path.stem.endswith(DATASETS)
}
SIDE = 96


@cache
def recipe(name):
    return load_config(CNN[name])


def different_models():
    """One recipe of each section `model`; the others differ in data and schedule only."""
    chosen = {}
    for name in CNN:
        chosen.setdefault(str(recipe(name).model), name)
    return list(chosen.values())


# one recipe of each detector, and one with deformable convolutions, at their full size; about a second each, or more
FULL_SIZE = [
    "retinanet_r50_brs_12e_coco",
    "foveabox_r50_alrp_100e_512_coco",
    "atss_r50_brs_12e_coco",
    "paa_r50_brs_12e_coco",
    "faster_rcnn_r50_brs_12e_coco",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "cascade_rcnn_r50_brs_12e_coco",
            "mask_rcnn_r50_brs_12e_coco",
            "faster_rcnn_r101_dcn_brs_36e_coco",
            "retinanet_x101_dcn_alrp_atss_100e_800_coco",
        )
    ),
]


def narrow(model):
    """The same settings with a small backbone, few channels and few regions."""
    backbone = replace(model.backbone, **vars(SMALL_BACKBONE) | {"levels": model.backbone.levels})
    backbone = replace(backbone, deformable_stages=model.backbone.deformable_stages)
    small = replace(model, backbone=replace(backbone, deformable_groups=model.backbone.deformable_groups), dim=64)
    if hasattr(small, "head"):
        return replace(small, head=replace(small.head, stacked_convs=1))
    return replace(small, roi=replace(small.roi, fc_dim=32))


def targets(masks):
    """Of two images; the first has two objects, the second one."""
    boxes = [torch.tensor([[8.0, 8, 56, 64], [40, 30, 90, 90]]), torch.tensor([[20.0, 10, 84, 74]])]
    labels = [torch.tensor([0, 2]), torch.tensor([1])]
    found = [{"boxes": b, "labels": l, "image_id": i} for i, (b, l) in enumerate(zip(boxes, labels, strict=True))]
    for target in found if masks else []:
        target["masks"] = torch.zeros(len(target["boxes"]), SIDE, SIDE, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
    return found


def train_step(config, model_settings, masks):
    """One step of the recipe's optimizer on two images of 96 pixels."""
    torch.manual_seed(0)
    if hasattr(model_settings, "rpn"):  # all that fit into such images
        model_settings = replace(model_settings, rpn=replace(model_settings.rpn, proposals=100))
    backbone = replace(model_settings.backbone, pretrained=False)
    model = build_model(replace(model_settings, backbone=backbone), 3).train()
    optimizer = build_optimizer(config.optim, model)
    set_learning_rate(optimizer, config.train.warmup_start)
    terms = model([torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8) for _ in range(2)], targets(masks))
    assert all(term.isfinite() for term in terms.values()), terms
    assert all(value > 0 for term, value in terms.items() if term.endswith((".rank", ".cls"))), terms
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert len(optimizer.param_groups) == 1  # one learning rate, backbone included
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.step()
    assert any((p != old).any() for p, old in zip(optimizer.param_groups[0]["params"], before, strict=True))


@pytest.mark.parametrize("name", different_models())
def test_the_settings_of_the_recipe_train_a_step_of_a_narrow_detector(name):
    train_step(recipe(name), narrow(recipe(name).model), "mask" in name)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_detector_of_the_recipe_trains_a_step(name):
    train_step(recipe(name), recipe(name).model, "mask" in name)


def test_every_detector_builds_at_its_full_size():
    """As shapes only: their number in Faster R-CNN is that of its parts counted by hand."""
    counts = {}
    for name in {*different_models(), "faster_rcnn_r50_ce_12e_coco"}:
        shapes = expected_shapes(recipe(name).model, 80)
        counts[name] = sum(math.prod(s) for n, s in shapes.items() if "running_" not in n and "balance" not in n)
    backbone, pyramid = 23_508_032, (256 + 512 + 1024 + 2048 + 4) * 256 + 4 * (9 * 256 + 1) * 256
    rpn, boxes = (9 * 256 + 1) * 256 + 257 * 15, (49 * 256 + 1) * 1024 + 1025 * 1024 + 1025 * (81 + 320)
    assert counts["faster_rcnn_r50_ce_12e_coco"] == backbone + pyramid + rpn + boxes


def test_info_describes_a_recipe_by_its_name(capsys):
    assert main(["info", "mask_rcnn_r50_rs_12e_lvis", "--classes", "1203"]) == 0
    out = capsys.readouterr().out
    assert "1203 classes" in out and "masks by dice" in out
    assert main(["info", "mask_rcnn_small", "model.loss=focal", "--classes", "2"]) == 0
    assert "masks by binary_cross_entropy" in capsys.readouterr().out


def test_every_recipe_has_the_optimizer_and_the_warm_up_of_all():
    for name in CNN:
        config = recipe(name)
        optim, train = config.optim, config.train
        assert (optim.name, optim.momentum, optim.weight_decay, optim.clip_norm) == ("sgd", 0.9, 1e-4, None), name
        assert optim.backbone_lr_factor == 1, name
        assert (train.warmup_steps, train.warmup_start, train.lr_gamma, train.schedule) == (500, 0.001, 0.1, "step"), (
            name
        )
        backbone = config.model.backbone
        assert (backbone.frozen_stages, backbone.norm, backbone.pretrained) == (1, "frozen", True), name
        assert config.output_dir == f"runs/{name}"


def test_the_warm_up_begins_near_a_thousandth_of_the_rate():
    schedule = Schedule("step", 1000, warmup_steps=500, warmup_start=0.001)
    assert schedule.factor(0) == pytest.approx(0.001 + 0.999 / 500)
    assert schedule.factor(499) == 1


def test_an_epoch_of_coco_has_the_published_number_of_steps():
    """Of the images with an annotation: 7,330 at batch 16, and 3,665 at batch 32, aLRP's period."""
    for name in CNN:
        config = recipe(name)
        if "_coco" in name:
            assert not config.data.keep_empty
            steps = math.ceil(117266 / config.train.total_batch_size)
            assert steps == (3665 if "_100e_512_" in name else 7330), name


# Learning rate, epochs, steps of the schedule, batch: BRS S.3.1 and the released recipes (12 and 36 epochs), aLRP
# section 5 and S7.4 (100 epochs), RS S2.2. Decreasing generality: the first name that a recipe begins with counts.
SCHEDULES = {
    "atss_r50_focal": (0.01, 12, (8, 11), 16),
    "atss": (0.008, 12, (8, 11), 16),
    "paa": (0.008, 12, (8, 11), 16),
    "retinanet_r50_brs": (0.008, 12, (8, 11), 16),
    "faster_rcnn_r50_ce_12e": (0.02, 12, (8, 11), 16),
    "faster_rcnn_r50_alrp_12e": (0.009, 12, (8, 11), 16),
    "faster_rcnn_r50_alrp_100e": (0.012, 100, (75, 95), 32),
    "faster_rcnn_r50_rs_100e": (0.024, 100, (75, 95), 32),
    "faster_rcnn_r50_ce": (0.04, 100, (75, 95), 32),
    "faster_rcnn_r50": (0.012, 12, (8, 11), 16),
    "faster_rcnn_r101_dcn": (0.012, 36, (27, 33), 16),
    "cascade_rcnn_r50_ce": (0.02, 12, (8, 11), 16),
    "cascade_rcnn_r50_brs_36e": (0.012, 36, (27, 33), 16),
    "cascade_rcnn_r50": (0.012, 12, (8, 11), 16),
    "mask_rcnn_r50_brs_27e": (0.012, 27, (20, 25), 16),
    "mask_rcnn_r50_brs_12e_cityscapes": (0.012, 96, (64,), 16),
    "mask_rcnn_r50_rs_12e_cityscapes": (0.012, 96, (64,), 16),
    "mask_rcnn_r50": (0.012, 12, (8, 11), 16),
    "mask_rcnn_r101": (0.012, 36, (27, 33), 16),
    "retinanet_r50_ap": (0.002, 100, (60, 80), 32),
    "retinanet_r50_alrp_atss_100e_512_coco_ablation": (0.008, 100, (60, 80), 32),
    "retinanet_r50_alrp_atss": (0.008, 100, (75, 95), 32),
    "retinanet_r50_alrp": (0.008, 100, (60, 80), 32),
    "retinanet_r101_alrp_atss_100e_512": (0.008, 100, (75, 95), 32),
    "retinanet_x101_alrp_atss_100e_512": (0.008, 100, (75, 95), 32),
    "retinanet": (0.004, 100, (60, 80), 16),  # 800 pixels
    "foveabox_r50_ap": (0.002, 100, (75, 95), 32),
    "foveabox_r50_focal": (0.02, 100, (75, 95), 32),
    "foveabox": (0.008, 100, (75, 95), 32),
}


@pytest.mark.parametrize("name", CNN)
def test_the_schedule_is_the_published_one(name):
    config = recipe(name)
    wanted = next(values for prefix, values in SCHEDULES.items() if name.startswith(prefix))
    assert (config.optim.lr, config.train.epochs, config.train.lr_steps, config.train.total_batch_size) == wanted


def test_thresholds_are_the_published_ones():
    """0.40 with RS and BRS after a second stage, on LVIS 0.60 (RS Tables S10 and S11), else 0.05."""
    for name in CNN:
        model = recipe(name).model
        head = model.roi if hasattr(model, "roi") else model.head
        high = hasattr(model, "roi") and head.objective.loss in ("rs", "brs")
        assert head.score_threshold == (0.6 if "_lvis" in name else 0.4 if high else 0.05), name
        assert head.nms_iou == (0.6 if model.name in ("atss", "paa") else 0.5), name
        assert head.max_detections == recipe(name).eval.max_detections == (300 if "_lvis" in name else 100), name
        assert recipe(name).eval.score_threshold == 0  # else a centerness would be compared with it


def test_losses_are_those_of_the_names():
    for name in CNN:
        model = recipe(name).model
        loss = name.split("_")[3 if "dcn" in name else 2]
        if "rcnn" in name:
            loss = name.split("_")[4 if "dcn" in name else 3]
        objectives = [model.head.objective] if hasattr(model, "head") else [model.rpn.objective, model.roi.objective]
        names = {"ce": ["binary_cross_entropy", "cross_entropy"]}.get(loss, [loss] * len(objectives))
        assert [objective.loss for objective in objectives] == names, name


def test_the_rpn_weighs_a_fifth_wherever_it_ranks():
    for name in CNN:
        model = recipe(name).model
        if not hasattr(model, "rpn"):
            continue
        rpn, roi = model.rpn, model.roi
        assert (rpn.anchor_scale, rpn.scales_per_octave, rpn.nms_iou) == (8, 1, 0.7), name
        if isinstance(rpn.objective, RankingConfig):
            assert (rpn.objective.weight, roi.objective.weight) == (0.2, 1), name
            assert rpn.coder_stds == roi.coder_stds == (0.1, 0.1, 0.2, 0.2), name
            assert rpn.sample is None and roi.sample is None and rpn.proposals == 1000, name
            assert rpn.objective.score_weighted or rpn.objective.loss == "alrp", name
        else:
            assert (rpn.sample, roi.sample, rpn.coder_stds) == (256, 512, (1, 1, 1, 1)), name
            assert roi.add_ground_truth and rpn.prior == 0.5, name


def test_alrp_balances_by_epochs_with_the_published_thresholds():
    for name in CNN:
        if "_alrp_" not in name:
            continue
        model = recipe(name).model
        head = model.roi if hasattr(model, "roi") else model.head
        assert head.objective.tau == 0.5
        assert head.objective.balance == ("none" if "unbalanced" in name else "epoch"), name
        if hasattr(model, "rpn"):
            assert (model.rpn.objective.tau, model.rpn.objective.balance, model.rpn.prior) == (0.7, "epoch", 0.01)
            assert not model.roi.add_ground_truth


def test_fixed_box_weights_of_ap_are_those_of_each_released_head():
    weights = {"atss": (2.0, None), "paa": (1.0, 0.5), "retinanet": (1.0, None), "foveabox": (1.0, None)}
    for name in CNN:
        if "_ap_" in name or "_bap_" in name:
            objective = recipe(name).model.head.objective
            assert (objective.box_weight, objective.delta) == weights[recipe(name).model.name], name


def test_anchors_of_one_stage_detectors():
    for name in CNN:
        model = recipe(name).model
        if model.name not in ("atss", "paa", "retinanet"):
            continue
        head = model.head
        scales = {"atss": 3, "paa": 3, "retinanet": 2}[model.name]
        if name == "atss_r50_focal_12e_coco":
            scales = 1
        if "_100e_800_" in name:
            scales = 3
        assert head.scales_per_octave == scales, name
        assert head.anchor_scale == (8 if scales == 1 else 4), name
        three = model.name == "retinanet" and head.assigner == "max_iou"
        assert head.anchor_ratios == ((0.5, 1, 2) if three else (1,)), name
        assert ("_alrp_atss_" in name) == (model.name == "retinanet" and head.assigner == "atss")


def test_deformable_convolutions_have_the_published_groups():
    for name in CNN:
        backbone = recipe(name).model.backbone
        stages = (2, 3, 4) if "_dcn_" in name else ()
        assert backbone.deformable_stages == stages, name
        assert backbone.deformable_groups == (4 if stages and "faster" in name else 1), name
        assert backbone.name.startswith(
            "resnext101_64x4d" if "_x101_" in name else "resnet101" if "_r101_" in name else "resnet50"
        )


def test_image_sizes_are_the_published_ones():
    for name in CNN:
        data = recipe(name).data
        assert not data.antialias and data.test_square is None, name
        if "_100e_" in name:
            size = 800 if "_800_" in name else 512
            assert (data.augment.name, data.augment.size) == ("ssd", size), name
            assert (data.test_short_side, data.test_long_side) == ((800, 1333) if size == 800 else (500, 833)), name
            continue
        sides = (800,)
        if "_lvis" in name or "mask_rcnn_r101" in name:
            sides = tuple(range(640, 801, 32))
        elif "_dcn_" in name:
            sides = tuple(range(480, 961, 80))
        elif "cityscapes" in name:
            sides = tuple(range(800, 1025, 32))
        assert data.augment.short_sides == sides and not data.augment.crop_policy, name
        assert (data.repeat_threshold == 1e-3) == ("_lvis" in name), name


def test_the_first_line_says_where_the_figure_comes_from():
    for name, path in CNN.items():
        first = path.read_text().splitlines()[0]
        assert first.endswith("; not run here"), name
        assert any(source in first for source in ("BRS Table", "RS Table", "aLRP Table")), name


# Learning rate, weight decay, epochs, batch and where the warm-up begins (RS Tables S6 and main text, released recipes)
MASKS = {
    "yolact": (0.006, 5e-4, 55, 32, 0.1),
    "solov2_light_r34": (0.012, 1e-4, 36, 32, 0.01),
    "solov2_r101": (0.006, 1e-4, 36, 16, 0.01),
}
MASK_RECIPES = sorted(
    path.stem for path in (ROOT / "configs" / "cnn").glob("*_coco.yaml") if path.stem.startswith(tuple(MASKS))
)


@pytest.mark.parametrize("name", MASK_RECIPES)
def test_recipes_of_masks_without_regions_have_the_published_numbers(name):
    path = ROOT / "configs" / "cnn" / f"{name}.yaml"
    config = load_config(path)
    optim, train, head, data = config.optim, config.train, config.model.head, config.data
    wanted = next(values for prefix, values in MASKS.items() if name.startswith(prefix))
    assert (optim.lr, optim.weight_decay, train.epochs, train.total_batch_size, train.warmup_start) == wanted
    assert (optim.name, optim.momentum, optim.backbone_lr_factor, train.warmup_steps) == ("sgd", 0.9, 1, 500)
    assert (head.objective.loss, head.objective.score_weighted, data.keep_empty) == ("rs", True, False)
    assert (config.eval.score_threshold, head.max_detections, config.eval.max_detections) == (0, 100, 100)
    assert path.read_text().splitlines()[0].endswith("; not run here") and config.output_dir == f"runs/{name}"
    if config.model.name == "yolact":
        assert (data.augment.name, data.augment.size, data.test_square) == ("ssd", 550, 550)
        assert (train.schedule, optim.clip_norm, head.score_threshold, head.nms_iou) == ("cosine", None, 0.05, 0.5)
        assert (config.model.backbone.norm, config.model.backbone.frozen_stages) == ("batch", 0)
        assert head.label in name or head.label == "iou"
    else:
        light = "light" in name
        assert data.augment.short_sides == (tuple(range(352, 513, 32)) if light else tuple(range(640, 801, 32)))
        assert (data.test_short_side, data.test_long_side) == ((448, 768) if light else (800, 1333))
        assert (train.lr_steps, optim.clip_norm, head.score_threshold, head.final_threshold) == (
            (27, 33),
            35,
            0.2,
            0.05,
        )


@pytest.mark.parametrize("name", ["yolact_r50_rs_55e_coco", "solov2_light_r34_rs_36e_coco", "solov2_r101_rs_36e_coco"])
def test_the_settings_of_masks_without_regions_train_a_step(name):
    """With a small backbone; heads and pyramids are the published ones."""
    config = load_config(ROOT / "configs" / "cnn" / f"{name}.yaml")
    backbone = replace(SMALL_BACKBONE, levels=config.model.backbone.levels)
    train_step(config, replace(config.model, backbone=backbone), masks=True)


def test_boxes_of_alrp_need_an_overlap():
    """aLRP ranks by GIoU or IoU losses; errors of offsets have no range."""
    for model, setting in (("retinanet", "head"), ("foveabox", "head"), ("faster_rcnn", "roi")):
        with pytest.raises(ConfigError, match=f"model.{setting}.objective.loss=alrp ranks boxes by their GIoU"):
            apply_overrides(Config(), [f"model.name={model}", "model.loss=alrp", f"model.{setting}.box_loss=smooth_l1"])
