"""Half precision and 8 bits for an exported graph: layers with weights are narrowed, coordinates and scores are not.

What stays float32, whatever the precision:
- the layers that scores, boxes and sampling points come from (`KEPT_LAYERS`), which are small and rank everything;
- everything between them and the outputs: anchors, boxes, sigmoids, sorting, suppression, RoIAlign;
- normalization, softmax, sums, the sampling of deformable attention, and products without weights.

So float16 follows the rule of torch's autocast: convolutions and products with weights are narrow, cheap operations are
as wide as their widest input, and the rest is float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brs_detr.export.graphs import ExportError

LAYERS = ("Conv", "Gemm", "MatMul")
KEPT_LAYERS = frozenset(
    ("score", "delta", "classifier", "classifiers", "regressor", "regressors", "sampling_offsets", "attention_weights")
)
"""Parts of the names of layers that stay float32: of the heads, and of attention what it samples."""
FOLLOWING = frozenset(
    (
        *(
            "Relu",
            "LeakyRelu",
            "Sigmoid",
            "HardSigmoid",
            "HardSwish",
            "Gelu",
            "Erf",
            "Tanh",
            "Add",
            "Sub",
            "Mul",
            "Div",
        ),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Clip", "Where", "Pad", "Identity", "Flatten"),
        *("Reshape", "Transpose", "Concat", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Gather", "Tile"),
    )
)
"""Operations that are float16 where all their inputs are."""
ANY_WIDTH = ("Shape", "Size", "Cast")  # take either and return neither
MAX_HALF = 65504.0
_WIDTHS = {"fp16": "in float16", "int8": "in 8 bits"}


def describe_precision(model: Any, precision: str) -> None:
    """Say the precision in the description and in the metadata of an `onnx.ModelProto`."""
    if precision in _WIDTHS:
        model.doc_string += (
            f"\nLayers with weights compute {_WIDTHS[precision]}, except those that scores, boxes and sampling points "
            "come from; inputs and outputs are float32 as always."
        )
    for entry in model.metadata_props:
        if entry.key == "precision":
            entry.value = json.dumps(precision)


def layer_names(graph: Any) -> dict[str, str]:
    """Return for every convolution and product with weights, by its node's name, the layer it is in torch.

    A product's weight has been transposed and has lost its name: that of the bias which is added next says it. A layer
    without either has the name of its node.
    """
    weights = {tensor.name for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    layers = {}
    for node in graph.node:
        if node.op_type not in LAYERS or not any(name in weights for name in node.input[:2]):
            continue
        adds = [other for other in readers.get(node.output[0], []) if other.op_type == "Add"]
        names = [*node.input[1:], *(name for other in adds for name in other.input)]
        layers[node.name] = next((name for name in names if name in weights and "." in name), node.name)
    return layers


def kept_layers(graph: Any) -> set[str]:
    """Return the names of the nodes that are layers with weights and stay float32."""
    return {node for node, layer in layer_names(graph).items() if KEPT_LAYERS & set(layer.split("."))}


def float16(model: Any, also_kept: Iterable[str] = ()) -> Any:
    """Return a copy of a float32 graph with layers, and what lies between them, in float16.

    Args:
        model: the `onnx.ModelProto`; inputs and outputs keep their types.
        also_kept: names of values inside the graph that stay float32 too.

    Raises:
        ExportError: a weight is beyond the range of float16.
    """
    import onnx

    result = onnx.shape_inference.infer_shapes(model)
    graph = result.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    floats = _float_values(graph)
    kept = {value.name for value in graph.output} | set(also_kept)
    half_nodes, half_values = _choose_half(graph, floats, tensors, kept)
    used: dict[str, Any] = {}
    nodes: list[Any] = []
    for index, node in enumerate(graph.node):
        wanted = index in half_nodes
        for position, name in enumerate(node.input):
            if name not in floats or (name in half_values) == wanted or node.op_type in ANY_WIDTH:
                continue
            narrow = f"{name}.{'float16' if wanted else 'float32'}"
            if narrow not in used:
                used[narrow] = True
                if name in tensors:
                    graph.initializer.append(_narrowed(tensors[name], narrow))
                else:
                    to = onnx.TensorProto.FLOAT16 if wanted else onnx.TensorProto.FLOAT
                    nodes.append(onnx.helper.make_node("Cast", [name], [narrow], name=f"cast.{narrow}", to=to))
            node.input[position] = narrow
        nodes.append(node)
    nodes = [_copy(node) for node in nodes]
    del graph.node[:], graph.value_info[:]  # those of the values that are float16 now are wrong
    graph.node.extend(nodes)
    read = {name for node in graph.node for name in node.input}
    unused = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in unused:
        graph.initializer.remove(tensor)
    return result


def _copy(node: Any) -> Any:
    copied = type(node)()
    copied.CopyFrom(node)
    return copied


def _float_values(graph: Any) -> set[str]:
    """Return the names of all values that are float32."""
    import onnx

    wanted = onnx.TensorProto.FLOAT
    values = [*graph.input, *graph.value_info, *graph.output]
    names = {value.name for value in values if value.type.tensor_type.elem_type == wanted}
    return names | {tensor.name for tensor in graph.initializer if tensor.data_type == wanted}


def _choose_half(graph: Any, floats: set[str], tensors: Mapping[str, Any], kept: set[str]) -> tuple[set[int], set[str]]:
    """Return the indices of the nodes that compute in float16, and the names of the values that they write."""
    layers, excluded = layer_names(graph), kept_layers(graph)
    nodes: set[int] = set()
    values: set[str] = set()
    for index, node in enumerate(graph.node):
        inputs = [name for name in node.input if name in floats]
        computed = [name for name in inputs if name not in tensors]
        if node.name in layers:
            narrow = node.name not in excluded
        else:
            narrow = node.op_type in FOLLOWING and bool(computed) and all(name in values for name in computed)
            narrow = narrow and all(_fits(tensors[name]) for name in inputs if name in tensors)
        if narrow and not kept & set(node.output):
            nodes.add(index)
            values |= floats & set(node.output)
    return nodes, values


def _fits(tensor: Any) -> bool:
    """Check that the finite numbers of a tensor are in the range of float16."""
    array = _array(tensor)
    finite = array[np.isfinite(array)]
    return finite.size == 0 or bool(np.abs(finite).max() <= MAX_HALF)


def _array(tensor: Any) -> NDArray[Any]:
    import onnx

    return np.asarray(onnx.numpy_helper.to_array(tensor))


def _narrowed(tensor: Any, name: str) -> Any:
    """Return a weight in float16."""
    import onnx

    if not _fits(tensor):
        raise ExportError(f"--precision=fp16: {tensor.name} has numbers above {MAX_HALF:g}. Export it as fp32.")
    return onnx.numpy_helper.from_array(_array(tensor).astype(np.float16), name)


def write_float16(source: Path, target: Path, also_kept: Iterable[str] = ()) -> None:
    """Write a float32 file of `write_onnx` with layers in float16; `also_kept` and errors as for `float16`."""
    import onnx

    result = float16(onnx.load(source), also_kept)
    describe_precision(result, "fp16")
    onnx.save(result, target)


def write_int8(source: Path, target: Path, batches: Iterable[Mapping[str, NDArray[Any]]]) -> None:
    """Write a float32 file with layers in 8 bits: one scale for each output channel of a weight, one for an activation.

    Args:
        source: float32 file of `write_onnx`.
        target: file to write, with QuantizeLinear and DequantizeLinear around the layers (QDQ).
        batches: inputs of the graph, on which the ranges of its activations are measured.

    Raises:
        ExportError: onnxruntime cannot quantize the file.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest: Iterator[Mapping[str, NDArray[Any]]] = iter(batches)

        def get_next(self) -> Any:
            return next(self.rest, None)

    original = onnx.load(source)
    layers, kept = layer_names(original.graph), kept_layers(original.graph)
    try:
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_quantize=sorted(set(layers) - kept),
            # TensorRT has no zero points
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
    except Exception as error:  # it raises whatever its parts raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"--precision=int8: onnxruntime cannot quantize this graph ({reason}). Use fp16.") from error
    result = onnx.load(target)
    del result.metadata_props[:]
    result.metadata_props.extend(original.metadata_props)
    result.doc_string = original.doc_string
    describe_precision(result, "int8")
    onnx.save(result, target)
