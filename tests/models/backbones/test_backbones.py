"""Backbones: names and shapes of the published checkpoints, frozen parts that stay frozen, errors that help."""

import copy
import dataclasses

import pytest
import timm
import torch
from support import DEMO
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from brs_detr.config import ConfigError, load_config
from brs_detr.models.backbones.norms import FrozenBatchNorm, GroupNorm, freeze_batch_norm
from brs_detr.models.backbones.timm_backbone import TimmBackbone, build_backbone
from brs_detr.models.backbones.weights_io import load_backbone_weights, read_weights
from brs_detr.models.config import BackboneConfig
from brs_detr.run.setup import build_detector, for_weights_file, require_known_backbone


@pytest.fixture(scope="module")
def small():
    """A ResNet-18 with random weights; every test takes a copy of what it changes."""
    torch.manual_seed(0)
    return build_backbone(BackboneConfig("resnet18", pretrained=False))


def randomize(module):
    """Batch statistics and scales that are not the neutral ones."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return module


def test_frozen_batch_norm_computes_batch_norm_in_evaluation():
    reference = randomize(nn.Sequential(nn.BatchNorm2d(6))).eval()
    frozen = copy.deepcopy(reference)
    freeze_batch_norm(frozen)
    x = torch.randn(2, 6, 5, 7)
    frozen.train()
    torch.testing.assert_close(frozen(x), reference(x), rtol=1e-5, atol=1e-6)


def test_frozen_batch_norm_keeps_nothing_of_its_input_for_the_backward_pass():
    saved = []
    x = torch.randn(2, 6, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        FrozenBatchNorm(6)(x)
    assert max(saved, default=0) <= 6


def frozen_norm():
    """A frozen normalization with numbers, and its formula on features that are also returned."""
    norm = nn.Sequential(randomize(nn.Sequential(nn.BatchNorm2d(6))))
    freeze_batch_norm(norm)
    return norm[0][0], torch.randn(2, 6, 5, 7)


def formula(norm, x):
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])


def load(norm):
    norm.load_state_dict({name: value + 1 for name, value in norm.state_dict().items()})


def move(norm):
    norm.half().float()


def replace(norm):
    norm.weight = nn.Parameter(norm.weight + 1, requires_grad=False)


def average(norm):
    torch._foreach_lerp_(list(norm.state_dict().values()), [torch.ones(6)] * 4, 0.5)


@pytest.mark.parametrize("change", [load, move, replace, average, lambda norm: norm.running_var.mul_(2)])
def test_frozen_batch_norm_follows_its_weights_bit_for_bit(change):
    norm, x = frozen_norm()
    assert torch.equal(norm(x), formula(norm, x))
    before = norm(x)
    with torch.no_grad():
        change(norm)
    after = norm(x)
    assert torch.equal(after, formula(norm, x)) and not torch.equal(after, before)
    assert torch.equal(norm(x.double()), formula(norm, x.double()))
    assert torch.equal(norm(x.bfloat16()), formula(norm, x.bfloat16()))


def test_a_copy_of_a_frozen_batch_norm_follows_its_own_weights():
    norm, x = frozen_norm()
    with torch.no_grad():
        norm.weight.add_(1)
        norm(x)
        other = copy.deepcopy(norm)
        for own, first in zip(other.state_dict().values(), norm.state_dict().values(), strict=True):
            own.add_(1)
            while own._version < first._version:  # changed as often as the first one when it was folded
                own.add_(1)
        assert torch.equal(other(x), formula(other, x)) and not torch.equal(other(x), norm(x))
    assert list(norm.state_dict()) == list(nn.BatchNorm2d(6).state_dict())[:4]


def test_frozen_batch_norm_folds_once_and_trains_after_a_first_pass_in_inference_mode():
    norm, x = frozen_norm()
    with torch.inference_mode():
        norm(x)
    operations = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(str(function))
            return function(*args, **(kwargs or {}))

    x.requires_grad_()
    with Count():
        out = norm(x)
    assert operations == ["aten.addcmul.default"]
    out.sum().backward()
    expected = norm.weight * (norm.running_var + norm.eps).rsqrt()
    torch.testing.assert_close(x.grad, expected[:, None, None].expand_as(x))


def test_a_gradient_reaches_a_scale_that_was_made_trainable():
    norm, x = frozen_norm()
    norm(x)
    norm.weight.requires_grad_()
    norm(x).square().sum().backward()
    assert norm.weight.grad.abs().min() > 0


def test_an_exported_frozen_batch_norm_follows_from_its_stored_weights():
    norm, x = frozen_norm()
    norm(x)
    program = torch.export.export(norm, (x,))
    assert set(program.state_dict) == set(norm.state_dict())
    changed = {name: value + 1 for name, value in norm.state_dict().items()}
    assert torch.equal(torch.func.functional_call(program.module(), changed, (x,)), formula_of(norm, changed, x))


def formula_of(norm, state, x):
    other = copy.deepcopy(norm)
    other.load_state_dict(state)
    return formula(other, x)


def test_maps_equal_timm_and_do_not_depend_on_training_mode():
    torch.manual_seed(0)
    reference = randomize(timm.create_model("resnet18", features_only=True, out_indices=(2, 3, 4))).eval()
    ours = build_backbone(BackboneConfig("resnet18", pretrained=False))
    ours.load_state_dict(reference.state_dict())  # strict: the names are timm's and torchvision's
    x = torch.randn(2, 3, 70, 97)
    for mode in (True, False):
        for level, expected in zip(ours.train(mode)(x), reference(x), strict=True):
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)


def test_channels_and_strides_describe_the_maps():
    for strides in ((8, 16, 32), (4, 8), (16,)):
        backbone = build_backbone(BackboneConfig("resnet18", pretrained=False, levels=strides))
        maps = backbone(torch.randn(1, 3, 64, 96))
        assert [m.shape[1] for m in maps] == backbone.channels
        assert [(64 // m.shape[2], 96 // m.shape[3]) for m in maps] == [(s, s) for s in backbone.strides]
        assert tuple(backbone.strides) == strides


def test_resnet50_has_the_tensors_of_the_published_detector():
    """23,508,032 numbers with the frozen affine maps counted, and 318 tensors less 53 step counters."""
    backbone = build_backbone(BackboneConfig("resnet50.tv_in1k", pretrained=False))
    assert sum(p.numel() for p in backbone.parameters()) == 23_508_032
    assert len(backbone.state_dict()) == 318 - 53
    assert not any(p.requires_grad for n, p in backbone.named_parameters() if "bn" in n or "downsample.1" in n)
    assert {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad} == {
        "layer2",
        "layer3",
        "layer4",
    }


@pytest.mark.parametrize("norm", ["frozen", "group", "batch"])
def test_every_trainable_parameter_gets_a_gradient_and_frozen_ones_none(norm):
    backbone = build_backbone(BackboneConfig("resnet18", pretrained=False, norm=norm))
    sum((m * torch.randn_like(m)).sum() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and norm == "frozen":  # trained scales may start at zero and open the branch later
            assert parameter.grad.abs().sum() > 0, name
        assert parameter.requires_grad == (parameter.grad is not None), name


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("efficientnet_b0", (4, 8, 16)),
        ("mobilenetv3_small_100", (8, 16)),
        ("hrnet_w18_small", (8, 16, 32)),  # whose finest branch no other one depends on at the end
        ("legacy_xception", (8, 16)),
    ],
)
def test_parameters_that_no_map_depends_on_are_not_trained(name, levels, norm):
    """Training on several processes expects a gradient of every one."""
    settings = BackboneConfig(name, pretrained=False, frozen_stages=0, norm=norm, levels=levels)
    backbone = build_backbone(dataclasses.replace(settings, activation_checkpointing="b0" in name and norm == "group"))
    sum(level.square().mean() for level in backbone(torch.randn(2, 3, 64, 64))).backward()
    frozen = [parameter for parameter in backbone.parameters() if not parameter.requires_grad]
    assert 0 < len(frozen) < len(list(backbone.parameters()))
    for key, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), key


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0", "pvt_v2_b0"])
def test_networks_whose_maps_depend_on_all_are_trained_completely(name):
    backbone = build_backbone(BackboneConfig(name, pretrained=False, frozen_stages=0, norm="group"))
    assert not backbone.unused and all(parameter.requires_grad for parameter in backbone.parameters())


def test_frozen_stages_count_the_stem():
    for count, frozen in ((0, set()), (1, {"conv1", "layer1"}), (3, {"conv1", "layer1", "layer2", "layer3"})):
        backbone = build_backbone(BackboneConfig("resnet18", pretrained=False, frozen_stages=count, norm="group"))
        found = {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
        assert found - {"bn1"} == frozen
    with pytest.raises(ValueError, match=r"frozen_stages=9.*4 stages"):
        build_backbone(BackboneConfig("resnet18", pretrained=False, frozen_stages=9))
    hrnet = BackboneConfig("hrnet_w18_small", pretrained=False, frozen_stages=1)  # its branches run side by side
    with pytest.raises(ValueError, match=r"frozen_stages=1: this backbone has no module for stage .*Set it to 0"):
        build_backbone(hrnet)


@pytest.mark.parametrize("norm", ["frozen", "batch", "group"])
def test_channels_last_computes_the_same_and_keeps_the_layout_through_loading(norm):
    settings = BackboneConfig("resnet18", pretrained=False, frozen_stages=0, norm=norm)
    torch.manual_seed(0)
    plain = build_backbone(settings).double()
    other = build_backbone(dataclasses.replace(settings, channels_last=True)).double()
    assert list(plain.state_dict()) == list(other.state_dict())
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 70, 97, dtype=torch.float64)
    for one, two in zip(plain(x), other(x), strict=True):
        assert two.is_contiguous(memory_format=torch.channels_last) and not two.is_contiguous()
        torch.testing.assert_close(one, two)
    (plain(x)[-1].square().mean() + other(x)[-1].square().mean()).backward()
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad)
    weight = copy.deepcopy(other).layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_a_backbone_frozen_completely_stays_in_evaluation():
    backbone = build_backbone(BackboneConfig("resnet18", pretrained=False, norm="batch")).requires_grad_(False)
    assert not any(module.training for module in backbone.train().modules())


def test_batch_statistics_of_frozen_stages_do_not_move():
    backbone = build_backbone(BackboneConfig("resnet18", pretrained=False, norm="batch"))
    before = copy.deepcopy(backbone.state_dict())
    backbone.train()(torch.randn(2, 3, 64, 64) + 3)
    after = backbone.state_dict()
    assert torch.equal(after["layer1.0.bn1.running_mean"], before["layer1.0.bn1.running_mean"])
    assert not torch.equal(after["layer2.0.bn1.running_mean"], before["layer2.0.bn1.running_mean"])


def test_group_norm_does_not_depend_on_the_batch():
    backbone = build_backbone(BackboneConfig("resnet18", pretrained=False, norm="group", frozen_stages=0))
    assert any(isinstance(layer, GroupNorm) for layer in backbone.modules())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in backbone.modules())
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(backbone(x)[-1][1:2], backbone(x[1:2])[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0"])
def test_recomputed_activations_give_the_same_gradients(name):
    torch.manual_seed(0)
    plain = build_backbone(BackboneConfig(name, pretrained=False))
    lean = build_backbone(BackboneConfig(name, pretrained=False, activation_checkpointing=True))
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for backbone in (plain, lean):
        sum(m.square().mean() for m in backbone(x)).backward()
    for (key, a), b in zip(plain.named_parameters(), lean.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=key)


def test_networks_with_maps_of_other_layouts_come_out_channels_first():
    backbone = build_backbone(BackboneConfig("mambaout_femto", pretrained=False))
    assert backbone.channels_last
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == backbone.channels


@pytest.mark.parametrize("name", ["hrnet_w18_small", "dla34", "sam2_hiera_tiny"])
def test_networks_for_multiples_of_their_stride_take_images_of_any_size(name):
    """Their maps are those of the padded image, cut to where those of any other backbone end."""
    backbone = build_backbone(BackboneConfig(name, pretrained=False, frozen_stages=0)).eval()
    assert backbone.grain == 32
    x = torch.randn(1, 3, 65, 100)
    with torch.no_grad():
        maps, padded = backbone(x), backbone(nn.functional.pad(x, (0, 28, 0, 31)))
    assert [level.shape[-2:] for level in maps] == [(9, 13), (5, 7), (3, 4)]
    assert padded[0].shape[-2:] == (12, 16)
    for level, whole in zip(maps, padded, strict=True):
        assert torch.equal(level, whole[..., : level.shape[2], : level.shape[3]])


def test_networks_of_a_fixed_size_are_refused_with_the_setting_to_change():
    for name in ("swinv2_tiny_window8_256", "coatnet_pico_rw_224"):
        with pytest.raises(ValueError, match=r"takes images of certain sizes only .* Choose one that takes any"):
            build_backbone(BackboneConfig(name, pretrained=False))
    config = load_config(DEMO, ["model.backbone.name=swinv2_tiny_window8_256", "model.backbone.levels=[8,16,32]"])
    with pytest.raises(ConfigError, match=r"^model\.backbone\.name=swinv2_tiny_window8_256: this backbone takes"):
        build_detector(config, 3)


def test_a_network_that_returns_no_tensors_is_refused():
    with pytest.raises(ValueError, match="returns lists in place of feature maps"):
        build_backbone(BackboneConfig("selecsls42b", pretrained=False))


def test_the_trial_of_a_backbone_changes_neither_its_statistics_nor_the_random_numbers(monkeypatch):
    """Otherwise a training would compute other numbers than before there was one."""
    settings = BackboneConfig("resnet10t", pretrained=False, norm="batch", drop_path=0.5)
    states = []
    for trial in (TimmBackbone._try_out, lambda *_: None):
        monkeypatch.setattr(TimmBackbone, "_try_out", trial)
        torch.manual_seed(0)
        backbone = build_backbone(settings)
        states.append((backbone.state_dict(), torch.rand(5), [module.training for module in backbone.modules()]))
    (weights, drawn, modes), (other_weights, other_drawn, other_modes) = states
    assert torch.equal(drawn, other_drawn) and modes == other_modes
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.parametrize("wrap", ["plain", "torchvision", "detector", "distributed"])
def test_weights_saved_by_others_are_found(tmp_path, small, wrap):
    wanted = {k: torch.randn_like(v) for k, v in small.state_dict().items()}
    state = {
        "plain": wanted,
        "torchvision": wanted | {"fc.weight": torch.zeros(3), "bn1.num_batches_tracked": torch.tensor(5)},
        "detector": {"state_dict": {f"backbone.{k}": v for k, v in wanted.items()} | {"neck.conv": torch.zeros(1)}},
        "distributed": {"model": {f"module.{k}": v for k, v in wanted.items()}},
    }[wrap]
    torch.save(state, tmp_path / "weights.pth")
    backbone = build_backbone(BackboneConfig("resnet18", pretrained=True, checkpoint=tmp_path / "weights.pth"))
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, wanted[key])


def test_report_names_what_is_missing_misshapen_and_unused(tmp_path, small, capsys):
    from safetensors.torch import save_file

    state = {k: v.clone() for k, v in small.state_dict().items()}
    del state["layer4.1.conv2.weight"]
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    state["fc.bias"] = torch.zeros(1000)
    save_file(state, tmp_path / "w.safetensors")
    load_backbone_weights(copy.deepcopy(small), tmp_path / "w.safetensors")
    report = capsys.readouterr().out
    assert "missing 1 (layer4.1.conv2.weight)" in report
    assert "conv1.weight (64, 1, 7, 7) instead of (64, 3, 7, 7)" in report
    assert "not used 1 (fc.bias)" in report


class Payload:
    """Something a checkpoint has no business to hold."""


def test_files_that_cannot_serve_are_refused_in_one_sentence(tmp_path, small):
    with pytest.raises(FileNotFoundError, match="no file"):
        read_weights(tmp_path / "absent.pth")
    torch.save({"other.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="none of its 1 tensors belongs to this backbone"):
        load_backbone_weights(copy.deepcopy(small), tmp_path / "other.pth")
    torch.save({"a": Payload()}, tmp_path / "objects.pth")
    with pytest.raises(ValueError, match="holds Python objects"):
        read_weights(tmp_path / "objects.pth")


def test_unknown_names_lead_to_the_nearest():
    with pytest.raises(ValueError, match="did you mean resnet50"):
        build_backbone(BackboneConfig("resnet5", pretrained=False))
    with pytest.raises(ValueError, match=r"resnet50\.tv_in1k"):
        build_backbone(BackboneConfig("resnet50.tv_in2k", pretrained=False))
    with pytest.raises(ValueError, match="frozen, batch or group"):
        build_backbone(BackboneConfig("resnet18", pretrained=False, norm="sync"))
    with pytest.raises(ValueError, match=r"stride \[16\].*pyramid"):
        build_backbone(BackboneConfig("vit_tiny_patch16_224", pretrained=False))


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    build = timm.create_model

    def offline(name, pretrained, **settings):
        if pretrained:
            raise OSError("Name or service not known")
        return build(name, pretrained, **settings)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"checkpoint=PATH.*pretrained=false"):
        build_backbone(BackboneConfig("resnet18"))


def test_a_network_of_a_folder_has_a_name_of_its_own_for_the_weights_file(tmp_path):
    """Which the recipe may name, as it may one of the hub; the weights file must not lead there."""
    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {}}')
    name = f"local-dir:{tmp_path}"
    config = load_config(DEMO, [f"model.backbone.name={name}"])
    stored = for_weights_file(config)
    assert stored.model.backbone.name == "resnet18" and for_weights_file(stored) == stored
    theirs = build_backbone(BackboneConfig(name, pretrained=False)).state_dict()
    assert set(build_backbone(BackboneConfig("resnet18", pretrained=False)).state_dict()) == set(theirs)
    require_known_backbone(stored, tmp_path)
    with pytest.raises(ConfigError, match="is looked up elsewhere"):
        require_known_backbone(config, tmp_path)
    with pytest.raises(ConfigError, match=r"model\.backbone\.name=local-dir:/nowhere: "):
        for_weights_file(load_config(DEMO, ["model.backbone.name=local-dir:/nowhere"]))
