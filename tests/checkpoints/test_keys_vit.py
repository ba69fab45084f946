"""The released ViT-L detectors: every name has a place here and a way back, and what their tensors and names tell."""

import ast
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import RotaryEmbeddingCat

from brs_detr.checkpoints.architecture import EVAS, recognize
from brs_detr.checkpoints.keys import rotation_tables, to_official, to_ours, why_dropped
from brs_detr.checkpoints.official import (
    expected_shapes,
    export,
    from_official,
    settings_of,
)
from brs_detr.checkpoints.released import trained_settings, training_of
from brs_detr.config import from_dict, load_config
from brs_detr.config_io import merge
from brs_detr.data.config import LSJConfig
from brs_detr.engine.checkpoint import save_weights
from brs_detr.exit_codes import CheckpointError
from brs_detr.models.backbones.timm_backbone import build_backbone
from brs_detr.models.backbones.vit import rename_eva
from brs_detr.models.backbones.weights_io import read_official
from brs_detr.models.config import BackboneConfig

RECIPE = "co_dino_vit_l_12e_coco.yaml"
CANVAS = {"coco": None, "lvis": 1536}


@pytest.fixture
def listed(shared):
    """Returns the tensors of a released model by name, without memory."""

    def read(name):
        lines = (shared / "design" / f"state_dict_keys_co_dino_5scale_vit_large_{name}.tsv").read_text().splitlines()
        rows = [line.split("\t")[:2] for line in lines]
        return {key: torch.empty(ast.literal_eval(shape), device="meta") for key, shape in rows}

    return read


def config_of(architecture, source, *said):
    settings = settings_of(architecture)
    merge(settings, trained_settings(training_of(architecture, source, *said)))
    return from_dict(settings, source)


@pytest.mark.parametrize("name", CANVAS)
def test_every_tensor_of_vit_l_has_its_place_and_its_way_back(listed, name):
    official = listed(name)
    architecture = recognize(official, "file")
    model = from_dict(settings_of(architecture), "file").model
    kept = {key: value for key, value in official.items() if not why_dropped(key)}
    assert all("rope" in key for key in set(official) - set(kept))
    renamed, unknown = to_ours(kept)
    assert not unknown
    assert {key: value.shape for key, value in renamed.items()} == expected_shapes(model, architecture.num_classes)
    assert name != "coco" or sum(value.numel() for value in renamed.values()) == 365_367_657  # published: 365.4 M
    back, unknown = to_official(renamed)
    assert not unknown and back.keys() == kept.keys()
    assert all(back[key] is value for key, value in kept.items())
    back |= rotation_tables(back, model.backbone, CANVAS[name])
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in official.items()}


def test_what_the_file_of_coco_tells_is_the_recipe(listed, recipes):
    architecture = recognize(listed("coco"), "file")
    assert str(architecture).startswith("Co-DINO, backbone eva02_large_patch14_448, 6 + 6 layers of 256, 1500 queries")
    found = config_of(architecture, "weights/co_dino_5scale_vit_large_coco.pth")
    wanted = load_config(recipes / RECIPE, ["model.backbone.activation_checkpointing=false"])
    for section in ("data", "model", "optim", "train", "eval"):
        assert getattr(found, section) == getattr(wanted, section)
    assert config_of(architecture, "pytorch_model.bin", "detr") == found
    with pytest.raises(CheckpointError, match="--augmentation detr"):
        training_of(architecture, "pytorch_model.bin")


def test_what_the_file_of_lvis_tells(listed):
    architecture = recognize(listed("lvis"), "file")
    found = config_of(architecture, "co_dino_5scale_lsj_vit_large_lvis.pth")
    backbone, roi = found.model.backbone, found.model.roi
    assert (backbone.window_size, backbone.global_every, backbone.drop_path) == (16, 3, 0.3)
    assert (roi.stacked_convs, roi.class_agnostic, roi.coder_stds) == (0, False, (0.1, 0.1, 0.2, 0.2))
    assert (found.data.augment, found.data.test_canvas) == (LSJConfig(size=1536), 1536)
    assert (found.train.epochs, found.train.lr_steps, found.model.queries) == (16, (9, 15), 900)
    assert config_of(architecture, "pytorch_model.bin", "lsj") == found


def test_windows_follow_from_the_tables_and_else_are_those_of_coco(listed):
    official = listed("lvis")
    assert recognize(official, "file").windows == (16, 3)
    without = {key: value for key, value in official.items() if not why_dropped(key)}
    assert recognize(without, "file") == replace(recognize(official, "file"), windows=(24, 4))


def test_there_and_back_every_number_is_the_same(monkeypatch, tmp_path, recipes):
    """A narrow EVA-02 of four blocks, as a file."""
    create, name = timm.create_model, "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k"
    narrow = {"embed_dim": 64, "depth": 4, "num_heads": 16, "img_size": 56}
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: create(name, **{**settings, **narrow}))
    monkeypatch.setitem(EVAS, (64, 4, 17), (name, 0.4))
    small = ["encoder_layers=1", "decoder_layers=2", "ffn_dim=32", "queries=9", "roi.fc_dim=16"]
    config = load_config(recipes / RECIPE, [f"model.{setting}" for setting in small])
    ours = {key: torch.rand(shape) for key, shape in expected_shapes(config.model, 80).items()}
    official = to_official(ours)[0]
    official |= rotation_tables(official, config.model.backbone, None)
    torch.save({"state_dict": official}, tmp_path / "a.pth")
    weights, report = from_official(read_official(tmp_path / "a.pth"), "a.pth", augmentation="detr")
    assert weights.tensors.keys() == ours.keys() and all(torch.equal(weights.tensors[key], ours[key]) for key in ours)
    assert "tensors such as backbone.rope_win.freqs_cos: follows from the sizes of windows and maps" in str(report)
    save_weights(tmp_path / "a.safetensors", weights)
    export(tmp_path / "a.safetensors", tmp_path / "b.pth")
    back = read_official(tmp_path / "b.pth").tensors
    assert back.keys() == official.keys() and all(torch.equal(back[key], official[key]) for key in official)


def test_another_eva_is_refused(listed):
    official = listed("coco")
    official["backbone.pos_embed"] = torch.empty(1, 577, 1024, device="meta")
    with pytest.raises(CheckpointError, match="an EVA-02 of width 1024 with 24 blocks and 577 positions"):
        recognize(official, "file")


def test_rebuilt_tables_hold_the_rotations(listed):
    without = {key: value for key, value in listed("lvis").items() if not why_dropped(key)}
    tables = rotation_tables(without, BackboneConfig(window_size=16, global_every=3), 1536)
    rope = RotaryEmbeddingCat(64, in_pixels=False, ref_feat_shape=(16, 16))
    for block, side in ((0, 16), (2, 96), (22, 16), (23, 96)):
        sines, cosines = rope.get_embed([side, side]).chunk(2, dim=1)
        for kind, expected in (("sin", sines), ("cos", cosines)):
            torch.testing.assert_close(tables[f"backbone.blocks.{block}.attn.rope.freqs_{kind}"], expected)
    assert rotation_tables({"backbone.conv1.weight": torch.zeros(1)}, BackboneConfig(), None) == {}


@pytest.mark.parametrize("name", CANVAS)
def test_a_released_detector_starts_the_backbone_alone(listed, name, recipes):
    """As `model.backbone.checkpoint`: the same names, without the prefix that reading takes off."""
    blocks = {key.removeprefix("backbone."): 0 for key in listed(name) if key.startswith("backbone.blocks.")}
    renamed = rename_eva({key: torch.zeros(1) for key in blocks})
    overrides = ["model.backbone.pretrained=false", "model.backbone.checkpoint=null"]
    with torch.device("meta"):
        backbone = build_backbone(load_config(recipes / RECIPE, overrides).model.backbone)
    assert set(renamed) == {key for key in backbone.state_dict() if key.startswith("blocks.")}
