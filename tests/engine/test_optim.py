"""Learning rates: which parameter gets which, and when they change."""

import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from brs_detr.engine.config import OptimConfig
from brs_detr.engine.optim import (
    RateError,
    Schedule,
    backbone_depth,
    build_optimizer,
    lr_factor_of,
    parameter_groups,
    require_depths,
    set_learning_rate,
)


class Named(nn.Module):
    """Parameters with the names that the rules look for."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"conv1": nn.Linear(1, 1), "layer1": nn.Linear(1, 1), "layer4": nn.Linear(1, 1)})
        self.encoder = nn.ModuleDict({"sampling_offsets": nn.Linear(1, 1), "value": nn.Linear(1, 1)})
        self.backbone["conv1"].requires_grad_(False)


FACTORS = {"backbone.": 0.1, "sampling_offsets": 0.5}


def test_groups_are_merged_by_rate_and_hold_every_trainable_parameter_once():
    model = Named()
    groups = parameter_groups(model, OptimConfig(lr=2.0, weight_decay=0.25, sampling_offsets_lr_factor=0.5))
    assert {group["lr"]: sorted(group["names"]) for group in groups} == {
        2.0: ["encoder.value.bias", "encoder.value.weight"],
        1.0: ["encoder.sampling_offsets.bias", "encoder.sampling_offsets.weight"],
        0.2: [f"backbone.layer{i}.{kind}" for i in (1, 4) for kind in ("bias", "weight")],
    }
    assert all(group["weight_decay"] == 0.25 for group in groups)  # on biases too, as in the released recipes


def test_the_longest_key_wins():
    assert lr_factor_of("backbone.sampling_offsets.weight", FACTORS) == 0.5
    assert lr_factor_of("neck.weight", FACTORS) == 1


def test_layer_decay_lowers_the_rate_stage_by_stage():
    groups = parameter_groups(Named(), OptimConfig(lr=1.0, backbone_lr_factor=0.5, backbone_layer_decay=0.5))
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["backbone.layer4.weight"] == 0.5
    assert rates["backbone.layer1.weight"] == 0.5 * 0.5**3


class ViT(nn.Module):
    """The names of a ViT-L: 24 blocks, what comes before and behind them, its neck, and a detector around it."""

    def __init__(self):
        super().__init__()
        parts = {"patch_embed": nn.Linear(1, 1), "blocks": nn.ModuleList(nn.Linear(1, 1) for _ in range(24))}
        parts |= {"out_norm": nn.LayerNorm(1), "pyramid": nn.ModuleDict({"p2": nn.Linear(1, 1)})}
        self.backbone, self.encoder = nn.ModuleDict(parts), nn.Linear(1, 1)
        self.backbone.register_parameter("pos_embed", nn.Parameter(torch.zeros(1)))


def test_layer_decay_of_vit_l_is_the_published_one():
    """Block i learns at 0.8^(24 - i), patches and positions at 0.8^25, all behind the blocks at the full rate."""
    groups = parameter_groups(ViT(), OptimConfig(lr=5e-5, backbone_lr_factor=1.0, backbone_layer_decay=0.8))
    rates = {name: group["lr"] / 5e-5 for group in groups for name in group["names"]}
    for index in range(24):
        assert rates[f"backbone.blocks.{index}.weight"] == pytest.approx(0.8 ** (24 - index))
    for name in ("pos_embed", "patch_embed.weight"):
        assert rates[f"backbone.{name}"] == pytest.approx(0.8**25)
    for name in ("backbone.out_norm.bias", "backbone.pyramid.p2.weight", "encoder.bias"):
        assert rates[name] == 1
    assert len(groups) == 26


def test_a_neck_inside_a_backbone_learns_like_the_other_necks():
    groups = parameter_groups(ViT(), OptimConfig(lr=1.0, backbone_lr_factor=0.1))
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["backbone.pyramid.p2.weight"] == 1 and rates["backbone.out_norm.weight"] == 0.1


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("backbone.body.conv1.weight", 0),
        ("backbone.body.layer1.0.conv2.weight", 1),
        ("backbone.layers.0.blocks.1.attn.qkv.weight", 1),
        ("backbone.body.layers_3.blocks.0.norm1.weight", 4),
        ("backbone.patch_embed.proj.weight", 0),
        ("backbone.pos_embed", 0),
        ("backbone.blocks.23.mlp.fc1_g.weight", 24),
        ("backbone.norm3.weight", 0),
        ("backbone.out_norm.weight", None),
        ("backbone.features_denseblock1.denselayer6.conv1.weight", 0),
        ("backbone.base_layer.1.weight", 0),
    ],
)
def test_depth_of_backbone_parameters(name, depth):
    assert backbone_depth(name) == depth


def timm_rates(name):
    """Depths that the rates of a timm network show, by the names of its modules."""
    network = timm.create_model(name, features_only=True, pretrained=False)
    groups = parameter_groups(nn.ModuleDict({"backbone": network}), OptimConfig(lr=1.0, backbone_layer_decay=0.5))
    rates = {key: round(math.log2(0.1 / group["lr"])) for group in groups for key in group["names"]}
    return {key.split(".")[1]: 4 - rate for key, rate in rates.items()}


@pytest.mark.parametrize(
    ("name", "stem", "stages"),
    [("resnet10t", ("conv1", "bn1"), "layer1 layer2 layer3 layer4"), ("convnext_atto", ("stem_0",), "stages_{}")],
)
def test_layer_decay_of_networks_of_timm(name, stem, stages):
    depths = timm_rates(name)
    assert all(depths[part] == 0 for part in stem)
    names = stages.split() if " " in stages else [stages.format(index) for index in range(4)]
    assert [depths[stage] for stage in names] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["regnety_002", "densenet121", "dla34", "mobilevit_xxs"])
def test_layer_decay_is_refused_where_the_stages_are_not_known(name):
    """By other names, within other words, or for some of the stages only."""
    with pytest.raises(RateError, match=r"optim\.backbone_layer_decay=0\.5: the stage of backbone\..* Set it to null"):
        timm_rates(name)


def test_a_norm_behind_a_stage_is_no_stage():
    depths = {"backbone.patch_embed.weight": 0, "backbone.layers.0.weight": 1, "backbone.norm0.weight": 0}
    require_depths(depths, 0.5)
    with pytest.raises(RateError, match=r"backbone\.final_conv\.weight"):
        require_depths({**depths, "backbone.final_conv.weight": 0}, 0.5)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter is trainable"):
        parameter_groups(Named().requires_grad_(False), OptimConfig())


def test_the_paper_schedule_falls_to_a_fifth_after_epochs_10_and_11():
    schedule = Schedule("step", 1200, milestones=(1000, 1100), gamma=0.2)
    factors = [schedule.factor(step) for step in (0, 999, 1000, 1099, 1100, 1199)]
    assert factors == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])


def test_warm_up_rises_linearly_and_reaches_the_full_rate():
    schedule = Schedule("step", 100, warmup_steps=4)
    assert [schedule.factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


@given(total=st.integers(2, 500), warmup=st.integers(0, 20))
def test_a_cosine_falls_from_one_to_zero(total, warmup):
    schedule = Schedule("cosine", total, warmup_steps=warmup)
    factors = [schedule.factor(step) for step in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    after = factors[warmup:]
    assert after == sorted(after, reverse=True)
    assert schedule.factor(total) == pytest.approx(0, abs=1e-12)
    assert schedule.factor(total // 2) <= 0.5 * (1 + math.cos(math.pi * (total // 2) / total)) + 1e-12


def test_the_rate_is_set_from_the_base_rate_every_time():
    optimizer = build_optimizer(OptimConfig(lr=2.0, sampling_offsets_lr_factor=0.5), Named())
    for factor in (0.5, 0.5, 1.0):
        assert set_learning_rate(optimizer, factor) == 2.0 * factor
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2.0, 1.0, 0.2])
    assert isinstance(optimizer, torch.optim.AdamW)


def test_adamw_has_the_betas_and_the_decay_of_the_settings():
    optimizer = build_optimizer(OptimConfig(betas=(0.5, 0.75), weight_decay=0.25), Named())
    assert all(group["betas"] == (0.5, 0.75) and group["weight_decay"] == 0.25 for group in optimizer.param_groups)


def test_sgd_takes_the_steps_of_its_definition():
    """Sutskever et al., 2013, as torch writes it: v <- m v + g + wd w; w <- w - lr v."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.25), model)
    weight, velocity = 2.0, 0.0
    for gradient in (1.0, -3.0, 2.0):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        velocity = 0.5 * velocity + gradient + 0.25 * weight
        weight -= 0.1 * velocity
        assert model.weight.item() == pytest.approx(weight, rel=1e-6)


def test_warm_up_can_begin_above_zero():
    """The CNN recipes rise linearly from a thousandth."""
    schedule = Schedule("step", 1000, warmup_steps=500, warmup_start=0.001)
    assert schedule.factor(0) == pytest.approx(0.001 + 0.999 / 500)
    assert schedule.factor(499) == 1
