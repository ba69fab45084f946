"""Modulated deformable convolutions against the paper's sum, tap by tap, and inside ResNets and ResNeXts."""

import math

import pytest
import timm
import torch
from support import DEMO
from torch import nn
from torchvision.models import ResNet50_Weights, ResNet101_Weights, ResNeXt101_64X4D_Weights

from brs_detr.config import ConfigError, load_config
from brs_detr.models.backbones.deformable import DeformableConv
from brs_detr.models.backbones.norms import FrozenBatchNorm
from brs_detr.models.backbones.timm_backbone import build_backbone
from brs_detr.models.config import BackboneConfig
from brs_detr.run.setup import describe_model


def learned(layer, std=0.5):
    """Give a layer offsets and masks that differ from cell to cell."""
    nn.init.normal_(layer.conv_offset.weight, std=std)
    nn.init.normal_(layer.conv_offset.bias, std=std)
    return layer


def bilinear(x, y, z):
    """(c,) value of a (c, h, w) map at a fractional row and column, 0 outside."""
    value = x.new_zeros(x.shape[0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(z), math.floor(z) + 1):
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                value += (1 - abs(y - row)) * (1 - abs(z - column)) * x[:, row, column]
    return value


def slow_deformable(x, learned, weight, bias, stride, padding, dilation, offset_groups):
    """The paper's equation for one image (c, h, w), cell by cell and tap by tap; any groups of the weights."""
    per_offset, per_weight = x.shape[0] // offset_groups, weight.shape[1]
    outputs = weight.shape[0] // (x.shape[0] // per_weight)  # of one group of the weights
    y = bias[:, None, None].expand(-1, *learned.shape[1:]).clone()
    for i in range(learned.shape[1]):
        for j in range(learned.shape[2]):
            for tap in range(9):
                read = []
                for group in range(offset_groups):
                    dy, dx = learned[(group * 9 + tap) * 2 : (group * 9 + tap) * 2 + 2, i, j].tolist()
                    row = i * stride - padding + tap // 3 * dilation + dy
                    column = j * stride - padding + tap % 3 * dilation + dx
                    mask = learned[18 * offset_groups + group * 9 + tap, i, j].sigmoid()
                    own = x[group * per_offset : (group + 1) * per_offset]
                    read.append(mask * bilinear(own, row, column))
                read = torch.cat(read)
                for out in range(weight.shape[0]):
                    first = out // outputs * per_weight
                    y[out, i, j] += weight[out, :, tap // 3, tap % 3] @ read[first : first + per_weight]
    return y


@pytest.mark.parametrize(
    ("groups", "offset_groups", "stride", "dilation"), [(1, 1, 1, 1), (1, 4, 2, 1), (2, 1, 2, 1), (4, 2, 1, 2)]
)
def test_equals_the_sum_of_the_paper(groups, offset_groups, stride, dilation):
    torch.manual_seed(groups)
    conv = nn.Conv2d(8, 4, 3, stride, padding=dilation, dilation=dilation, groups=groups).double()
    layer = learned(DeformableConv(conv, offset_groups).double())
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        fields = layer.conv_offset(x)[0]
        slow = slow_deformable(x[0], fields, conv.weight, conv.bias, stride, dilation, dilation, offset_groups)
        assert fields[: 18 * offset_groups].abs().max() > 1.5  # taps beyond their neighbors and the border
        torch.testing.assert_close(layer(x)[0], slow)


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 4)])
def test_starts_as_half_of_the_convolution_that_it_replaces(stride, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, stride, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 8, 9, 7)
    torch.testing.assert_close(DeformableConv(conv, 4)(x), 0.5 * conv(x), rtol=1e-5, atol=1e-6)


def test_a_mask_of_one_and_integer_offsets_shift_the_map():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    layer = DeformableConv(conv)
    with torch.no_grad():
        layer.conv_offset.bias[1:18:2] = 2.0  # every tap reads two columns further right
        layer.conv_offset.bias[18:] = 100.0
    x = torch.randn(1, 3, 6, 8)
    torch.testing.assert_close(layer(x)[..., :-3], conv(x)[..., 2:-1], rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_map_the_weights_the_offsets_and_the_masks():
    torch.manual_seed(0)
    layer = learned(DeformableConv(nn.Conv2d(4, 4, 3, padding=1), 2), std=0.1).double()
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    grads = layer.conv_offset.weight.grad.split([36, 18])
    assert all(g.flatten(1).abs().sum(1).min() > 0 for g in (*grads, layer.weight.grad, x.grad))

    def output(x, weight, fields_weight):
        parameters = {"weight": weight, "conv_offset.weight": fields_weight}
        return torch.func.functional_call(layer, parameters, x)

    inputs = (x, layer.weight, layer.conv_offset.weight)
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32_and_returns_what_a_plain_convolution_does(dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    layer = learned(DeformableConv(conv), std=0.1)
    x = torch.randn(2, 8, 6, 6)
    exact = layer(x)
    with torch.autocast("cpu", dtype):
        for entry in (x, x.to(dtype)):  # of the first layer, and of one that follows another
            low, plain = layer(entry), conv(entry)
            assert low.dtype == plain.dtype == dtype
            torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.05)
    low.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and torch.isfinite(layer.conv_offset.weight.grad).all()


def test_state_dict_is_timms_with_the_offsets_added():
    torch.manual_seed(0)
    reference = timm.create_model("resnet50", features_only=True, out_indices=(2, 3, 4))
    plain = build_backbone(BackboneConfig("resnet50", pretrained=False))
    deformable = build_backbone(BackboneConfig("resnet50", pretrained=False, deformable_stages=(2, 3, 4)))
    added = set(deformable.state_dict()) - set(plain.state_dict())
    assert len(added) == 2 * (4 + 6 + 3)  # weight and bias for each block of stages 2 to 4
    assert all(".conv2.conv_offset." in name for name in added)
    result = deformable.load_state_dict(reference.state_dict(), strict=False)
    assert set(result.missing_keys) == added and not result.unexpected_keys
    assert torch.equal(deformable.layer3[2].conv2.weight, reference.layer3[2].conv2.weight)


def test_weights_of_a_file_are_kept(tmp_path):
    source = timm.create_model("resnet18")
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    config = BackboneConfig("resnet18", checkpoint=str(tmp_path / "resnet18.pth"), deformable_stages=(3,))
    state = build_backbone(config).state_dict()
    for name, value in source.state_dict().items():
        assert name.startswith("fc.") or name.endswith("num_batches_tracked") or torch.equal(state[name], value)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "resnet26d"])
@pytest.mark.parametrize("groups", [1, 4])
def test_only_the_chosen_stages_change_and_all_that_is_trained_gets_a_gradient(name, groups):
    torch.manual_seed(0)
    config = BackboneConfig(name, pretrained=False, deformable_stages=(2, 4), deformable_groups=groups)
    backbone = build_backbone(config)
    replaced = {n: m for n, m in backbone.named_modules() if isinstance(m, DeformableConv)}
    left = {n for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
    left = {n for n in left if not n.endswith("conv_offset")}
    assert {n.split(".")[0] for n in replaced} == {"layer2", "layer4"}
    assert not any(n.startswith(("layer2", "layer4")) for n in left)
    assert all(m.offset_groups == groups for m in replaced.values())
    sum((m * torch.randn_like(m)).sum() for m in backbone(torch.randn(2, 3, 70, 97))).backward()
    for key, parameter in backbone.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, key


def test_frozen_stages_freeze_their_offsets():
    config = BackboneConfig("resnet18", pretrained=False, deformable_stages=(2, 3), frozen_stages=2)
    for name, parameter in build_backbone(config).named_parameters():
        if "conv_offset" in name:
            assert parameter.requires_grad == name.startswith("layer3"), name


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_recomputed_activations_give_the_same_gradients(name):
    torch.manual_seed(0)
    config = {"name": name, "pretrained": False, "deformable_stages": (2, 3, 4), "deformable_groups": 2}
    plain = build_backbone(BackboneConfig(**config))
    for layer in plain.modules():
        if isinstance(layer, DeformableConv):
            learned(layer, std=0.02)
    lean = build_backbone(BackboneConfig(**config, activation_checkpointing=True))
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for backbone in (plain, lean):
        sum(m.square().mean() for m in backbone(x)).backward()
    for (key, a), b in zip(plain.named_parameters(), lean.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet50.tv_in1k", ResNet50_Weights.IMAGENET1K_V1),
        ("resnet101.tv_in1k", ResNet101_Weights.IMAGENET1K_V1),
        ("resnext101_64x4d.tv_in1k", ResNeXt101_64X4D_Weights.IMAGENET1K_V1),
    ],
)
def test_backbones_of_the_recipes_have_the_published_size(name, weights):
    """All but the classifier's 1000 x 2048 weights and 1000 biases; every norm and the first stages are frozen."""
    backbone = build_backbone(BackboneConfig(name, pretrained=False))
    published = weights.meta["num_params"] - 1000 * (2048 + 1)
    assert sum(p.numel() for p in backbone.parameters()) == published
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    assert backbone.channels == [512, 1024, 2048] and backbone.strides == [8, 16, 32]
    frozen = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm)]
    assert frozen and not any(p.requires_grad for m in frozen for p in m.parameters())
    assert not any(p.requires_grad for p in (*backbone.conv1.parameters(), *backbone.layer1.parameters()))
    assert all(m.weight.requires_grad for m in backbone.layer2.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "efficientnet_b0"])
def test_networks_without_plain_3x3_convolutions_are_refused(name):
    with pytest.raises(ValueError, match=r"deformable_stages=\[2\].*no plain 3x3 convolution.*to a ResNet"):
        build_backbone(BackboneConfig(name, pretrained=False, deformable_stages=(2,)))


def test_stages_and_groups_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"deformable_stages=\[5\]: this backbone has stages 1 to 4"):
        build_backbone(BackboneConfig("resnet18", pretrained=False, deformable_stages=(5,)))
    with pytest.raises(ValueError, match=r"stage 4.*no map of model\.backbone\.levels needs it"):
        build_backbone(BackboneConfig("resnet18", pretrained=False, deformable_stages=(4,), levels=(8, 16)))
    with pytest.raises(ValueError, match=r"deformable_groups=3 does not divide the 64 channels"):
        build_backbone(BackboneConfig("resnet18", pretrained=False, deformable_stages=(2,), deformable_groups=3))


def test_settings_are_checked_before_the_network_is_built():
    load_config(DEMO, ["model.backbone.deformable_stages=[2, 3, 4]"])
    for wrong, message in (
        (["model.backbone.deformable_stages=[4, 3]"], "stages that increase"),
        (["model.backbone.deformable_groups=4"], r"needs model\.backbone\.deformable_stages"),
        (["model.backbone.deformable_stages=[0]"], "must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(DEMO, wrong)


def test_frozen_offsets_without_weights_are_warned_of():
    config = load_config(DEMO, ["model.backbone.deformable_stages=[1, 2]", "model.backbone.frozen_stages=1"])
    lines = describe_model(config, nn.Linear(2, 2), transfer=None)
    assert any("deformable_stages=[1, 2] includes frozen stages" in line for line in lines)
    config = load_config(DEMO, ["model.backbone.deformable_stages=[1]", "model.backbone.frozen_stages=0"])
    assert not any("deformable_stages" in line for line in describe_model(config, nn.Linear(2, 2), None))
