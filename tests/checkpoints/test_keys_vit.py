"""Every name of the released ViT-L detectors has a place here and a way back, and every tensor the shape it needs."""

import ast

import pytest
import torch

from brs_detr.checkpoints.keys import to_official, to_ours, why_dropped
from brs_detr.checkpoints.official import expected_shapes
from brs_detr.config import load_config
from brs_detr.models.backbones.timm_backbone import build_backbone
from brs_detr.models.backbones.vit import rename_eva

RECIPE = "co_dino_vit_l_12e_coco.yaml"
LVIS = ["model.queries=900", "model.backbone.window_size=16", "model.backbone.global_every=3"]
LVIS += ["model.roi.stacked_convs=0", "model.roi.class_agnostic=false", "model.roi.coder_stds=[0.1,0.1,0.2,0.2]"]
DETECTORS = {"coco": (80, []), "lvis": (1203, LVIS)}


@pytest.fixture
def listed(shared):
    """Returns the tensors of a released model by name, without memory."""

    def read(name):
        lines = (shared / "design" / f"state_dict_keys_co_dino_5scale_vit_large_{name}.tsv").read_text().splitlines()
        rows = [line.split("\t")[:2] for line in lines]
        return {key: torch.empty(ast.literal_eval(shape), device="meta") for key, shape in rows}

    return read


@pytest.mark.parametrize("name", DETECTORS)
def test_every_tensor_of_vit_l_has_its_place_and_its_way_back(listed, name, recipes):
    official, (classes, overrides) = listed(name), DETECTORS[name]
    kept = {key: value for key, value in official.items() if not why_dropped(key)}
    assert all("rope" in key for key in set(official) - set(kept))
    renamed, unknown = to_ours(kept)
    expected = expected_shapes(load_config(recipes / RECIPE, overrides).model, classes)
    assert not unknown
    assert {key: value.shape for key, value in renamed.items()} == expected
    back, unknown = to_official(renamed)
    assert not unknown and back.keys() == kept.keys()
    assert all(back[key] is value for key, value in kept.items())


@pytest.mark.parametrize("name", DETECTORS)
def test_a_released_detector_starts_the_backbone_alone(listed, name, recipes):
    """As `model.backbone.checkpoint`: the same names, without the prefix that reading takes off."""
    blocks = {key.removeprefix("backbone."): 0 for key in listed(name) if key.startswith("backbone.blocks.")}
    renamed = rename_eva({key: torch.zeros(1) for key in blocks})
    overrides = ["model.backbone.pretrained=false", "model.backbone.checkpoint=null"]
    with torch.device("meta"):
        backbone = build_backbone(load_config(recipes / RECIPE, overrides).model.backbone)
    assert set(renamed) == {key for key in backbone.state_dict() if key.startswith("blocks.")}
