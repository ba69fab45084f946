"""Narrowed graphs: which layers are narrow, what stays float32, and that the detections remain."""

import json

import numpy as np
import pytest
import torch

from brs_detr.export.graphs import ExportError
from brs_detr.export.parity import ExportedDetector, compare, match_best
from brs_detr.ops.images import ImageBatch

onnx = pytest.importorskip("onnx")
precision = pytest.importorskip("brs_detr.export.precision")
helper, numpy_helper = onnx.helper, onnx.numpy_helper


def batch(*sizes):
    """Noise of these (height, width), padded to one tensor."""
    generator = torch.Generator().manual_seed(5)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    return ImageBatch.from_list(images)


def graph_of(nodes, weights, inputs=("x",), outputs=("y",)):
    """A float32 model of (operation, inputs, output) triples, with weights by name; all sides are free."""
    made = [
        helper.make_node(kind, list(read), [written], name=f"node_{written}", **(rest[0] if rest else {}))
        for kind, read, written, *rest in nodes
    ]
    values = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 2]) for name in names]
        for names in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()]
    model = helper.make_model(
        helper.make_graph(made, "g", *values, tensors), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10  # onnxruntime lags behind
    return model


def run(model, x):
    session = pytest.importorskip("onnxruntime").InferenceSession(model.SerializeToString())
    return session.run(None, {"x": np.asarray(x, np.float32)})[0]


TWO = np.eye(2) * 2


def kinds(model):
    """(operation, name) of every node."""
    return [(node.op_type, node.name) for node in model.graph.node]


def test_a_layer_is_float16_and_so_is_what_lies_between_two_of_them():
    nodes = [("MatMul", ("x", "a"), "p"), ("Relu", ("p",), "q"), ("MatMul", ("q", "b"), "r"), ("Softmax", ("r",), "y")]
    narrowed = precision.float16(graph_of(nodes, {"a": TWO, "b": TWO}))
    casts = [list(node.input) for node in narrowed.graph.node if node.op_type == "Cast"]
    assert casts == [["x"], ["r"]]  # in front of the first layer, and of what is always float32
    assert {tensor.data_type for tensor in narrowed.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert run(narrowed, [[1, 2]]) == pytest.approx(run(graph_of(nodes, {"a": TWO, "b": TWO}), [[1, 2]]), abs=1e-3)


def test_what_has_a_float32_input_is_float32():
    """Coordinates: a shift in float16 is added to a reference in float32."""
    nodes = [("MatMul", ("x", "a"), "shift"), ("Add", ("shift", "x"), "y")]
    narrowed = precision.float16(graph_of(nodes, {"a": np.eye(2)}))
    assert [(node.op_type, list(node.input)) for node in narrowed.graph.node][1:] == [
        ("MatMul", ["x.float16", "a.float16"]),
        ("Cast", ["shift"]),
        ("Add", ["shift.float32", "x"]),
    ]


@pytest.mark.parametrize("name", ["head.score.bias", "decoder.regressors.0.4.bias", "attention.sampling_offsets.bias"])
def test_layers_that_scores_boxes_and_points_come_from_stay_float32(name):
    nodes = [("MatMul", ("x", "a"), "p"), ("Add", ("p", name), "y")]
    model = graph_of(nodes, {"a": TWO, name: np.zeros(2)})
    assert precision.layer_names(model.graph) == {"node_p": name} and precision.kept_layers(model.graph) == {"node_p"}
    assert kinds(precision.float16(model)) == kinds(model)
    other = graph_of([*nodes[:1], ("Add", ("p", "ffn.scorer.bias"), "y")], {"a": TWO, "ffn.scorer.bias": np.zeros(2)})
    assert precision.kept_layers(other.graph) == set()


def test_a_constant_beyond_float16_keeps_its_operation_in_float32():
    nodes = [("MatMul", ("x", "a"), "p"), ("Clip", ("p", "low", "high"), "q"), ("Relu", ("q",), "y")]
    narrowed = precision.float16(graph_of(nodes, {"a": TWO, "low": -1e9, "high": 1e9}))
    assert run(narrowed, [[3, 4]]).tolist() == [[6, 8]]
    assert {t.name: t.data_type for t in narrowed.graph.initializer}["low"] == onnx.TensorProto.FLOAT


def test_a_weight_beyond_float16_is_a_refusal():
    with pytest.raises(ExportError, match="a has numbers above 65504"):
        precision.float16(graph_of([("MatMul", ("x", "a"), "p"), ("Relu", ("p",), "y")], {"a": TWO * 1e6}))


def test_values_that_parity_reads_stay_float32():
    nodes = [("MatMul", ("x", "a"), "p"), ("Relu", ("p",), "raw"), ("Relu", ("raw",), "y")]
    narrowed = precision.float16(graph_of(nodes, {"a": TWO}), ["raw"])
    (cast,) = [node for node in narrowed.graph.node if node.op_type == "Cast" and node.input[0] == "p"]
    assert cast.attribute[0].i == onnx.TensorProto.FLOAT


def narrowed_file(exported, path, kind, images):
    if kind == "fp16":
        precision.write_float16(exported, path, ["proposals", "raw_scores"])
    else:
        inputs = [{"pixels": one.pixels.numpy(), "sizes": np.array(one.sizes, np.int64)} for one in images]
        precision.write_int8(exported, path, inputs)
    return onnx.load(path)


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_a_narrowed_detector_finds_what_it_found(exported, tmp_path, kind):
    pytest.importorskip("onnxruntime")
    images = [batch((150, 210)), batch((96, 131), (70, 131))]
    model, original = narrowed_file(exported, tmp_path / "narrow.onnx", kind, images), onnx.load(exported)
    assert (tmp_path / "narrow.onnx").stat().st_size < 0.7 * exported.stat().st_size
    outputs = [[(v.name, v.type.tensor_type.elem_type) for v in m.graph.output] for m in (original, model)]
    assert outputs[0] == outputs[1]
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert facts == {"classes": ["a", "b", "c"], "size": None}
    said = {"fp16": "compute in float16", "int8": "compute in 8 bits"}[kind]
    assert original.doc_string in model.doc_string and said in model.doc_string
    before, after = ExportedDetector(exported), ExportedDetector(tmp_path / "narrow.onnx")
    for one in images:
        match = match_best(before(one), after(one), 10)
        print(kind, match)
        # random weights, spread out until scores differ, magnify rounding as trained ones do not
        least = {"fp16": 0.8, "int8": 0.5}[kind]
        assert match.total == 10 * len(one) and match.matched >= least * match.total and match.scores > 0


def test_layers_that_are_kept_are_not_quantized(exported, tmp_path):
    pytest.importorskip("onnxruntime")
    model, original = narrowed_file(exported, tmp_path / "int8.onnx", "int8", [batch((96, 131))]), onnx.load(exported)
    kept = precision.kept_layers(original.graph)
    assert len(kept) >= 5
    written = {name: node.op_type for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.name in precision.layer_names(original.graph):
            quantized = written.get(node.input[0]) == "DequantizeLinear"
            assert quantized == (node.name not in kept), node.name
    zero_points = [t for t in model.graph.initializer if t.name.endswith("zero_point")]
    assert zero_points and not any(numpy_helper.to_array(t).any() for t in zero_points)  # TensorRT has none


def test_a_narrowed_file_is_not_taken_for_the_exact_one(detector, exported, tmp_path):
    pytest.importorskip("onnxruntime")
    images = batch((96, 131))
    narrowed_file(exported, tmp_path / "int8.onnx", "int8", [images])
    assert not compare(detector, ExportedDetector(tmp_path / "int8.onnx"), images).small


def detections(boxes, scores, labels):
    count = len(scores)
    values = torch.tensor(boxes).view(1, count, 4), torch.tensor([scores]), torch.tensor([labels])
    return dict(zip(("boxes", "scores", "labels"), values, strict=True))


def test_detections_are_matched_by_label_and_overlap():
    exact = detections([[0.0, 0, 10, 10], [20.0, 0, 30, 10], [0.0, 0, 0, 0]], [0.9, 0.5, -1.0], [0, 1, 0])
    found = detections([[20.0, 0, 30, 10], [0.0, 0, 10, 11], [20.0, 0, 30, 10]], [0.6, 0.8, 0.4], [0, 0, 1])
    match = match_best(exact, found, 5)
    assert match[:3] == (2, 2, 1.0) and match.scores == pytest.approx(0.1)
    assert match_best(exact, detections([[0.0, 0, 10, 10]], [-1.0], [0]), 5)[:2] == (2, 0)
    assert match_best(exact, found, 1)[:3] == (1, 1, 1.0)
