"""Section `model` of the settings: those of one detector, chosen by its name."""

from __future__ import annotations

from brs_detr.models.config import BRSDETRConfig, BRSDINOConfig, CoDETRConfig, CoDINOConfig
from brs_detr.models.one_stage_config import (
    ATSSConfig,
    FoveaBoxConfig,
    PAAConfig,
    RetinaNetConfig,
    SOLOv2Config,
    YOLACTConfig,
)
from brs_detr.models.rcnn_config import CascadeRCNNConfig, FasterRCNNConfig, MaskRCNNConfig

ModelConfig = (
    BRSDETRConfig
    | CoDETRConfig
    | BRSDINOConfig
    | CoDINOConfig
    | RetinaNetConfig
    | FoveaBoxConfig
    | ATSSConfig
    | PAAConfig
    | FasterRCNNConfig
    | CascadeRCNNConfig
    | MaskRCNNConfig
    | YOLACTConfig
    | SOLOv2Config
)
MODELS: tuple[ModelConfig, ...] = (  # section `model` is one of them, by name; the first is the default
    BRSDETRConfig(),
    CoDETRConfig(),
    BRSDINOConfig(),
    CoDINOConfig(),
    RetinaNetConfig(),
    FoveaBoxConfig(),
    ATSSConfig(),
    PAAConfig(),
    FasterRCNNConfig(),
    CascadeRCNNConfig(),
    MaskRCNNConfig(),
    YOLACTConfig(),
    SOLOv2Config(),
)
