"""What a weights file says of the detector in it."""

from dataclasses import replace

import pytest
import torch
from support import DEMO, SMALL_DETECTOR

from brs_detr.config import Config, ConfigError, apply_overrides, differences, load_config, to_dict
from brs_detr.config_io import leaves
from brs_detr.engine.checkpoint import Weights, save_weights
from brs_detr.models.ensemble import LEVELS
from brs_detr.models.model_config import MODELS
from brs_detr.ops.images import ImageBatch
from brs_detr.run.setup import (
    METRIC_SETTINGS,
    TRAINING_SETTINGS,
    build_detector,
    load_initial_weights,
    restore,
)


def weights_of(folder, trained_with, **extra):
    """A file of random weights whose training had `eval.predict_with=trained_with`."""
    config = load_config(DEMO, [*SMALL_DETECTOR, f"eval.predict_with={trained_with}"])
    tensors = build_detector(config, 2, initial_weights=False).state_dict()
    save_weights(folder / "x.safetensors", Weights(tensors, ["a", "b"], [1, 2], to_dict(config), extra))
    return folder / "x.safetensors"


def scored(**ap):
    """What a validation keeps of the heads."""
    return {"ap": ap, "levels": {head: [0.0] * (LEVELS + 1) for head in ap}}


def test_auto_is_the_best_head_also_where_the_training_joined_all(tmp_path):
    heads = scored(roi=0.5, atss=0.4, decoder=0.2)
    file = weights_of(tmp_path, "ensemble", predict_with="ensemble", ensemble=heads)
    assert restore(file, ["eval.predict_with=auto"])[0].predict_with == "roi"
    joined = restore(file)[0]
    assert joined.predict_with == "ensemble" and list(joined.ensemble.ap) == ["roi", "atss", "decoder"]
    assert restore(file, ["eval.predict_with=decoder"])[0].predict_with == "decoder"


@pytest.mark.parametrize(("extra", "head"), [({"predict_with": "atss"}, "atss"), ({}, "decoder")])
def test_auto_is_the_head_that_the_validation_chose(tmp_path, extra, head):
    assert restore(weights_of(tmp_path, "auto", **extra))[0].predict_with == head


@pytest.mark.parametrize(("before", "after"), [("co_detr", "brs_detr"), ("brs_detr", "co_detr")])
@pytest.mark.parametrize("classes", [["a", "b"], ["b", "a"], ["a", "b", "c"]])
def test_a_classifier_with_background_starts_one_without_and_the_reverse(before, after, classes, tmp_path):
    """Softmax of Co-DETR and sigmoids of BRS-DETR, also where the classes are the same and in the same order."""
    other = load_config(DEMO, [*SMALL_DETECTOR, f"model.name={before}"])
    tensors = build_detector(other, 2, initial_weights=False).state_dict()
    tensors["roi.score.weight"] = torch.randn_like(tensors["roi.score.weight"])
    save_weights(tmp_path / "x.safetensors", Weights(tensors, ["a", "b"], [1, 2], to_dict(other), {}))
    start = [f"model.name={after}", f"train.init_from={tmp_path / 'x.safetensors'}"]
    config = load_config(DEMO, [*SMALL_DETECTOR, *start])
    model = build_detector(config, len(classes), initial_weights=False)
    assert len(model.roi.score.bias) - len(classes) == (after == "co_detr")
    report = load_initial_weights(model, config, classes)
    assert {"roi.score.weight", "roi.score.bias"} <= set(report.by_class)
    assert set(report.fresh) <= {"atss.centerness.weight", "atss.centerness.bias"}  # BRS-DETR has none
    for row, name in enumerate("ab"):
        assert torch.equal(model.roi.score.weight[classes.index(name)], tensors["roi.score.weight"][row])


def test_what_a_file_says_of_other_heads_is_refused(tmp_path):
    file = weights_of(tmp_path, "auto", predict_with="ensemble", ensemble=scored(head=0.5))
    with pytest.raises(ConfigError, match=r"Use one of decoder, roi, atss as eval\.predict_with"):
        restore(file)


def test_what_is_said_to_act_in_training_alone_are_settings():
    names = {name for model in MODELS for name, _ in leaves(replace(Config(), model=model))}
    assert set(TRAINING_SETTINGS) <= names and len(set(TRAINING_SETTINGS)) == len(TRAINING_SETTINGS)
    assert all(name.startswith(METRIC_SETTINGS) for name in TRAINING_SETTINGS)


@pytest.mark.parametrize("name", ["brs_detr", "mask_rcnn", "retinanet"])
def test_what_acts_in_training_alone_changes_no_detection_of_the_same_weights(name):
    words = [f"model.name={name}", "model.backbone.name=resnet18", "model.backbone.pretrained=false"]
    words += SMALL_DETECTOR if name == "brs_detr" else ["model.dim=64", "eval.score_threshold=0"]
    words += ["model.head.assigner=atss"] if name == "retinanet" else []
    one = load_config(DEMO, words) if name == "brs_detr" else apply_overrides(Config(), words)
    others = {"activation_checkpointing": True, "frozen_stages": 2, "drop_path": 0.1}
    values = {f"model.backbone.{key}": value for key, value in others.items()}
    values |= {"model.deformable_attention": "torch", "model.max_aux_queries": 3, "model.mask.max_masks": 3}
    values |= {"model.atss.topk": 3, "model.head.topk": 3, "model.roi.max_rois": 3, "model.roi.sample": 3}
    values |= {"model.roi.add_ground_truth": not getattr(getattr(one.model, "roi", None), "add_ground_truth", False)}
    values |= {"model.roi.low_quality": not getattr(getattr(one.model, "roi", None), "low_quality", False)}
    values |= {"model.roi.min_iou": 0.9, "model.rpn.proposals": 3, "model.rpn.proposals_before_nms": 3}
    values |= {"model.rpn.sample": 3, "model.rpn.allowed_border": 0, "model.rpn.prior": 0.1}
    there = dict(leaves(one))
    two = apply_overrides(one, [f"{key}={str(value).lower()}" for key, value in values.items() if key in there])
    assert {line.partition(":")[0] for line in differences(one, two)} <= set(TRAINING_SETTINGS)
    initial = {"model.backbone.pretrained", "model.backbone.checkpoint"}
    assert set(TRAINING_SETTINGS) <= {*values, *initial, "model.backbone.channels_last"}  # which rounds otherwise
    first, second = (build_detector(config, 3, initial_weights=False).eval() for config in (one, two))
    second.load_state_dict(first.state_dict())
    images = ImageBatch(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8), [(64, 96)], [(64, 96)])
    with torch.no_grad():
        [own], [other] = first(images), second(images)
    assert len(own["scores"]) > 3
    for key in ("scores", "labels", "boxes"):
        assert torch.equal(own[key], other[key]), key
