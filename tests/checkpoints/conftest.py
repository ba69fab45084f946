"""Where the recipes and the lists of official names lie."""

from dataclasses import replace
from pathlib import Path

import pytest

from brs_detr.config import load_config
from brs_detr.models.config import BackboneConfig, BRSDINOConfig, CoDINOConfig, DenoisingConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipes():
    """Folder of the recipes."""
    return ROOT / "configs"


@pytest.fixture
def shared():
    """Folder of reference data that may lie beside the repository; skips where it is absent."""
    path = ROOT.parent / "shared"
    if not path.exists():
        pytest.skip("reference data is not beside this checkout")
    return path


@pytest.fixture
def small_model():
    """A narrow detector on a ResNet-50 as model settings, for either family."""

    def settings(softmax):
        recipe = "co_detr_r50" if softmax else "brs_detr_r50"
        narrow = ["dim=64", "ffn_dim=32", "queries=12", "encoder_layers=1", "decoder_layers=2", "roi.fc_dim=64"]
        overrides = [f"model.{setting}" for setting in narrow] + ["model.backbone.pretrained=false"]
        return load_config(ROOT / "configs" / f"{recipe}_12e_coco.yaml", overrides).model

    return settings


@pytest.fixture
def small_dino():
    """The same with DINO's decoder."""

    def settings(softmax=True, denoising="quality_focal"):
        kind = CoDINOConfig if softmax else BRSDINOConfig
        return kind(
            backbone=BackboneConfig(pretrained=False, levels=(4, 8, 16, 32)),
            dim=64,
            ffn_dim=32,
            queries=12,
            encoder_layers=1,
            decoder_layers=2,
            roi=replace(kind.roi, fc_dim=64),
            denoising=DenoisingConfig(loss=denoising),
        )

    return settings
