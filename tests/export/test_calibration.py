"""Maps of scores in a graph give what they give in numpy."""

import json

import numpy as np
import pytest
import torch

from brs_detr.evaluation.calibration import Calibration, Curve, fit_isotonic, fit_platt
from brs_detr.export.graphs import CalibratedScores
from brs_detr.export.onnx import write_onnx
from brs_detr.export.parity import ExportedDetector, compare
from brs_detr.ops.images import ImageBatch


def maps(labels=3):
    """Maps with different numbers of knots, one of them shared by labels."""
    random = np.random.default_rng(0)
    scores = random.uniform(0, 0.4, 900)
    matched = random.random(900) < scores * 2
    short = Curve(np.array([0.0, 1.0]), np.array([0.1, 0.7]), "platt", 20, 10)
    curves = (fit_isotonic(scores, matched), fit_platt(scores, matched), short)
    return Calibration(curves, tuple(label % 3 for label in range(labels)), (0.2,) * labels, 10)


def test_the_operations_equal_the_map():
    calibration = maps(5)
    scores = torch.linspace(0, 1, 4000).view(2, 2000)
    labels = (torch.arange(4000) % 5).view(2, 2000)
    expected = calibration.apply(scores.flatten().numpy(), labels.flatten().numpy())
    result = CalibratedScores(calibration)(scores, labels)
    assert result.dtype == torch.float32 and result.shape == (2, 2000)
    np.testing.assert_allclose(result.flatten().numpy(), expected, rtol=0, atol=1e-6)
    no_detection = CalibratedScores(calibration)(torch.tensor([[-1.0]]), torch.tensor([[0]]))
    assert no_detection.item() == -1


@pytest.mark.slow
def test_an_exported_file_has_calibrated_scores_and_the_parity_check_sees_wrong_ones(detector, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnx

    calibration = maps(detector.num_classes)
    path = tmp_path / "model.onnx"
    metadata = {"calibration": calibration.as_dict()}
    write_onnx(detector, path, (96, 128), metadata=metadata, calibration=calibration)
    exported = ExportedDetector(path)
    images = ImageBatch.from_list([torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)])
    assert compare(detector, exported, images, calibration).small
    other = Calibration(calibration.curves[::-1], calibration.of_label, calibration.thresholds, 10)
    assert not compare(detector, exported, images, other).small
    found = exported(images)
    expected = calibration.apply(found["raw_scores"][0].numpy(), found["labels"][0].numpy())
    np.testing.assert_allclose(found["scores"][0].numpy(), expected, rtol=0, atol=1e-5)
    model = onnx.load(path)
    assert [output.name for output in model.graph.output] == ["boxes", "scores", "labels"]
    stored = {entry.key: json.loads(entry.value) for entry in model.metadata_props}["calibration"]
    assert Calibration.from_dict(stored, detector.num_classes).as_dict() == calibration.as_dict()
