"""Recipes of Co-DINO and BRS-DINO: each has the numbers of the released code, and its detector trains a step."""

import math
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from support import ROOT, SMALL_BACKBONE

from brs_detr.checkpoints.official import expected_shapes
from brs_detr.config import differences, load_config
from brs_detr.engine.optim import build_optimizer
from brs_detr.models.build import build_model

PATHS = [path for path in sorted((ROOT / "configs").glob("*_dino_*.yaml")) if "_vit_" not in path.stem]
RECIPES = {path.stem: path for path in PATHS}
PUBLISHED = {name: path for name, path in RECIPES.items() if not name.endswith("_demo")}
# Published AP, epochs, step of the schedule, drop path, side of the canvas (Co-DETR's model zoo and configs)
FIGURES = {
    "co_dino_r50_12e_coco": ("52.1", 12, 11, 0.0, None),
    "co_dino_r50_lsj_12e_coco": ("52.1", 12, 11, 0.0, 1024),
    "co_dino_r50_lsj_36e_coco": ("54.8", 36, 30, 0.0, 1024),
    "co_dino_r50_9encoder_lsj_12e_coco": ("52.6", 12, 11, 0.0, 1024),
    "co_dino_r50_9encoder_lsj_36e_coco": ("55.4", 36, 30, 0.0, 1024),
    "co_dino_swin_l_12e_coco": ("58.9", 12, 11, 0.3, None),
    "co_dino_swin_l_24e_coco": ("59.8", 24, 20, 0.5, None),
    "co_dino_swin_l_36e_coco": ("60.0", 36, 30, 0.6, None),
    "co_dino_swin_l_lsj_12e_coco": ("59.3", 12, 11, 0.3, 1280),
    "co_dino_swin_l_lsj_24e_coco": ("60.4", 24, 20, 0.5, 1280),
    "co_dino_swin_l_lsj_36e_coco": ("60.7", 36, 30, 0.5, 1280),
    "co_dino_swin_l_o365_16e_coco": ("64.1", 16, 8, 0.3, None),
    "co_dino_r50_lsj_12e_lvis": ("without AP", 12, 11, 0.0, 1024),
    "co_dino_swin_l_lsj_36e_lvis": ("56.9", 36, 30, 0.3, 1280),
    "brs_dino_r50_12e_coco": ("no published AP (Co-DINO: 52.1)", 12, 11, 0.0, None),
    "brs_dino_swin_l_12e_coco": ("no published AP (Co-DINO: 58.9)", 12, 11, 0.3, None),
}


@cache
def recipe(name):
    return load_config(RECIPES[name])


def test_every_published_recipe_is_checked():
    assert set(FIGURES) == set(PUBLISHED)


@pytest.mark.parametrize("name", FIGURES)
def test_lengths_and_sizes_are_the_published_ones(name):
    config, (figure, epochs, step, drop_path, canvas) = recipe(name), FIGURES[name]
    train, optim, data, model = config.train, config.optim, config.data, config.model
    first = RECIPES[name].read_text().splitlines()[0]
    assert figure in first and first.endswith("; not yet run here") and config.output_dir == f"runs/{name}"
    assert (train.epochs, train.lr_steps, train.lr_gamma, train.total_batch_size) == (epochs, (step,), 0.1, 16)
    assert (train.schedule, train.warmup_steps, train.ema_decay, train.precision) == ("step", 0, None, "no")
    assert (optim.lr, optim.weight_decay, optim.clip_norm) == (1e-4 if "o365" in name else 2e-4, 1e-4, 0.1)
    assert (optim.backbone_lr_factor, optim.sampling_offsets_lr_factor) == (0.1, 1)
    assert (model.backbone.drop_path, model.backbone.levels, model.levels) == (drop_path, (4, 8, 16, 32), 5)
    assert model.backbone.frozen_stages == (0 if "swin" in name else 1) and not data.antialias and data.keep_empty
    assert (model.encoder_layers, model.decoder_layers) == (9 if "9encoder" in name else 6, 6)
    assert data.test_canvas == canvas and data.augment.name == ("detr" if canvas is None else "lsj")
    if canvas is not None:
        assert (data.augment.size, data.augment.min_scale, data.augment.max_scale) == (canvas, 0.1, 2)
        assert data.augment.max_pasted == 99


def test_the_fine_tuning_has_images_of_its_own():
    config, base = recipe("co_dino_swin_l_o365_16e_coco"), recipe("co_dino_swin_l_12e_coco")
    assert config.data.augment.short_sides == tuple(range(480, 1537, 32)) and config.data.augment.long_side == 2048
    assert (config.data.test_short_side, config.data.test_long_side) == (1280, 2048)
    assert config.data.augment.crop_policy and config.data.augment.crop_max == base.data.augment.crop_max
    denoising = config.model.denoising
    assert (denoising.queries, denoising.box_noise) == (500, 0.4)
    assert denoising.max_rows >= 2 * denoising.queries  # else groups that fit would be cut
    assert config.train.init_from is not None and config.model.backbone.activation_checkpointing


@pytest.mark.parametrize("name", RECIPES)
def test_what_all_have_in_common(name):
    config = recipe(name)
    model, coco = config.model, not name.endswith("_demo")
    assert model.name == name.split("_dino")[0] + "_dino" and config.eval.nms.kind == "soft"
    assert (config.eval.nms.iou, config.eval.nms.min_score) == (0.8, 0.001 if name.startswith("co_") else 0)
    assert (model.denoising.loss, model.denoising.label_noise) == ("quality_focal", 0.5)
    smaller = not coco or "o365" in name or name.startswith("brs_")
    assert model.denoising.box_noise == (0.4 if smaller else 1.0)
    if coco:
        assert (model.queries, model.detections_per_image, config.eval.max_detections) == (900, 300, 300)
        assert config.eval.predict_with == "decoder"
    else:  # what makes the demo's decoder learn from little
        assert (model.query_boxes, model.proposal_nms_iou) == ("rpn", 0.5)


def test_lvis_is_read_and_repeated_as_lvis():
    for name in ("co_dino_r50_lsj_12e_lvis", "co_dino_swin_l_lsj_36e_lvis"):
        data = recipe(name).data
        assert (data.train_json, data.repeat_threshold) == ("annotations/lvis_v1_train.json", 1e-3)
        assert data.train_images == data.val_images == "."


def test_ranking_and_score_based_recipes_differ_in_losses_samplers_and_noise_alone():
    """And BRS-DINO from BRS-DETR in what makes it a DINO: no head, no weight, no cost."""
    of_losses = ("model.name", "model.objective.", "model.matcher", "model.rpn.", "model.roi.", "model.atss.", "output")
    of_losses = (*of_losses, "model.denoising.box_noise", "eval.nms.min_score")
    of_dino = ("model.name", "model.backbone.levels", "model.levels", "model.queries", "model.detections", "output")
    of_dino = (*of_dino, "model.denoising", "model.encoder_ranking", "optim.", "train.lr_", "eval.")
    for size in ("r50_12e", "swin_l_12e"):
        ranked = recipe(f"brs_dino_{size}_coco")
        for difference in differences(recipe(f"co_dino_{size}_coco"), ranked):
            assert difference.startswith(of_losses), difference
        for difference in differences(load_config(ROOT / "configs" / f"brs_detr_{size}_coco.yaml"), ranked):
            assert difference.startswith(of_dino), difference


def test_dense_heads_of_co_dino_are_those_of_co_detr():
    """But for the queries' quality focal loss: RPN, RoI and ATSS head are unchanged, with focal loss in the last."""
    old = load_config(ROOT / "configs" / "co_detr_r50_12e_coco.yaml").model
    new = recipe("co_dino_r50_12e_coco").model
    assert (new.rpn, new.roi, new.atss, new.matcher) == (old.rpn, old.roi, old.atss, old.matcher)
    weights = new.objective.weights
    assert (new.objective.loss, weights.cls, weights.l1, weights.giou) == ("quality_focal", 1, 5, 2)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("co_dino_r50_12e_coco", 65_204_005),
        ("co_dino_r50_9encoder_lsj_12e_coco", 69_124_549),
        ("co_dino_swin_l_12e_coco", 235_471_769),
    ],
)
def test_the_detectors_have_as_many_parameters_as_the_released_files(name, count):
    """As shapes only, and without buffers."""
    shapes = expected_shapes(recipe(name).model, 80)
    assert sum(math.prod(s) for key, s in shapes.items() if not re.search("balance|num_batches|running_", key)) == count


@pytest.mark.parametrize("name", ["co_dino_r50_12e_coco", "brs_dino_r50_12e_coco", "co_dino_demo", "brs_dino_demo"])
def test_the_detector_of_the_recipe_trains_a_step(name):
    """With its full decoder and encoder in the demo, and narrow ones of all layers else."""
    config = recipe(name)
    model = replace(config.model, backbone=replace(SMALL_BACKBONE, levels=config.model.backbone.levels))
    if not name.endswith("_demo"):
        small = {"dim": 64, "ffn_dim": 32, "queries": 50}
        model = replace(model, roi=replace(model.roi, fc_dim=32), rpn=replace(model.rpn, proposals=100), **small)
    torch.manual_seed(0)
    detector = build_model(model, 3).train()
    optimizer = build_optimizer(config.optim, detector)
    boxes = [torch.tensor([[8.0, 8, 56, 64], [40, 30, 90, 90]]), torch.tensor([[20.0, 10, 84, 74]])]
    labels = [torch.tensor([0, 2]), torch.tensor([1])]
    targets = [{"boxes": b, "labels": l, "image_id": i} for i, (b, l) in enumerate(zip(boxes, labels, strict=True))]
    terms = detector([torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8) for _ in range(2)], targets)
    layers = {term.split(".")[1] for term in terms if term.startswith("denoising.")}
    assert len(layers) == model.decoder_layers and all(term.isfinite() for term in terms.values()), terms
    sum(terms.values()).backward()
    missing = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    optimizer.step()
