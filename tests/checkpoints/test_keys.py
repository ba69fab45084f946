"""Every name of the full-size official models has a place here, and every tensor the shape that our models want."""

import ast
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from timm.models.swin_transformer import PatchMerging

from brs_detr.checkpoints.architecture import recognize
from brs_detr.checkpoints.keys import original_swin, to_official, to_ours, why_dropped
from brs_detr.checkpoints.official import expected_shapes, settings_of
from brs_detr.config import from_dict, load_config
from brs_detr.engine.config import OptimConfig
from brs_detr.exit_codes import CheckpointError
from brs_detr.models.config import CoDINOConfig, SoftNMS

LISTS = {
    "brs_r50": ("brs_detr_r50", "resnet50"),
    "co_deformable_r50": ("co_detr_r50", "resnet50"),
    "co_deformable_swint": ("co_detr_swin_t", "swin_tiny_patch4_window7_224"),
}
DINOS = {
    "co_dino_5scale_r50": (6, 80),
    "co_dino_5scale_9encoder_r50": (9, 80),
    "co_dino_5scale_swin_large": (6, 80),
    "co_dino_5scale_swin_large_lvis": (6, 1203),
}
"""Encoder layers and classes."""


@pytest.fixture
def listed(shared):
    def read(name):
        lines = (shared / "design" / f"state_dict_keys_{name}.tsv").read_text().splitlines()
        shapes = dict(line.split("\t")[:2] for line in lines)
        return {key: torch.empty(ast.literal_eval(shape), device="meta") for key, shape in shapes.items()}

    return read


def shapes(tensors):
    return {key: value.shape for key, value in tensors.items()}


def expected_of(architecture):
    return expected_shapes(from_dict(settings_of(architecture), "file").model, architecture.num_classes)


def converted(official):
    renamed, unknown = to_ours({key: value for key, value in official.items() if not why_dropped(key)})
    assert not unknown
    return renamed


@pytest.mark.parametrize("name", [*LISTS, *DINOS])
def test_every_official_tensor_has_its_place(listed, name):
    official = listed(name)
    assert shapes(converted(official)) == expected_of(recognize(official, name))


@pytest.mark.parametrize("name", DINOS)
def test_what_the_tensors_of_a_co_dino_tell(listed, name):
    found = recognize(listed(name), name)
    assert (found.encoder_layers, found.num_classes) == DINOS[name]
    assert found.dino and found.softmax and found.denoising and found.centerness
    assert (found.levels, found.queries, found.decoder_layers) == (5, 900, 6)
    assert found.backbone.startswith("swin_large_patch4_window12" if "swin" in name else "resnet50")
    assert str(found).startswith("Co-DINO, backbone")
    config = from_dict(settings_of(found), name)
    assert config.model == replace(
        CoDINOConfig(),
        encoder_layers=found.encoder_layers,
        backbone=replace(
            CoDINOConfig.backbone,
            name=found.backbone,
            frozen_stages=0 if "swin" in name else 1,
            drop_path=0.3 if "swin" in name else 0.0,
        ),
    )
    assert config.optim == OptimConfig(weight_decay=1e-4, sampling_offsets_lr_factor=1.0)
    assert config.eval.nms == SoftNMS(iou=0.8) and config.eval.max_detections == 300
    assert (config.train.epochs, config.train.lr_steps, config.train.lr_gamma) == (12, (11,), 0.1)
    assert not config.data.antialias


def test_objects365_has_365_classes(listed):
    """Made from the list of COCO by its own rule: what has a row for each class, and four in the RoI head."""
    official = listed("co_dino_5scale_swin_large")
    rows = {80: 365, 81: 366, 320: 4 * 365}
    larger = {
        key: value.new_empty((rows.get(value.shape[0], value.shape[0]), *value.shape[1:]))
        if value.dim() and key.startswith(("query_head.", "roi_head.", "bbox_head.")) and "offsets" not in key
        else value
        for key, value in official.items()
    }
    found = recognize(larger, "file")
    assert found.num_classes == 365 and shapes(converted(larger)) == expected_of(found)


def test_the_label_table_has_another_name_in_mmdetection(listed):
    official = listed("co_dino_5scale_r50")
    theirs = {key.replace("head.label_emb", "head.dn_generator.label_emb"): value for key, value in official.items()}
    assert set(official) - set(theirs) == {"query_head.label_embedding.weight"}
    assert recognize(theirs, "file") == recognize(official, "file")
    assert converted(theirs).keys() == converted(official).keys()
    assert shapes(to_official(converted(theirs))[0]) == shapes(official)


def mmdetection_name(name):
    """Name in MMDetection's own Swin of a parameter of the original one."""
    if not name.startswith("backbone."):
        return name
    name = name.replace("backbone.layers.", "backbone.stages.").replace(".attn.", ".attn.w_msa.")
    name = name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
    return name.replace("patch_embed.proj.", "patch_embed.projection.")


def test_a_swin_of_mmdetection_becomes_the_original(listed):
    official = listed("co_dino_5scale_swin_large")
    theirs = {mmdetection_name(key): value for key, value in official.items()}
    assert "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight" in theirs
    assert shapes(original_swin(theirs)) == shapes(official)
    assert original_swin(official) == official


def test_patches_are_merged_as_in_mmdetection():
    """There `Unfold` takes the cells, here timm does: with the reordered weights both compute the same."""
    channels = 6
    norm, reduction = torch.nn.LayerNorm(4 * channels), torch.nn.Linear(4 * channels, 2 * channels, bias=False)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 10, channels)
    cells = torch.nn.functional.unfold(x.movedim(-1, 1), kernel_size=2, stride=2)
    theirs = reduction(norm(cells.transpose(1, 2)))
    start = "backbone.stages.0.downsample."
    state = {f"{start}norm.{key}": value for key, value in norm.state_dict().items()}
    state = original_swin(state | {f"{start}reduction.weight": reduction.weight.detach()})
    ours = PatchMerging(channels)
    ours.load_state_dict({key.removeprefix("backbone.layers.0.downsample."): value for key, value in state.items()})
    assert torch.allclose(ours(x).flatten(1, 2), theirs, atol=1e-5)


@pytest.mark.parametrize("name", [*LISTS, *DINOS])
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


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("coco_instance", "Co-DINO on a ViT with instance masks"),
        ("lvis_instance", "Co-DINO on a ViT with instance masks"),
    ],
)
def test_detectors_on_a_vit_are_refused_by_name(listed, name, called):
    with pytest.raises(CheckpointError, match=f"^file: this is {called}; only ") as caught:
        recognize(listed(f"co_dino_5scale_vit_large_{name}"), "file")
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("family", ["brs_detr", "co_detr", "co_dino"])
def test_recorded_weights_are_the_same_there_and_back(shared, family):
    official = load_file(shared / "golden" / family / "state_dict.safetensors")
    back, unknown = to_official(converted(official))
    counters = {name for name in back if name.endswith("num_batches_tracked")}
    assert not unknown and set(back) - counters == set(official) - counters
    assert all(torch.equal(back[name], value) for name, value in official.items() if not why_dropped(name))
    with pytest.raises(CheckpointError, match="file: the backbone is one of"):  # of the size of a test
        recognize(official, "file")
