"""Every name of the full-size official models has a place here, and every tensor the shape that our models want."""

import ast

import pytest
import torch

from brs_detr.checkpoints.architecture import recognize, settings_of
from brs_detr.checkpoints.keys import to_official, to_ours, why_dropped
from brs_detr.checkpoints.official import expected_shapes
from brs_detr.config import from_dict, load_config
from brs_detr.engine.checkpoint import CheckpointError

LISTS = {
    "brs_r50": ("brs_detr_r50", "resnet50"),
    "co_deformable_r50": ("co_detr_r50", "resnet50"),
    "co_deformable_swint": ("co_detr_swin_t", "swin_tiny_patch4_window7_224"),
}


@pytest.fixture
def listed(shared):
    def read(name):
        lines = (shared / "design" / f"state_dict_keys_{name}.tsv").read_text().splitlines()
        shapes = dict(line.split("\t")[:2] for line in lines)
        return {key: torch.empty(ast.literal_eval(shape), device="meta") for key, shape in shapes.items()}

    return read


@pytest.mark.parametrize("name", LISTS)
def test_every_official_tensor_has_its_place(listed, name):
    official = listed(name)
    kept = {key: value for key, value in official.items() if not why_dropped(key)}
    renamed, unknown = to_ours(kept)
    expected = expected_shapes(from_dict(settings_of(recognize(official, name)), name).model, 80)
    assert not unknown
    assert {key: value.shape for key, value in renamed.items()} == expected


@pytest.mark.parametrize("name", LISTS)
def test_the_way_back_has_the_official_names_and_shapes(listed, name):
    official = listed(name)
    renamed, _ = to_ours({key: value for key, value in official.items() if not why_dropped(key)})
    back, unknown = to_official(renamed)
    assert not unknown
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in official.items()}
    assert all(back[key] is value for key, value in official.items() if not why_dropped(key) and "head_pos" not in key)


@pytest.mark.parametrize("name", LISTS)
def test_what_the_tensors_tell_is_the_recipe_of_that_model(listed, name, recipes):
    """All settings: an official model evaluates and fine-tunes here as the recipe of its kind would."""
    recipe, backbone = LISTS[name]
    found = from_dict(settings_of(recognize(listed(name), name)), name)
    assert found.model.backbone.name.startswith(backbone)
    wanted = load_config(recipes / f"{recipe}_12e_coco.yaml")
    for section in ("data", "model", "optim", "train", "eval"):
        assert getattr(found, section) == getattr(wanted, section)


def test_denoising_detectors_are_refused_by_name(listed):
    with pytest.raises(CheckpointError, match="this is Co-DINO"):
        recognize(listed("co_dino_5scale_r50"), "file")


@pytest.mark.parametrize(("width", "depth", "window"), [(96, 18, 7), (128, 18, 12), (192, 18, 12)])
def test_larger_swins_differ_by_width_depth_and_window(listed, width, depth, window):
    """Swin-S, B and L, made from the list of Swin-T by its own rules: widths double, windows set the bias tables."""
    official = listed("co_deformable_swint")
    larger = {}
    for key, value in official.items():
        if key.startswith(("backbone.", "neck.")):
            shape = [size * width // 96 if size >= 96 or ".bias_table" in key else size for size in value.shape]
            if key.endswith("relative_position_bias_table"):
                shape = [(2 * window - 1) ** 2, value.shape[1] * width // 96]
            if key.startswith("neck.") and not (key.endswith("conv.weight")):
                shape = list(value.shape)
            elif key.startswith("neck."):
                shape = [256, value.shape[1] * width // 96, *value.shape[2:]]
            larger[key] = torch.empty(shape, device="meta")
            if key.startswith("backbone.layers.2.blocks.1."):
                for block in range(6, depth):
                    larger[key.replace("blocks.1.", f"blocks.{block}.")] = larger[key]
        else:
            larger[key] = value
    kept = {key: value for key, value in larger.items() if not why_dropped(key)}
    renamed, unknown = to_ours(kept)
    found = recognize(larger, "file")
    assert not unknown and f"window{window}" in found.backbone
    expected = expected_shapes(from_dict(settings_of(found), "file").model, 80)
    assert {key: value.shape for key, value in renamed.items()} == expected
