"""Small detectors with spread-out random weights, and one of them as an ONNX file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import SMALL_BACKBONE
from torch import nn

from brs_detr.export.onnx import write_onnx
from brs_detr.models.brs_detr import BRSDETR
from brs_detr.models.build import build_model
from brs_detr.models.config import BRSDETRConfig, CoDINOConfig, RPNConfig
from brs_detr.models.detector import Detector
from brs_detr.models.one_stage_config import ATSSConfig, FoveaBoxConfig, RetinaNetConfig
from brs_detr.models.rcnn_config import FasterRCNNConfig, ProposalConfig, RegionHeadConfig

SIZE = dict(
    backbone=replace(SMALL_BACKBONE, levels=(16, 32)),
    dim=64,
    heads=4,
    levels=3,
    encoder_layers=1,
    decoder_layers=1,
    ffn_dim=32,
    queries=12,
    detections_per_image=20,
)
SMALL = BRSDETRConfig(**SIZE, rpn=RPNConfig(test_proposals_before_nms=40, test_proposals=60))
DINO = CoDINOConfig(**SIZE, rpn=replace(CoDINOConfig.rpn, test_proposals_before_nms=40, test_proposals=60))
FEW = {"test_proposals_before_nms": 40, "test_proposals": 60}
CNN = {
    "atss": ATSSConfig(),
    "retinanet": RetinaNetConfig(),
    "foveabox": FoveaBoxConfig(),
    "faster_rcnn": FasterRCNNConfig(rpn=ProposalConfig(**FEW), roi=RegionHeadConfig(fc_dim=32)),
}


def spread_weights(model: BRSDETR, seed: int = 3) -> BRSDETR:
    """Random weights that give scores far apart and boxes off their proposals, as training does; in eval mode."""
    torch.manual_seed(seed)
    for head in (*model.decoder.regressors, model.proposals.regressor):
        nn.init.normal_(head[-1].weight, std=0.1)
    for head in (*model.decoder.classifiers, model.proposals.classifier):
        nn.init.normal_(head.weight, std=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            nn.init.normal_(parameter, std=0.2)
    return spread_dense(model)


def spread_dense(model: Detector) -> Detector:
    """The same for heads that suppress."""
    for name, parameter in model.named_parameters():
        if "_tower." in name and parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter)  # else four convolutions without norm make equal scores everywhere
        if name.startswith(("rpn.", "roi.", "atss.", "head.")) and name.endswith(("score.weight", "delta.weight")):
            nn.init.normal_(parameter, std=0.1 if "score" in name else 0.02)
    return model.eval()


@pytest.fixture(scope="session")
def spread():
    """`spread_weights`."""
    return spread_weights


@pytest.fixture(scope="session")
def build():
    """From a backbone's name, and other settings of it, to a detector."""

    def small_detector(backbone: str = SMALL.backbone.name, **settings: object) -> BRSDETR:
        torch.manual_seed(2)
        return spread_weights(
            build_model(replace(SMALL, backbone=replace(SMALL.backbone, name=backbone, **settings)), 3)
        )

    return small_detector


@pytest.fixture(scope="session")
def build_cnn():
    """From the name of a CNN detector to it, small."""

    def small_cnn(name: str) -> Detector:
        torch.manual_seed(4)
        config = CNN[name]
        backbone = replace(SMALL_BACKBONE, levels=config.backbone.levels)
        return spread_dense(build_model(replace(config, backbone=backbone, dim=64), 3))

    return small_cnn


@pytest.fixture(scope="session")
def detector(build) -> BRSDETR:
    """On a ResNet."""
    return build()


@pytest.fixture(scope="session", params=["encoder", "rpn"])
def dino(request) -> BRSDETR:
    """A Co-DINO whose queries begin at the encoder's proposals, or at the RPN's."""
    torch.manual_seed(2)
    return spread_weights(build_model(replace(DINO, query_boxes=request.param), 3))


@pytest.fixture(scope="session")
def exported(detector, tmp_path_factory) -> Path:
    """The detector as a file for images of any size, traced at 150 x 210."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("export") / "small.onnx"
    write_onnx(detector, path, (150, 210), any_size=True, metadata={"classes": ["a", "b", "c"], "size": None})
    return path
