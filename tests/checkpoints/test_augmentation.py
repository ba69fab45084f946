"""What the names of the released Co-DINO files say of their training, in the numbers of its publication."""

from dataclasses import replace

import pytest

from brs_detr.checkpoints.architecture import Architecture
from brs_detr.checkpoints.official import settings_of
from brs_detr.checkpoints.released import from_name, trained_settings, training_of
from brs_detr.config import from_dict, load_config
from brs_detr.config_io import merge
from brs_detr.data.config import AugmentConfig, LSJConfig
from brs_detr.exit_codes import CheckpointError
from brs_detr.hub.published import TABLE

SWIN = "swin_large_patch4_window12_384.ms_in22k"
R50 = Architecture(
    backbone="resnet50.tv_in1k",
    drop_path=0.0,
    dim=256,
    levels=5,
    points=4,
    encoder_layers=6,
    decoder_layers=6,
    ffn_dim=2048,
    queries=900,
    num_classes=80,
    softmax=True,
    centerness=True,
    fc_dim=1024,
    stacked_convs=1,
    dino=True,
    denoising=True,
)
DEEP = replace(R50, encoder_layers=9)
SWIN_L = replace(R50, backbone=SWIN, drop_path=0.3)
LVIS, OBJECTS365 = replace(SWIN_L, num_classes=1203), replace(SWIN_L, num_classes=365)

# name, architecture, side of the canvas, epochs, epoch of the drop, drop path, recipe
TRAININGS = [
    ("r50_1x_coco", R50, None, 12, 11, 0, "r50_12e_coco"),
    ("r50_1x_coco-7481f903", R50, None, 12, 11, 0, "r50_12e_coco"),
    ("r50_8xb2_1x_coco", R50, None, 12, 11, 0, "r50_12e_coco"),
    ("lsj_r50_1x_coco", R50, 1024, 12, 11, 0, "r50_lsj_12e_coco"),
    ("r50_lsj_8xb2_1x_coco", R50, 1024, 12, 11, 0, "r50_lsj_12e_coco"),
    ("lsj_r50_3x_coco-fe5a6829", R50, 1024, 36, 30, 0, "r50_lsj_36e_coco"),
    ("9encoder_lsj_r50_1x_coco", DEEP, 1024, 12, 11, 0, "r50_9encoder_lsj_12e_coco"),
    ("9encoder_lsj_r50_3x_coco", DEEP, 1024, 36, 30, 0, "r50_9encoder_lsj_36e_coco"),
    ("swin_large_1x_coco", SWIN_L, None, 12, 11, 0.3, "swin_l_12e_coco"),
    ("swin_large_2x_coco", SWIN_L, None, 24, 20, 0.5, "swin_l_24e_coco"),
    ("swin_large_3x_coco", SWIN_L, None, 36, 30, 0.6, "swin_l_36e_coco"),
    ("lsj_swin_large_1x_coco", SWIN_L, 1280, 12, 11, 0.3, "swin_l_lsj_12e_coco"),
    ("lsj_swin_large_2x_coco", SWIN_L, 1280, 24, 20, 0.5, "swin_l_lsj_24e_coco"),
    ("lsj_swin_large_3x_coco", SWIN_L, 1280, 36, 30, 0.5, "swin_l_lsj_36e_coco"),
    ("swin_l_lsj_16xb1_3x_coco", SWIN_L, 1280, 36, 30, 0.5, "swin_l_lsj_36e_coco"),
    ("lsj_r50_1x_lvis", replace(R50, num_classes=1203), 1024, 12, 11, 0, "r50_lsj_12e_lvis"),
    ("lsj_swin_large_3x_lvis", LVIS, 1280, 36, 30, 0.3, "swin_l_lsj_36e_lvis"),
    ("lsj_swin_large_16e_o365tolvis", LVIS, 1536, 16, 8, 0.3, None),
    ("swin_large_16e_o365tolvis", LVIS, 1536, 16, 8, 0.3, None),
    ("swin_large_16e_o365tococo-614254c9", SWIN_L, None, 16, 8, 0.3, "swin_l_o365_16e_coco"),
    ("swin_large_22e_o365", OBJECTS365, None, 12, 11, 0.3, None),
]


def config_of(name, architecture):
    settings = settings_of(architecture)
    merge(settings, trained_settings(training_of(architecture, f"weights/co_dino_5scale_{name}.pth")))
    return from_dict(settings, name)


@pytest.mark.parametrize(
    ("name", "architecture", "canvas", "epochs", "step", "drop_path", "recipe"), TRAININGS, ids=lambda x: str(x)[:40]
)
def test_the_name_of_a_released_file_says_its_training(
    recipes, name, architecture, canvas, epochs, step, drop_path, recipe
):
    found = config_of(name, architecture)
    assert found.data.test_canvas == canvas and isinstance(found.data.augment, LSJConfig) == (canvas is not None)
    assert canvas is None or found.data.augment == LSJConfig(size=canvas)
    assert (found.train.epochs, found.train.lr_steps, found.train.lr_gamma) == (epochs, (step,), 0.1)
    assert found.model.backbone.drop_path == drop_path and found.optim.weight_decay == 1e-4
    fine_tuned = "o365to" in name
    assert found.optim.lr == (1e-4 if fine_tuned else 2e-4)
    assert (found.model.denoising.queries, found.model.denoising.box_noise) == ((500, 0.4) if fine_tuned else (100, 1))
    assert found.eval.max_detections == found.model.detections_per_image == (1000 if name.endswith("tolvis") else 300)
    assert (found.data.test_short_side, found.data.test_long_side) == (
        (1280, 2048) if "tococo" in name else (800, 1333)
    )
    if recipe is None:  # weights to start from, without a recipe
        return
    path = recipes / f"co_dino_{recipe}.yaml"
    wanted = load_config(path, ["model.backbone.activation_checkpointing=false", "train.init_from=null"])
    assert (found.model, found.optim, found.train, found.eval) == (
        wanted.model,
        wanted.optim,
        wanted.train,
        wanted.eval,
    )
    for setting in ("augment", "antialias", "test_canvas", "test_short_side", "test_long_side"):
        assert getattr(found.data, setting) == getattr(wanted.data, setting)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("epoch_12", R50),
        ("co_dino_5scale_r50_1x_coco", replace(R50, softmax=False)),  # BRS-DINO
        ("best_lsj", R50),
        ("co_dino_5scale_lsj_r50_1x_coco_cells", R50),
        ("my_co_dino_5scale_lsj_r50_1x_coco", R50),
        ("co_dino_5scale_lsj_r50_1x_coco", replace(R50, num_classes=3)),
        ("co_dino_5scale_lsj_r50_1x_coco", SWIN_L),
        ("co_dino_5scale_lsj_r50_1x_coco", DEEP),
        ("co_dino_5scale_9encoder_lsj_r50_1x_coco", R50),
        ("co_dino_5scale_lsj_swin_large_1x_coco", R50),
        ("co_dino_5scale_r50_1x_lvis", replace(R50, num_classes=1203)),  # there were recipes of either kind
        ("co_dino_5scale_swin_large_3x_lvis", LVIS),
    ],
)
def test_other_names_say_nothing(name, architecture):
    assert from_name(architecture, f"/some/folder/{name}.pth") is None


def test_every_published_name_says_its_training():
    architectures = {"r50": R50, "swin_large": SWIN_L, "o365": OBJECTS365}
    for name in TABLE:
        if name.startswith("co_dino"):
            kind = next(key for key in ("r50", "o365", "swin_large") if name.endswith(key) or f"_{key}_" in name)
            found = from_name(architectures[kind], f"{name}.pth")
            assert found is not None and (found.augmentation == "lsj") == ("lsj" in name)


@pytest.mark.parametrize(
    ("architecture", "canvas", "side", "detections"),
    [(R50, None, 1024, 300), (SWIN_L, None, 1280, 300), (LVIS, 1280, 1280, 300), (LVIS, 1536, 1536, 1000)],
)
def test_the_side_of_the_canvas_is_that_of_the_released_model(architecture, canvas, side, detections):
    settings = settings_of(architecture)
    merge(settings, trained_settings(training_of(architecture, "a.pth", "lsj", canvas)))
    found = from_dict(settings, "a.pth")
    assert found.data.augment == LSJConfig(size=side) and found.data.test_canvas == side
    assert found.eval.max_detections == detections


def test_two_sides_are_asked_for():
    with pytest.raises(CheckpointError, match=r"^a\.pth: .* Add --canvas 1280 or --canvas 1536\.$"):
        training_of(LVIS, "a.pth", "lsj")
    training = training_of(LVIS, "a.pth", "detr")
    assert training.canvas is None and trained_settings(training)["data"] == {}


def test_the_canvas_of_a_name_can_be_another():
    assert training_of(SWIN_L, "co_dino_5scale_lsj_swin_large_1x_coco.pth", None, 640).canvas == 640


def test_a_co_dino_without_jitter_has_the_augmentation_of_detr():
    assert config_of("r50_1x_coco", R50).data.augment == AugmentConfig()
