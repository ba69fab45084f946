"""The exported graphs of heads that suppress: the same detections as in torch, for any number and size of images."""

import copy
from dataclasses import replace

import pytest
import torch
from support import SMALL_BACKBONE

from brs_detr.export.graphs import DetectorGraph, ExportError, require_exportable
from brs_detr.export.onnx import DESCRIPTION, OUTPUTS, description, soft_nms_of, write_onnx
from brs_detr.export.parity import ExportedDetector, compare
from brs_detr.models.build import build_model
from brs_detr.models.config import HardNMS, NoNMS, SoftNMS
from brs_detr.models.detector import without_overlaps
from brs_detr.models.one_stage_config import PAAConfig, SOLOv2Config, YOLACTConfig
from brs_detr.models.rcnn_config import CascadeRCNNConfig, MaskRCNNConfig
from brs_detr.ops.images import ImageBatch


def batch(*sizes):
    """Noise of these (height, width), padded to one tensor."""
    return ImageBatch.from_list([torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes])


def with_head(detector, head):
    model = copy.deepcopy(detector)
    model.predict_with = head
    return model


def suppressing(detector, iou=0.5):
    """With the suppression of the decoder's detections."""
    model = copy.deepcopy(detector)
    model.nms = HardNMS(iou=iou)
    with torch.no_grad():
        for head in model.decoder.regressors:  # larger boxes, which overlap
            head[-1].bias[2:] += 3
    return model


def expect_the_same(model, images):
    """The graph, in torch, against the detector."""
    with torch.no_grad():
        boxes, scores, labels = DetectorGraph(model)(images.pixels, torch.tensor(images.sizes))[:3]
        expected = model(images)
    for row, one in enumerate(expected):
        count = len(one["scores"])
        assert 0 < count == (scores[row] >= 0).sum() and (scores[row, count:] == -1).all()
        assert not boxes[row, count:].any() and not labels[row, count:].any()
        torch.testing.assert_close(boxes[row, :count], one["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(scores[row, :count], one["scores"], rtol=0, atol=1e-5)
        assert torch.equal(labels[row, :count], one["labels"])
    return expected


def test_the_graph_of_the_decoder_leaves_soft_nms_out_and_says_so(detector):
    model, images = suppressing(detector), batch((96, 130))
    sizes = torch.tensor(images.sizes)
    with torch.no_grad():
        model.nms = NoNMS()
        plain = DetectorGraph(model)(images.pixels, sizes)
        assert soft_nms_of(model) is None and description(model) == DESCRIPTION
        model.nms = SoftNMS(iou=0.7, min_score=0.02)
        assert all(map(torch.equal, DetectorGraph(model)(images.pixels, sizes), plain))
    assert soft_nms_of(model) == {"iou": 0.7, "min_score": 0.02}
    assert "overlaps a better\none by 0.7 or more" in description(model) and "below a score of 0.02" in description(
        model
    )
    assert soft_nms_of(with_head(model, "roi")) is None  # it suppresses in its own way, which its graph does too


@pytest.mark.parametrize("head", ["decoder", "roi", "atss"])
def test_the_graph_lays_images_on_their_canvas(detector, head):
    """Whatever the padding holds, it is gray, and for the detector a part of the image."""
    model, images = with_head(detector, head), batch((96, 130), (80, 128))
    gray = images.pixels.masked_fill(images.padding_mask()[:, None], 114)
    whole = replace(images, pixels=gray, sizes=[(96, 130)] * 2, original_sizes=[(96, 130)] * 2)
    with torch.no_grad():
        expected = model(whole)
        model.test_canvas = 130  # only whether there is one matters to the graph
        graph = DetectorGraph(model)
        boxes, scores, labels = graph(images.pixels, torch.tensor(images.sizes))[:3]
        if head == "atss":  # those of the others also need what their second stage looks at
            found = dict(zip(OUTPUTS, (boxes, scores, labels), strict=True))
            assert compare(model, lambda _: found, images).small
    for row, one in enumerate(expected):
        count = len(one["scores"])
        assert 0 < count == (scores[row] >= 0).sum()
        torch.testing.assert_close(boxes[row, :count], one["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(scores[row, :count], one["scores"], rtol=0, atol=1e-5)
        assert torch.equal(labels[row, :count], one["labels"])


@pytest.mark.parametrize("head", ["roi", "atss"])
def test_the_graph_of_an_auxiliary_head_finds_what_the_head_finds(detector, head):
    found = expect_the_same(with_head(detector, head), batch((96, 130), (80, 131)))
    assert all(one["scores"][0] - one["scores"][-1] > 0.1 for one in found)  # scores that mean something


def test_the_graph_begins_with_proposals_that_do_not_overlap_where_the_detector_does(detector):
    model, images = copy.deepcopy(detector), batch((96, 130), (80, 131))
    before = expect_the_same(model, images)
    with torch.no_grad():
        model.proposals.regressor[-1].bias[2:] += 1  # larger proposals, which overlap
    model.proposals.nms_iou = 0.3
    after = expect_the_same(model, images)
    assert not torch.equal(before[0]["boxes"], after[0]["boxes"])


@pytest.mark.parametrize("name", ["atss", "retinanet", "foveabox", "faster_rcnn"])
def test_the_graph_of_a_cnn_detector_finds_what_it_finds(build_cnn, name):
    expect_the_same(build_cnn(name), batch((96, 130), (64, 131)))


def test_the_graph_suppresses_the_decoders_detections_where_the_detector_does(detector):
    model, images = suppressing(detector), batch((96, 130), (80, 131))
    found = expect_the_same(model, images)
    assert any(len(one["scores"]) < model.detections_per_image for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["roi", "atss"])
def test_onnxruntime_finds_what_an_auxiliary_head_finds(detector, tmp_path, head):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model, path = with_head(detector, head), tmp_path / "model.onnx"
    write_onnx(model, path, (150, 210), any_size=True)
    exported = ExportedDetector(path)
    assert [output.name for output in exported.session.get_outputs()][:3] == ["boxes", "scores", "labels"]
    for sizes in [(150, 210)], [(96, 131), (70, 131), (96, 99)], [(65, 300), (66, 40)]:
        found = compare(model, exported, batch(*sizes))
        # where much of the input is padding, which dense heads see too, rounding is a hundred times as large
        limits = (1e-3, 1e-5) if len(sizes) == 1 else (0.02, 5e-4)
        assert found.boxes < limits[0] and found.scores < limits[1], (sizes, found)
    other = copy.deepcopy(model)
    with torch.no_grad():
        getattr(other, head).delta.bias.add_(0.3)
    assert not compare(other, exported, batch((96, 131))).small


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atss", "retinanet", "foveabox", "faster_rcnn"])
def test_onnxruntime_finds_what_a_cnn_detector_finds(build_cnn, tmp_path, name):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model, path = build_cnn(name), tmp_path / "model.onnx"
    write_onnx(model, path, (150, 210), any_size=True)
    for sizes in [(150, 210)], [(96, 131), (70, 131)], [(65, 300), (66, 40)]:
        found = compare(model, ExportedDetector(path), batch(*sizes))
        assert found.small, (sizes, found)


@pytest.mark.slow
def test_onnxruntime_suppresses_the_decoders_detections(detector, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model, path = suppressing(detector), tmp_path / "model.onnx"
    write_onnx(model, path, (96, 131))
    exported, images = ExportedDetector(path), batch((96, 131), (70, 131), (96, 99))
    assert compare(model, exported, images).small and (exported(images)["scores"] < 0).any()
    assert not compare(suppressing(detector, iou=0.9), exported, images).small


def test_the_graph_of_co_dino_finds_what_it_finds(dino):
    """Without suppression its 20 best pairs, with it what stays of one pair a query."""
    images = batch((96, 130), (80, 131))
    counts = [len(one["scores"]) for one in expect_the_same(dino, images)]
    assert counts == [dino.detections_per_image] * 2
    found = expect_the_same(suppressing(dino, iou=0.2), images)
    assert any(len(one["scores"]) < 12 for one in found) and all(len(one["scores"]) <= 12 for one in found)
    for head in ("roi", "atss"):
        expect_the_same(with_head(dino, head), images)


def test_soft_nms_of_what_the_graph_of_co_dino_finds_is_what_it_finds(dino):
    """As many pairs as queries leave the graph; what is left to do with them is as described."""
    model, images = suppressing(dino), batch((96, 130), (80, 131))
    model.nms = SoftNMS(iou=0.2)
    with torch.no_grad():
        columns = DetectorGraph(model)(images.pixels, torch.tensor(images.sizes))[:3]
        expected = model(images)
    assert all(column.shape[1] == 12 for column in columns) and "overlaps a better\none by 0.2" in description(model)
    candidates = [dict(zip(OUTPUTS, one, strict=True)) for one in zip(*columns, strict=True)]
    found = without_overlaps(candidates, images.sizes, model.nms, model.detections_per_image)
    for ours, theirs, before in zip(found, expected, candidates, strict=True):
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=0, atol=1e-5)
        assert (ours["scores"].sum() - before["scores"].sum()).abs() > 1e-3  # some were lowered


@pytest.mark.slow
@pytest.mark.parametrize("dino", ["encoder"], indirect=True)
def test_onnxruntime_finds_what_co_dino_finds(dino, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model, path = copy.deepcopy(dino), tmp_path / "model.onnx"
    model.nms = SoftNMS(iou=0.2)  # the graph of a detector without suppression, and of as many pairs as queries
    write_onnx(model, path, (96, 131), any_size=True)
    exported = ExportedDetector(path)
    for sizes in [(96, 131)], [(96, 131), (70, 131), (96, 99)]:
        found = compare(model, exported, batch(*sizes))
        assert found.small, (sizes, found)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.decoder.norm.bias.add_(0.3)
    assert not compare(other, exported, batch((96, 131))).small
    with torch.no_grad():  # the class of few tokens' best score
        model.proposals.classifier.bias[2] += 1.5
    assert not compare(model, exported, batch((96, 131))).small


def test_an_ensemble_is_refused_with_the_heads_that_can_be_exported(detector):
    with pytest.raises(
        ExportError, match=r"eval\.predict_with=ensemble: one head .* to auto, the best .* one of decoder, roi, atss\."
    ):
        require_exportable(with_head(detector, "ensemble"))


@pytest.mark.parametrize("config", [PAAConfig(), CascadeRCNNConfig(), MaskRCNNConfig(), YOLACTConfig(), SOLOv2Config()])
def test_detectors_with_masks_votes_or_cascades_are_refused(config):
    model = build_model(replace(config, backbone=replace(SMALL_BACKBONE, levels=config.backbone.levels)), 3)
    with pytest.raises(ExportError, match="masks, score voting and cascades have no graph"):
        DetectorGraph(model)
