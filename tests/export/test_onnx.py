"""The exported graph: what the detector finds, in onnxruntime too, for any number, size and padding of images."""

import json
from dataclasses import replace

import pytest
import timm
import torch

from brs_detr.export.graphs import DetectorGraph, ExportError
from brs_detr.export.onnx import write_onnx
from brs_detr.export.parity import ExportedDetector, compare
from brs_detr.models.backbones.deformable import DeformableConv
from brs_detr.ops.images import ImageBatch

TINY_SWIN = {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 4}

TINY_EVA = {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 56}


def batch(*sizes):
    """Noise of these (height, width), padded to one tensor."""
    return ImageBatch.from_list([torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes])


def test_the_graph_finds_what_the_detector_finds(detector):
    images = batch((96, 130), (80, 131))
    with torch.no_grad():
        boxes, scores, labels, _ = DetectorGraph(detector)(images.pixels, torch.tensor(images.sizes))
        expected = detector(images)
    assert all(one["scores"][0] - one["scores"][-1] > 0.1 for one in expected)  # scores that mean something
    for row, one in enumerate(expected):
        torch.testing.assert_close(boxes[row], one["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(scores[row], one["scores"], rtol=0, atol=1e-5)
        assert torch.equal(labels[row], one["labels"])


def test_making_the_graph_leaves_the_detector_as_it_was(detector):
    before = [module.sampling for module in detector.modules() if hasattr(module, "sampling")]
    graph = DetectorGraph(detector)
    assert [module.sampling for module in detector.modules() if hasattr(module, "sampling")] == before
    assert not {module.sampling for module in graph.modules() if hasattr(module, "sampling")} & set(before)


def test_what_lies_in_the_padding_changes_nothing(detector):
    graph, images = DetectorGraph(detector), batch((96, 130), (80, 100))
    sizes = torch.tensor(images.sizes)
    noisy = torch.where(images.padding_mask()[:, None], torch.randint(0, 256, images.pixels.shape), images.pixels)
    with torch.no_grad():
        for clean, other in zip(graph(images.pixels, sizes), graph(noisy.to(torch.uint8), sizes), strict=True):
            assert torch.equal(clean, other)


def test_the_file_has_no_grid_sample_and_says_what_it_is(exported):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(exported)
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"GridSample", "Resize", "NonMaxSuppression", "Loop", "If"}
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    shapes = {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["pixels"] == ["batch", 3, "height", "width"] and shapes["sizes"] == ["batch", 2]
    assert list(shapes) == ["pixels", "sizes", "boxes", "scores", "labels"]
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert facts == {"classes": ["a", "b", "c"], "size": None}
    assert "boxes" in model.doc_string
    assert b"brs_detr/" not in exported.read_bytes(), "paths of the machine that exported it"


@pytest.mark.parametrize("sizes", [[(150, 210)], [(96, 131), (70, 131), (96, 99)], [(65, 300), (66, 40)]])
def test_onnxruntime_finds_the_same_in_batches_of_any_number_and_size(detector, exported, sizes):
    pytest.importorskip("onnxruntime")
    found = compare(detector, ExportedDetector(exported), batch(*sizes))
    assert found.boxes < 1e-3 and found.scores < 1e-5


def test_another_detector_is_noticed(detector, build, exported):
    pytest.importorskip("onnxruntime")
    other = build()
    with torch.no_grad():
        other.decoder.regressors[-1][-1].bias.add_(0.05)
    found = compare(other, ExportedDetector(exported), batch((96, 131)))
    assert found.scores < 1e-5 and not found.small


@pytest.mark.slow
def test_a_swin_is_exported_for_one_size(build, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    onnx, create = pytest.importorskip("onnx"), timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: create(name, **settings, **TINY_SWIN))
    swin = build("swin_tiny_patch4_window7_224.ms_in1k")
    with pytest.raises(ExportError, match="--any-size"):
        write_onnx(swin, tmp_path / "swin.onnx", (75, 90), any_size=True)
    write_onnx(swin, tmp_path / "swin.onnx", (75, 90), pixels=torch.float32)
    assert "GridSample" not in {node.op_type for node in onnx.load(tmp_path / "swin.onnx").graph.node}
    images = batch((75, 60), (50, 90), (33, 41))
    found = compare(swin, ExportedDetector(tmp_path / "swin.onnx"), replace(images, pixels=images.pixels.float()))
    assert found.boxes < 1e-3 and found.scores < 1e-5


def test_an_eva_is_exported_for_one_size(build, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    onnx, create = pytest.importorskip("onnx"), timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: create(name, **{**settings, **TINY_EVA}))
    eva = build("eva02_large_patch14_448", window_size=4, global_every=2)
    with pytest.raises(ExportError, match="--any-size"):
        write_onnx(eva, tmp_path / "eva.onnx", (75, 90), any_size=True)
    write_onnx(eva, tmp_path / "eva.onnx", (75, 90), pixels=torch.float32)
    assert not {"GridSample", "Resize"} & {node.op_type for node in onnx.load(tmp_path / "eva.onnx").graph.node}
    images = batch((75, 60), (50, 90), (33, 41))
    found = compare(eva, ExportedDetector(tmp_path / "eva.onnx"), replace(images, pixels=images.pixels.float()))
    assert found.boxes < 1e-3 and found.scores < 1e-5


def test_an_old_opset_is_refused(detector, tmp_path):
    with pytest.raises(ExportError, match="--opset=17"):
        write_onnx(detector, tmp_path / "old.onnx", (96, 96), opset=17)


def deformable(build):
    """A detector with deformable convolutions that read off their grid."""
    model = build("resnet10t", deformable_stages=(3,), deformable_groups=2)
    for layer in model.modules():
        if isinstance(layer, DeformableConv):
            torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
            torch.nn.init.normal_(layer.conv_offset.bias)
    return model


def test_an_opset_without_deformable_convolutions_is_refused(build, tmp_path):
    with pytest.raises(ExportError, match=r"--opset=18: has no deformable convolutions\. Give --opset 19"):
        write_onnx(deformable(build), tmp_path / "old.onnx", (96, 96))


@pytest.mark.slow
def test_deformable_convolutions_are_the_same_in_onnxruntime(build, tmp_path):
    pytest.importorskip("onnxruntime")
    model, path = deformable(build), tmp_path / "deformable.onnx"
    write_onnx(model, path, (96, 131), opset=19)
    images = batch((96, 130), (80, 131))
    found = compare(model, ExportedDetector(path), images)
    assert found.small, found
