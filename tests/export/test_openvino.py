"""OpenVINO reads the exported file as it is, and finds the same."""

import numpy as np
import pytest
import torch

from brs_detr.export.onnx import PROPOSALS
from brs_detr.export.parity import ExportedDetector, compare
from brs_detr.ops.images import ImageBatch

pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")


def batch(*sizes):
    return ImageBatch.from_list([torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes])


class InOpenVINO:
    """A file on OpenVINO's CPU device, its proposals an output too, called as `ExportedDetector` is."""

    def __init__(self, path, tmp_path):
        import onnx
        import openvino

        model = onnx.load(path)
        model.graph.output.add().CopyFrom(onnx.ValueInfoProto(name=PROPOSALS))
        onnx.save(model, tmp_path / "with_proposals.onnx")
        self.network = openvino.Core().compile_model(
            tmp_path / "with_proposals.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )

    def __call__(self, images):
        found = self.network({"pixels": images.pixels.numpy(), "sizes": np.array(images.sizes, np.int64)})
        names = ("boxes", "scores", "labels", PROPOSALS)
        return {name: torch.from_numpy(np.array(found[name])) for name in names}


def test_openvino_reads_a_file_of_any_size_unchanged(detector, exported, tmp_path):
    import openvino

    network = openvino.Core().read_model(exported)
    assert [value.any_name for value in network.outputs] == ["boxes", "scores", "labels"]
    in_openvino = InOpenVINO(exported, tmp_path)
    for sizes in [(150, 210)], [(96, 131), (70, 131), (96, 99)]:
        found = compare(detector, in_openvino, batch(*sizes))
        print(f"OpenVINO against torch, {sizes}: {found}")
        assert found.boxes < 1e-3 and found.scores < 1e-5


def test_openvino_and_onnxruntime_find_the_same(exported, tmp_path):
    pytest.importorskip("onnxruntime")
    images = batch((150, 210))
    ours, theirs = ExportedDetector(exported)(images), InOpenVINO(exported, tmp_path)(images)
    for name in ("boxes", "scores"):
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-3)
    assert torch.equal(theirs["labels"], ours["labels"])
