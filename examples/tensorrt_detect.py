"""Build a TensorRT engine from an exported detector and find objects with it: needs an NVIDIA GPU, tensorrt and torch.

`python -m brs_detr export RUN --height 800 --width 1333 --pixels float32 --out model.onnx`, then
`python examples/tensorrt_detect.py model.onnx image.jpg [--engine model.engine] [--max-batch 4]`

Types are those of the file (`export --precision fp16|int8`): the network is strongly typed. An engine belongs to the
GPU and the TensorRT it was built with. This script has never been run: there was no GPU where it was written.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from onnx_detect import as_input, show, to_image
from PIL import Image


def require_gpu() -> tuple:
    """The modules tensorrt and torch, or one sentence and exit code 2."""
    try:
        import tensorrt
        import torch
    except ImportError as error:
        sys.exit(refusal(f"{error.name} is not installed. Run `pip install tensorrt torch` on a machine with a GPU."))
    if not torch.cuda.is_available():
        sys.exit(refusal("there is no CUDA device. Use examples/onnx_detect.py, which runs on a CPU."))
    return tensorrt, torch


def refusal(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def read_metadata(path: Path) -> dict:
    """The metadata of the ONNX file."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    return {entry.key: json.loads(entry.value) for entry in model.metadata_props}


def build(trt, path: Path, metadata: dict, max_batch: int, workspace_gb: float) -> bytes:
    """A serialized engine for one to `max_batch` images; of a file of any size, up to the test size."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # newer versions know nothing else
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        problems = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        sys.exit(refusal(f"{path}: TensorRT {trt.__version__} cannot read it: {problems}"))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace_gb * 2**30))
    profile = builder.create_optimization_profile()
    long = metadata["long_side"]
    largest, smallest = tuple(metadata["size"] or (long, long)), tuple(metadata["size"] or (64, 64))
    usual = tuple(metadata["size"] or (metadata["short_side"], long))
    shapes = [(count, 3, *size) for count, size in ((1, smallest), (1, usual), (max_batch, largest))]
    profile.set_shape("pixels", *shapes)
    profile.set_shape("sizes", (1, 2), (1, 2), (max_batch, 2))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        sys.exit(refusal(f"{path}: TensorRT {trt.__version__} cannot build an engine; its messages are above."))
    return bytes(engine)


def make_runner(trt, torch, engine: bytes, path: Path):
    """A function from pixels (B, 3, H, W) and sizes (B, 2) to the three outputs, on the first GPU."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        sys.exit(refusal(f"{path}: is an engine of another TensorRT or GPU. Delete it, and it is built again."))
    context = loaded.create_execution_context()

    class Outputs(trt.IOutputAllocator):
        """Memory for outputs whose size is known only after suppression."""

        def __init__(self):
            trt.IOutputAllocator.__init__(self)
            self.memory, self.shapes = {}, {}

        def reallocate_output(self, name, memory, size, alignment):
            if name not in self.memory or self.memory[name].numel() < size:
                self.memory[name] = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
            return self.memory[name].data_ptr()

        def reallocate_output_async(self, name, memory, size, alignment, stream):
            return self.reallocate_output(name, memory, size, alignment)

        def notify_shape(self, name, shape):
            self.shapes[name] = tuple(shape)

    types = {trt.float32: torch.float32, trt.int64: torch.int64, trt.int32: torch.int32, trt.uint8: torch.uint8}
    outputs = Outputs()

    def run(pixels: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
        inputs = {"pixels": pixels, "sizes": sizes}
        held = {}
        for name, array in inputs.items():
            held[name] = torch.from_numpy(array).to("cuda", types[loaded.get_tensor_dtype(name)])
            context.set_input_shape(name, tuple(array.shape))
            context.set_tensor_address(name, held[name].data_ptr())
        names = ("boxes", "scores", "labels")
        for name in names:
            context.set_output_allocator(name, outputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT could not run the engine; its messages are above.")
        stream.synchronize()
        found = []
        for name in names:
            kind, shape = types[loaded.get_tensor_dtype(name)], outputs.shapes[name]
            flat = outputs.memory[name][: int(np.prod(shape)) * torch.empty(0, dtype=kind).element_size()]
            found.append(flat.view(kind).view(shape).cpu().numpy())
        return found

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="file of `python -m brs_detr export --out model.onnx`")
    parser.add_argument("image", type=Path)
    parser.add_argument("--engine", type=Path, help="read it if it exists, else build and write it")
    parser.add_argument("--max-batch", type=int, default=1, help="images at once that the engine takes (default 1)")
    parser.add_argument("--workspace", type=float, default=4.0, help="GB that the builder may use (default 4)")
    parser.add_argument("--threshold", type=float, help="lowest score (default: of each class's best F1 in validation)")
    options = parser.parse_args()
    trt, torch = require_gpu()
    metadata = read_metadata(options.model)
    if options.engine is not None and options.engine.exists():
        engine = options.engine.read_bytes()
    else:
        engine = build(trt, options.model, metadata, options.max_batch, options.workspace)
        if options.engine is not None:
            options.engine.write_bytes(engine)
    run = make_runner(trt, torch, engine, options.engine or options.model)

    image = Image.open(options.image, formats=["JPEG", "PNG"]).convert("RGB")
    pixels, sizes = as_input(image, metadata, np.float32)
    boxes, scores, labels = (array[0] for array in run(pixels, sizes))
    show(to_image(boxes, image, sizes), scores, labels, metadata, options.threshold)


if __name__ == "__main__":
    main()
