"""benchmarks/other_libraries.py: detectors of other libraries get what ours get; a training of one second runs."""

import json
import sys

import pytest
import torch

from brs_detr.config import load_config
from brs_detr.ops.images import ImageBatch


@pytest.fixture(scope="module")
def other(benchmark_module):
    return benchmark_module("other_libraries")


@pytest.mark.parametrize("recipe", ["demo", "bccd_cpu", "nuclei_cpu"])
def test_proposals_and_detections_are_those_of_the_recipe(other, recipe):
    model = load_config(recipe).model
    detector = other.build_detector("torchvision_faster_rcnn", load_config(recipe), num_classes=3).detector
    rpn = detector.rpn
    assert rpn._post_nms_top_n == {"training": model.rpn.proposals, "testing": model.rpn.test_proposals}
    assert rpn._pre_nms_top_n == {
        "training": model.rpn.proposals_before_nms,
        "testing": model.rpn.test_proposals_before_nms,
    }
    assert detector.roi_heads.detections_per_img == model.detections_per_image
    assert detector.roi_heads.box_predictor.cls_score.out_features == 3 + 1  # its background


@pytest.mark.parametrize("name", ["torchvision_faster_rcnn", "torchvision_retinanet"])
def test_labels_and_boxes_are_those_of_this_project(other, name):
    """Classes from 0, boxes in pixels of the stored image, in training and in detection."""
    torch.manual_seed(0)
    detector = other.build_detector(name, load_config("demo"), num_classes=2)
    images = ImageBatch(
        torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8), sizes=[(64, 48)], original_sizes=[(128, 96)]
    )
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = detector(images, [target])
    assert all(loss.isfinite() for loss in losses.values())
    (found,) = detector.eval()(images)
    assert len(found["boxes"]) > 0 and set(found["labels"].tolist()) <= {0, 1}
    assert found["boxes"][:, 2].max() <= 96 and found["boxes"][:, 3].max() > 64


def test_changes_of_the_recipe_name_the_variant(other):
    assert other.variant_of("half", []) == "half"
    assert other.variant_of("recipe", ["model.rpn.proposals=60", "optim.lr=1e-3"]) == "recipe,proposals60,lr1e-3"
    # the name of the setting and all of its value: other settings are another variant
    assert other.variant_of("recipe", ["optim.lr=0.001"]) == "recipe,lr0.001"
    assert other.variant_of("recipe", ["optim.weight_decay=0.001"]) == "recipe,weight_decay0.001"
    with pytest.raises(SystemExit, match="is not one word"):
        other.variant_of("half", ["model.backbone.levels=[4, 8]"])


def test_a_result_of_other_seconds_is_refused(other, tmp_path, monkeypatch):
    out = tmp_path / "study.json"
    out.write_text(json.dumps({"demo torchvision_faster_rcnn score recipe 0": {"cpu_seconds": 380, "settings": []}}))
    words = ["demo=x", "--detectors", "torchvision_faster_rcnn", "--seeds", "0", "--out", str(out), "--seconds"]
    monkeypatch.setattr(sys, "argv", ["other_libraries.py", *words, "380"])
    other.main()  # known already: nothing to do
    monkeypatch.setattr(sys, "argv", ["other_libraries.py", *words, "200"])
    with pytest.raises(SystemExit, match="is of 380 seconds, not 200"):
        other.main()
    out.write_text(
        json.dumps({"demo torchvision_faster_rcnn score recipe,lr1 0": {"cpu_seconds": 380, "settings": ["a.lr=1"]}})
    )
    monkeypatch.setattr(sys, "argv", ["other_libraries.py", *words, "380", "--set", "b.lr=1"])
    with pytest.raises(SystemExit, match="another name"):
        other.main()
