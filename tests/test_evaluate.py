"""What an evaluation says of settings that differ from the training's, or have no effect."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from brs_detr import evaluate
from brs_detr.config import Config, apply_overrides
from brs_detr.engine.config import EvalConfig
from brs_detr.models.config import HardNMS, SoftNMS
from brs_detr.run import setup


@pytest.mark.parametrize("name", ["report", "batch_size", "calibrate"])
def test_settings_that_change_no_figure_are_no_difference_to_the_training(name):
    stored = Config()
    value = {"report": False, "batch_size": 7, "calibrate": False}[name]
    assert evaluate.changed_settings(stored, replace(stored, eval=replace(stored.eval, **{name: value}))) == []


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("eval.test_flip=true", "eval.test_flip: False -> True"),
        ("eval.test_scales=[64]", "eval.test_scales: () -> (64,)"),
        ("eval.predict_with=roi", "eval.predict_with: auto -> roi"),
        ("eval.max_detections=7", "eval.max_detections: 100 -> 7"),
        ("eval.score_threshold=0.1", "eval.score_threshold: 0.0 -> 0.1"),
        ("eval.nms.kind=soft", "eval.nms.kind: none -> soft"),
        ("data.test_short_side=64", "data.test_short_side: 800 -> 64"),
        ("data.antialias=false", "data.antialias: True -> False"),
        ("model.roi.nms_iou=0.4", "model.roi.nms_iou: 0.5 -> 0.4"),
    ],
)
def test_settings_that_figures_depend_on_are_said(override, difference):
    [note] = evaluate.changed_settings(Config(), apply_overrides(Config(), [override]))
    assert note.startswith("not as in the training: ") and difference in note


def test_settings_of_the_training_alone_are_not_said():
    words = ["model.backbone.activation_checkpointing=true", "model.deformable_attention=torch", "model.roi.max_rois=9"]
    assert evaluate.changed_settings(Config(), apply_overrides(Config(), words)) == []


def test_a_dataset_that_is_no_longer_divided_is_said_to_be_measured_as_a_whole():
    stored = apply_overrides(Config(), ["data=here", "data.val_fraction=0.2"])
    moved = apply_overrides(stored, ["data=there"])
    [note] = evaluate.trained_on(stored, moved, 20)
    assert note.startswith("all 20 images of data=there are measured") and note.endswith("add data.val_fraction=0.2")
    assert evaluate.trained_on(stored, apply_overrides(moved, ["data.val_fraction=0.2"]), 20) == []
    assert evaluate.trained_on(Config(), moved, 20) == []


@pytest.mark.parametrize(
    ("settings", "head", "said"),
    [
        (
            {"nms": SoftNMS()},
            "roi",
            "eval.nms.kind=soft: has no effect on head roi, which suppresses by model.roi",
        ),
        ({"nms": HardNMS()}, "atss", "eval.nms.kind=hard: has no effect on head atss"),
        ({"nms": SoftNMS(), "test_flip": True}, "roi", "eval.nms.kind=soft"),
        ({"nms": HardNMS(), "test_flip": True}, "roi", ""),  # joins the boxes of both views
        ({"nms": SoftNMS()}, "decoder", ""),
        ({"nms": SoftNMS()}, "ensemble", ""),  # in which the decoder has a part
        ({}, "roi", ""),
    ],
)
def test_a_suppression_that_the_head_does_not_use_is_said(settings, head, said):
    model = SimpleNamespace(predict_with=head, heads=("decoder", "roi", "atss"), overlapping=("decoder",))
    note = setup.unused_nms(model, Config(eval=EvalConfig(**settings)))
    assert note.startswith(said) and bool(note) == bool(said)


class StoredDataset(SimpleNamespace):
    """As much of a dataset as an evaluation asks for."""

    def fingerprint(self):
        return "these images"


@pytest.mark.parametrize(("validated_on", "known"), [("these images", True), ("others", False), (None, False)])
@pytest.mark.parametrize("calibrate", [True, False])
def test_scores_are_mapped_and_their_errors_measured_with_what_the_weights_hold(
    monkeypatch, tmp_path, validated_on, known, calibrate
):
    """Each head has its map; errors are held out only where the map was fitted on these images."""
    maps = {"decoder": object(), "roi": object()}
    model = SimpleNamespace(predict_with="roi", heads=("decoder", "roi"), overlapping=("decoder",), to=lambda _: None)
    weights = SimpleNamespace(classes=["a"], category_ids=[1], extra={"validated_on": validated_on}, config={})
    config = Config(eval=EvalConfig(calibrate=calibrate))
    summary = SimpleNamespace(folds={"decoder": ["of the decoder"], "roi": ["of roi"]}, reliability=None, notes=[])
    asked, assessed = {}, []

    def score(*arguments, **options):
        asked.update(options, head=arguments[7])
        return summary, []

    dataset = StoredDataset(
        ground_truth=dict, masks=False, report={"images_listed": 3}, json_path=tmp_path / "val.json"
    )
    monkeypatch.setattr(setup, "restore", lambda *_: (model, weights, config, tmp_path / "w.safetensors"))
    monkeypatch.setattr(setup, "stored_calibrations", lambda *_: maps)
    for name, value in {
        "score": score,
        "assess": lambda folds, calibration, same: assessed.append((folds, calibration, same)),
        "open_val_set": lambda *_: dataset,
        "require_same_categories": lambda *_: None,
        "val_loader": lambda *_: SimpleNamespace(close=lambda: None),
        "GroundTruth": SimpleNamespace(from_dataset=lambda *_: None),
        "dataset_notes": lambda _: [],
        "write_evaluation": lambda *_, **__: None,
    }.items():
        monkeypatch.setattr(evaluate, name, value)
    monkeypatch.setattr(evaluate.configuration, "from_dict", lambda *_: config)
    evaluate.evaluate(tmp_path, [], tmp_path / "out")
    assert asked["calibrations"] is (maps if calibrate else None) and asked["head"] == "roi"
    assert assessed == [(["of roi"], maps["roi"] if calibrate else None, known)]
