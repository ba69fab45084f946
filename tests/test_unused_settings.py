"""A setting of the command line that would have no effect is refused; a recipe or a weights file may hold it."""

import json
from dataclasses import replace

import pytest
import torch
from support import ROOT

from brs_detr import cli
from brs_detr.config import Config, ConfigError, apply_overrides, dump, from_dict, load_config, to_dict
from brs_detr.config_fields import OnlyWith, as_word, unused_settings
from brs_detr.config_io import leaves
from brs_detr.losses import PredictionSet
from brs_detr.models.heads.dense import build_objective
from brs_detr.models.model_config import MODELS
from brs_detr.models.objective_config import RankingConfig, ScoreConfig, TermWeights

CONFIGS = ROOT / "configs"
RECIPES = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("cnn/*.yaml")])


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "demo",
            "model.rpn.objective.tau=0.6",
            "model.rpn.objective.tau=0.6: has no effect with model.rpn.objective.loss=brs. Leave it out, or set "
            "model.rpn.objective.loss to alrp or balrp.",
        ),
        ("demo", "model.rpn.objective.box_weight=3 model.rpn.objective.loss=rs", "set model.rpn.objective.loss to ap"),
        ("demo", "model.loss=alrp model.objective.box_weight=3", "set model.objective.balance=none"),
        ("demo", "model.balance=none", "model.balance=none: has no effect with model.objective.loss=brs"),
        (
            "demo",
            "model.rpn.beta=0.1",
            "has no effect with model.rpn.box_loss=giou. Leave it out, or set model.rpn.box_loss=smooth_l1.",
        ),
        ("demo", "model.backbone.window_size=16", "choose an EVA-02"),
        ("demo", "model.backbone.global_every=3", "has no effect with model.backbone.name=resnet10t"),
        ("demo", "optim.momentum=0.8", "has no effect with optim.name=adamw. Leave it out, or set optim.name=sgd."),
        ("demo", "optim.name=sgd optim.betas=[0.8,0.9]", "optim.betas=[0.8, 0.9]: has no effect"),
        ("cnn/atss_demo", "optim.sampling_offsets_lr_factor=1", "has no effect with model.name=atss"),
        ("cnn/retinanet_demo", "model.head.assigner=atss model.head.positive_iou=0.6", "set model.head.assigner=max"),
        ("cnn/retinanet_demo", "model.head.topk=5", "set model.head.assigner=atss"),
        ("cnn/paa_demo", "model.head.iou_weight=1", "set model.head.iou_branch=true"),
        ("cnn/yolact_small", "model.loss=ap model.head.label=dice", "has no effect with model.head.objective.loss=ap"),
        ("demo", "train.lr_gamma=0.1", "has no effect with train.schedule=cosine"),
        ("demo", "train.lr_steps=[3]", "set train.schedule=step"),
        ("cnn/atss_r50_brs_12e_coco", "train.lr_steps=[] train.lr_gamma=0.5", "with train.lr_steps=[]. Leave it out"),
        ("brs_detr_small_cpu", "model.atss.anchor_scale=4", "set model.anchors=fixed"),
        ("cnn/atss_demo", "model.anchors=auto model.head.anchor_scale=4", "set model.anchors=fixed"),
        ("cnn/faster_rcnn_demo", "model.anchors=auto model.rpn.anchor_scale=4", "set model.anchors=fixed"),
        ("cnn/yolact_r50_rs_55e_coco", "data.test_short_side=400", "set data.test_square=null"),
        ("brs_detr_small", "train.epochs=3", "set train.steps=null"),
        ("demo", "train.warmup_steps=0 train.warmup_start=0.1", "set train.warmup_steps above 0"),
        ("demo", "train.max_skipped=3", "set train.on_nonfinite=skip"),
        ("demo", "data.augment.crop_min=50", "set data.augment.crop_policy=true"),
        ("demo", "data.test_canvas=96 data.test_short_side=64", "set data.test_canvas=null"),
        ("demo", "model.aux_heads=[atss] model.roi.fc_dim=64", "add roi to model.aux_heads"),
        ("demo", "model.aux_heads=[] model.query_boxes=encoder model.rpn.proposals=9", "add roi to model.aux_heads"),
        ("demo", "model.aux_heads=[] model.max_aux_queries=9", "has no effect with model.aux_heads=[]"),
        ("demo", "model.name=brs_dino model.denoising.loss=none model.denoising.queries=9", "to quality_focal or rank"),
        ("demo", "eval.predict_with=roi eval.nms.kind=soft", "set eval.predict_with to decoder, auto or ensemble"),
        ("demo", "eval.predict_with=atss eval.nms.kind=hard eval.nms.iou=0.4", "has no effect with eval.predict_with"),
        ("demo", "model.loss=quality_focal model.rpn.objective.alpha=0.5", "set model.rpn.objective.loss=focal"),
        (
            "co_detr_r50_12e_coco",
            "model.rpn.objective.weights.giou=2",
            "has no effect with model.rpn, whose terms are cls and l1. Leave it out, or give the weight of one of them",
        ),
        ("co_detr_r50_12e_coco", "model.objective.weights.mask=2", "model, whose terms are cls, l1 and giou"),
    ],
)
def test_a_setting_without_effect_is_refused_with_the_cause(recipe, overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(CONFIGS / f"{recipe}.yaml", overrides.split())
    assert message in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("demo", "model.rpn.objective.loss=alrp model.rpn.box_loss=giou model.rpn.objective.tau=0.6"),
        ("demo", "model.rpn.objective.loss=balrp model.tau=0.6"),  # of the one head that has it
        ("demo", "model.loss=alrp model.balance=none model.box_weight=3"),
        ("demo", "model.loss=bap model.box_weight=3"),
        ("demo", "model.loss=focal model.rpn.box_loss=smooth_l1 model.weights.smooth_l1=1 model.rpn.beta=2"),
        ("co_dino_vit_l_12e_coco", "model.backbone.window_size=16 model.backbone.global_every=3"),
        ("demo", "model.backbone.name=hf-hub:someone/anything model.backbone.window_size=16"),
        ("demo", "optim.name=sgd optim.momentum=0.8"),
        ("cnn/retinanet_demo", "model.head.assigner=atss model.head.topk=5"),
        ("demo", "train.schedule=step train.lr_steps=[3] train.lr_gamma=0.1"),
        ("brs_detr_small", "train.steps=null train.epochs=3"),
        ("demo", "model.aux_heads=[] model.rpn.proposals=9"),  # whose boxes the queries begin with
        ("demo", "eval.nms.kind=soft"),  # auto, which may choose the decoder
        ("demo", "eval.predict_with=ensemble eval.nms.kind=hard"),
        ("demo", "eval.predict_with=roi eval.nms.kind=hard eval.test_flip=true"),  # joins the boxes of both views
        ("cnn/mask_rcnn_small", "model.loss=cross_entropy model.rpn.objective.loss=focal model.roi.box_loss=giou "
         "model.roi.objective.weights.mask=2"),
        ("co_detr_r50_12e_coco", "model.weights.centerness=2"),  # of the ATSS head alone
        # what is off where there is nothing to be on
        ("demo", "train.lr_steps=[]"),
        ("demo", "eval.predict_with=roi eval.nms.kind=none"),
        ("demo", "model.aux_heads=[atss] model.roi.low_quality=false"),
        ("co_detr_r50_12e_coco", "model.rpn.objective.weights.giou=0"),
    ],
)  # fmt: skip
def test_a_setting_with_an_effect_is_accepted(recipe, overrides):
    load_config(CONFIGS / f"{recipe}.yaml", overrides.split())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_command_line_takes_what_is_read_and_nothing_else(model):
    """Every setting of every detector, given the value that it has."""
    config = Config(model=model)
    unused = [one.name for one in unused_settings(config)]
    accepted = []
    for name, value in leaves(config):
        word = f"{name}={json.dumps(value)}"
        refused = any(name == one or name.startswith(f"{one}.") for one in unused)
        if refused and value is not None and value is not False and value != ():
            with pytest.raises(ConfigError, match=r"has no effect with .*\. Leave it out, or"):
                apply_overrides(config, [word])
        elif name != "data.source":  # which replaces the paths
            accepted.append(word)
    assert apply_overrides(config, accepted) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_and_stored_settings_may_hold_what_has_no_effect(path, tmp_path):
    config = load_config(path)
    assert list(unused_settings(config))  # betas or momentum, for one
    (tmp_path / "all.yaml").write_text(dump(config))
    changed = load_config(tmp_path / "all.yaml", ["seed=5"])
    assert changed == replace(config, seed=5) == apply_overrides(from_dict(to_dict(config), "weights"), ["seed=5"])


def test_a_choice_of_the_command_line_may_end_the_effect_of_a_setting_in_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {loss: alrp, rpn: {objective: {tau: 0.6}}}\neval: {nms: {kind: soft}}\n")
    config = load_config(recipe, ["model.loss=rs", "eval.predict_with=roi"])
    assert config.model.rpn.objective.tau == 0.6 and config.eval.nms.kind == "soft"


def test_info_prints_settings_without_effect_but_takes_none(capsys):
    assert cli.main(["info", "demo", "--settings"]) == 0
    assert "momentum: 0.9" in capsys.readouterr().out
    assert cli.main(["info", "demo", "--settings", "optim.momentum=0.8"]) == 2
    assert "optim.momentum=0.8: has no effect with optim.name=adamw." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "word"),
    [(None, "null"), (True, "true"), (False, "false"), (("a", 1), "[a, 1]"), ([], "[]"), (0.5, "0.5")],
)
def test_values_are_shown_as_they_are_written(value, word):
    assert as_word(value) == word


def test_other_settings_are_named_below_the_section_of_the_marked_one():
    complaint = OnlyWith("roi.sample", None).complaint(load_config("co_detr_r50_12e_coco").model, "model.", "x")
    assert complaint == ("model.x", "model.roi.sample=512", "set model.roi.sample=null")
    assert OnlyWith("roi.sample", 256, 512).complaint(load_config("co_detr_r50_12e_coco").model, "model.", "x") is None


RANKING = ("brs", "rs", "bap", "ap", "balrp", "alrp", "bndcg", "ndcg")
CHANGES = {"weight": 3.0, "delta": 0.1, "score_weighted": True, "box_weight": 7.0, "tau": 0.2, "balance": "none"}
LABELS = torch.tensor([3, 2, 3, 0, 3, 1, 3, 3])


def terms_and_gradient(config, columns):
    """Of an objective with these settings, on eight predictions of which three are positive."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, columns, generator=generator, requires_grad=True)
    boxes = {name: torch.rand(3, generator=generator, requires_grad=True) for name in ("giou", "l1")}
    found = build_objective(config)(PredictionSet(logits, LABELS, torch.tensor([0.9, 0.3, 0.6]), boxes))
    sum(found.values()).backward()
    return [*found.values(), logits.grad, *(box.grad for box in boxes.values())]


def has_effect(config, changed, columns=3):
    pairs = zip(terms_and_gradient(config, columns), terms_and_gradient(changed, columns), strict=True)
    return not all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("balance", ["value", "epoch", "none"])
@pytest.mark.parametrize("loss", RANKING)
def test_settings_of_a_ranking_loss_have_an_effect_where_they_are_accepted(loss, balance):
    config = RankingConfig(loss, balance=balance)
    unused = {one.name for one in unused_settings(config, "x.")}
    for name, value in CHANGES.items():
        value = "value" if name == "balance" and balance == "none" else value
        assert has_effect(config, replace(config, **{name: value})) == (f"x.{name}" not in unused), name


@pytest.mark.parametrize("loss", ["focal", "quality_focal", "binary_cross_entropy", "cross_entropy"])
def test_settings_of_a_score_based_loss_have_an_effect_where_they_are_accepted(loss):
    config = ScoreConfig(loss, TermWeights(l1=1.0, giou=1.0))
    unused = {one.name for one in unused_settings(config, "x.")}
    for name, value in {"alpha": 0.6, "gamma": 1.0, "normalizer": "rows"}.items():
        changed = replace(config, **{name: value})
        assert has_effect(config, changed, 3 + (loss == "cross_entropy")) == (f"x.{name}" not in unused), name
