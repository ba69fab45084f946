"""The kernels of deformable attention: on a GPU, without one in Triton's interpreter, and what they compile to."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from brs_detr.models.transformer.attention import use_sampling
from brs_detr.models.transformer.encoder import EncoderLayer
from brs_detr.ops.deform_attn import deformable_attention
from brs_detr.ops.deform_attn_op import attention_operator, kernels_work, plain_gradients

triton = pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
PROBLEMS = {  # (level shapes, images, queries, heads, channels of a head, points, coordinates of a reference)
    "odd sizes": ([(5, 7), (3, 2)], 2, 37, 2, 4, 2, 2),
    "boxes": ([(5, 7), (3, 2)], 2, 37, 2, 4, 2, 4),
    "channels and samples that are no power of two": ([(9, 11), (5, 6), (3, 3)], 1, 7, 2, 24, 3, 4),
    "as in the recipes": ([(13, 21), (7, 11), (4, 6), (2, 3)], 1, 11, 2, 32, 4, 2),
    "one cell": ([(1, 1)], 1, 9, 1, 8, 1, 2),
    "one channel": ([(3, 4)], 1, 3, 1, 1, 2, 4),
    "no queries": ([(3, 4), (2, 2)], 2, 0, 2, 8, 2, 2),
    "no images": ([(3, 4), (2, 2)], 0, 5, 2, 8, 2, 2),
}
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def problem(shapes, batch, queries, heads, dim, points, coordinates, seed=0):
    """Value, references, offsets, logits and the gradient that arrives, in float64; some samples lie outside."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    samples = heads * len(shapes) * points
    references = torch.rand(batch, queries, len(shapes), coordinates, generator=generator, dtype=torch.float64)
    references[..., :2] = references[..., :2] * 1.4 - 0.2
    references[..., 2:] = references[..., 2:] * 0.9 + 0.1
    value = draw(batch, sum(h * w for h, w in shapes), heads, dim)
    value[-1:, ::3] = 0  # padded tokens
    offsets = away_from_edges(3 * draw(batch, queries, samples * 2), references, shapes, heads, points)
    return (value, references, offsets, 2 * draw(batch, queries, samples)), draw(batch, queries, heads * dim)


def away_from_edges(offsets, references, shapes, heads, points):
    """Move samples 0.05 cells away from where gradients jump: on which side they are would be left to rounding."""
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    centers, sides = references[:, :, None, :, None, :2], references[:, :, None, :, None, 2:]
    cells = sides * sizes * 0.5 / points if references.shape[-1] == 4 else torch.ones_like(centers)
    moved = offsets.reshape(*offsets.shape[:2], heads, len(shapes), points, 2)
    beyond = (centers * sizes - 0.5 + moved * cells) % 1
    return (moved + (0.05 + 0.9 * beyond - beyond) / cells).flatten(2)


def compare(problem, shapes, device, dtype, tolerance):
    """Hold the kernels' results and gradients to those in float64 of the same rounded inputs."""
    from brs_detr.ops.deform_attn_triton import launch_backward, launch_forward

    (value, references, offsets, logits), gradient = problem
    value, offsets, logits, gradient = (t.to(device, dtype) for t in (value, offsets, logits, gradient))
    references = references.to(device, torch.float32)  # boxes stay in float32 under autocast
    inputs = (value, shapes, references, offsets, logits)
    ours = (launch_forward(*inputs), *launch_backward(gradient, *inputs))
    exact = [t.double() if isinstance(t, torch.Tensor) else t for t in inputs]
    theirs = (deformable_attention(*exact), *plain_gradients(gradient.double(), *exact))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype and one.shape == other.shape and one.is_contiguous()
        largest = other.abs().max() if other.numel() else 0
        assert other.numel() == 0 or (one.double() - other).abs().max() <= tolerance * largest


def random_problem(seed):
    """Shapes of up to three levels, with channels, heads and points of any number; few, as the interpreter is slow."""
    generator = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))  # noqa: E731
    shapes = [(pick(1, 9), pick(1, 9)) for _ in range(pick(1, 3))]
    settings = (pick(1, 2), pick(1, 9), pick(1, 2), pick(1, 40), pick(1, 3), 2 * pick(1, 2))
    return shapes, problem(shapes, *settings, seed=seed)


def interpreted():
    """Compare in this process, which has to be one that was started for it: Triton decides when it is imported."""
    assert kernels_work(0, "cpu")
    for settings in PROBLEMS.values():
        compare(problem(*settings), settings[0], "cpu", torch.float32, 3e-6)
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        for name in ("boxes", "as in the recipes"):
            compare(problem(*PROBLEMS[name]), PROBLEMS[name][0], "cpu", dtype, tolerance)
    for seed in range(8):
        shapes, values = random_problem(seed)
        compare(values, shapes, "cpu", torch.float32, 3e-6)
    nothing_from_nowhere()
    programs_of_several_warps_compute_the_same()


def nothing_from_nowhere():
    """Locations far outside read zeros and are no index; those that are not numbers show in the result."""
    from brs_detr.ops.deform_attn_triton import launch_backward, launch_forward

    shapes = PROBLEMS["odd sizes"][0]
    inputs, gradient = problem(*PROBLEMS["odd sizes"])
    value, references, offsets, logits, gradient = (t.float() for t in (*inputs, gradient))
    far = offsets.sign() * 1e12
    assert (launch_forward(value, shapes, references, far, logits) == 0).all()
    assert all((t == 0).all() for t in launch_backward(gradient, value, shapes, references, far, logits))
    lost = torch.full_like(offsets, float("nan"))
    assert launch_forward(value, shapes, references, lost, logits).isnan().all()


def programs_of_several_warps_compute_the_same():
    import brs_detr.ops.deform_attn_triton as module

    shapes, few = PROBLEMS["as in the recipes"][0], module.FEW_PROGRAMS
    module.FEW_PROGRAMS = 0
    compare(problem(*PROBLEMS["as in the recipes"]), shapes, "cpu", torch.float32, 3e-6)
    module.FEW_PROGRAMS = few


@pytest.mark.slow
def test_equal_plain_torch_in_float64_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]


class TestOnAGPU:
    """Nothing of this has to pass where there is none."""

    pytestmark = gpu

    @pytest.mark.parametrize("name", PROBLEMS)
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str
    )
    def test_equals_plain_torch_in_float64(self, name, dtype, tolerance):
        compare(problem(*PROBLEMS[name]), PROBLEMS[name][0], "cuda", dtype, tolerance)

    @pytest.mark.parametrize("seed", range(20))
    def test_random_shapes_equal_plain_torch_in_float64(self, seed):
        shapes, values = random_problem(seed)
        compare(values, shapes, "cuda", torch.float32, 3e-6)

    @pytest.mark.parametrize("queries", [None, 300])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
    def test_sizes_of_a_recipe_equal_plain_torch(self, queries, dtype, tolerance):
        shapes = [(100, 167), (50, 84), (25, 42), (13, 21)]
        queries = sum(h * w for h, w in shapes) if queries is None else queries
        values = problem(shapes, 1, queries, 8, 32, 4, 2 if queries > 300 else 4)
        compare(values, shapes, "cuda", dtype, tolerance)

    def test_no_index_comes_from_nowhere(self, monkeypatch):
        from brs_detr.ops import deform_attn_triton as module

        for name in ("launch_forward", "launch_backward"):
            launch = getattr(module, name)
            on_gpu = lambda *given, launch=launch: launch(*(t.cuda() if hasattr(t, "cuda") else t for t in given))  # noqa: E731
            monkeypatch.setattr(module, name, on_gpu)
        nothing_from_nowhere()

    def test_they_work_and_are_taken(self):
        assert kernels_work(torch.cuda.current_device())

    def test_the_forward_pass_repeats_bit_by_bit(self):
        (value, *others), _ = problem(*PROBLEMS["as in the recipes"])
        inputs = [t.float().cuda() for t in (value, *others)]
        shapes = PROBLEMS["as in the recipes"][0]
        first, second = (attention_operator(inputs[0], shapes, *inputs[1:]) for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_an_encoder_layer_compiles_to_one_graph(self, backend):
        shapes = [(13, 21), (7, 11)]
        layer = EncoderLayer(64, 2, 2, 4, 128).cuda()
        tokens = sum(h * w for h, w in shapes)
        x, position = torch.randn(2, 2, tokens, 64, device="cuda")
        padding = torch.arange(tokens, device="cuda").expand(2, -1) % 5 == 0
        inputs = (x, position, torch.rand(2, tokens, 2, 2, device="cuda"), shapes, padding)
        expected = layer(*inputs)
        use_sampling(layer, attention_operator)
        result = torch.compile(layer, fullgraph=True, backend=backend)(*inputs)
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
        parameters = list(layer.parameters())
        both = (torch.autograd.grad(t.square().mean(), parameters) for t in (result, expected))
        for ours, theirs in zip(*both, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
        torch._dynamo.reset()

    def test_nothing_waits_for_the_device(self):
        (value, *others), gradient = problem(*PROBLEMS["as in the recipes"])
        inputs = [t.float().cuda().requires_grad_() for t in (value, *others)]
        shapes, gradient = PROBLEMS["as in the recipes"][0], gradient.float().cuda()
        inputs[1].requires_grad_(False)
        attention_operator(inputs[0], shapes, *inputs[1:]).backward(gradient)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            moved = [(h + 0, w) for h, w in shapes[::-1]]  # other levels: their sizes are copied to the device
            attention_operator(inputs[0], moved, *inputs[1:]).backward(gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def machine_tool(name):
    """Path of one of NVIDIA's tools: beside Triton, which brings them, or installed."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if bundled.is_file() else shutil.which(name)
    return found or pytest.skip(f"{name} is neither beside Triton nor installed")


def compiled(kernel, dtype, coordinates, queries, capability=90):
    """Compile a kernel with the constants of a launch for two images of 800x1333, for a GPU that need not be there."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        pytest.skip("compiles ahead of time with the interface of Triton 3.5 and newer")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import brs_detr.ops.deform_attn_triton as module

    meta = {"dtype": dtype, "device": "meta"}
    value, logits = torch.empty(2, 22223, 8, 32, **meta), torch.empty(2, queries, 8 * 16, **meta)
    references = torch.empty(2, queries, 4, coordinates, device="meta")
    tile = getattr(module.DEFAULT, kernel.strip("_"))[value.element_size()]
    _, constants = module._launch(tile, value, references, logits, 4)
    function = getattr(module, kernel)
    names, pointer = function.arg_names, {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    kinds = {name: "constexpr" if name in constants else pointer for name in names}
    kinds |= {"references": "*fp32", "table": "*i32", "tokens": "i32", "queries": "i32"}
    kinds |= {"of_value": "*fp32"} if "of_value" in names else {}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kinds[name][0] == "*"}
    values = {(names.index(name),): constants.pop(name) for name in names if kinds[name] == "constexpr"}
    source = ASTSource(function, {name: kinds[name] for name in names}, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=constants).asm


def examine(tool, option, cubin, tmp_path):
    """What one of NVIDIA's tools prints of machine code."""
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    command = [machine_tool(tool), option, str(tmp_path / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin, tmp_path):
    """Registers of a thread, and bytes of its memory outside of them."""
    text = examine("cuobjdump", "--dump-resource-usage", cubin, tmp_path)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def machine_code(cubin, tmp_path):
    """How often each instruction occurs, with its modifiers."""
    text = examine("nvdisasm", "-c", cubin, tmp_path)
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)", text, re.MULTILINE))


# An encoder's layer in programs of several warps, and a decoder's, whose few queries take programs of one.
LAYERS = pytest.mark.parametrize(
    ("coordinates", "queries"),
    [pytest.param(2, 22223, id="encoder"), pytest.param(4, 300, id="decoder", marks=pytest.mark.slow)],
)


@LAYERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
def test_on_hopper_nothing_orders_memory_and_nothing_is_spilled(kernel, dtype, coordinates, queries, tmp_path):
    asm = compiled(kernel, dtype, coordinates, queries)
    ptx = asm["ptx"]
    assert not re.search(r"acq_rel|\.acquire|\.release|\bfence\b|membar|\.seq_cst", ptx)
    registers, stack = resources(asm["cubin"], tmp_path)
    assert stack == 0, "spilled registers, or arrays with an index that is not a constant"
    # at least 16 of the 64 warps that a processor holds
    assert registers <= 128
    counts = machine_code(asm["cubin"], tmp_path)
    kinds = Counter()
    for instruction, count in counts.items():
        kinds[instruction.split(".")[0]] += count
    assert kinds["LDG"] and not {"MEMBAR", "CCTL", "ERRBAR", "LDL", "STL", "ATOMG", "ATOM"} & kinds.keys()
    if kernel == "_forward":
        assert counts["LDG.E.128"] >= 16, "four points, four neighbors each: 16 bytes at once"
        assert not kinds["BAR"] and not kinds["REDG"]
    else:
        assert "relaxed" in ptx
        assert kinds["REDG"] % 16 == 0 and kinds["REDG"] > 0
        assert kinds["BAR"] <= 4  # beside the loop, where the samples of a query change hands


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 100, 120])
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
def test_compiles_for_other_gpus_without_ordered_atomics(kernel, capability):
    ptx = compiled(kernel, torch.bfloat16, 2, 22223, capability)["ptx"]
    assert not re.search(r"acq_rel|\.acquire|\.release|\bfence\b|membar", ptx)


def test_tiles_follow_the_width_of_a_head_and_the_number_of_queries():
    from brs_detr.ops.deform_attn_triton import DEFAULT, _launch

    def block(queries, dim, dtype=torch.bfloat16):
        value, logits = torch.empty(1, 9, 8, dim, dtype=dtype), torch.empty(1, queries, 128)
        grid, constants = _launch(DEFAULT.forward[value.element_size()], value, torch.empty(1, 1, 1, 2), logits, 4)
        assert grid[0] * constants["BLOCK_Q"] >= queries > (grid[0] - 1) * constants["BLOCK_Q"] and grid[1] == 8
        return constants["BLOCK_Q"], constants["num_warps"]

    assert block(22223, 32) == (32, 4) and block(22223, 32, torch.float32) == (16, 4)
    assert block(22223, 64) == (16, 4) and block(22223, 24) == (32, 4)
    assert block(300, 32) == (8, 1)  # 304 programs of one warp, not 80 of four
    assert block(300, 1024) == (1, 1)


if __name__ == "__main__":
    interpreted()
