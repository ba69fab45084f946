"""The fused kernels against the plain torch version: on a GPU, and without one in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from brs_detr.ops.deform_attn import deformable_sampling

triton = pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROBLEMS = {  # (level shapes, images, queries, heads, channels of a head, points)
    "odd sizes": ([(5, 7), (3, 2)], 2, 37, 2, 4, 2),
    "channels that are no power of two": ([(9, 11), (5, 6), (3, 3)], 1, 20, 2, 24, 3),
    "one cell": ([(1, 1)], 1, 3, 1, 8, 1),
}


def problem(shapes, batch, queries, heads, dim, points, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.rand(*size, generator=generator)  # noqa: E731
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, dim, generator=generator).to(dtype)
    locations = draw(batch, queries, heads, len(shapes), points, 2) * 1.4 - 0.2  # some outside
    weights = draw(batch, queries, heads, len(shapes), points)
    gradient = torch.randn(batch, queries, heads * dim, generator=generator).to(dtype)
    return [t.to(device).requires_grad_() for t in (value, locations, weights)], gradient.to(device)


def outcome(sampling, inputs, gradient, shapes):
    """Result and the three gradients."""
    value, locations, weights = inputs
    result = sampling(value, shapes, locations, weights)
    return [result.detach(), *torch.autograd.grad(result, inputs, gradient)]


def assert_equal(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def interpreted(name):
    """Compare in this process, which has to be one that was started for it: Triton decides when it is imported."""
    from brs_detr.ops.deform_attn_triton import triton_sampling

    shapes = PROBLEMS[name][0]
    inputs, gradient = problem(*PROBLEMS[name])
    assert_equal(*(outcome(f, inputs, gradient, shapes) for f in (triton_sampling, deformable_sampling)), 1e-5)
    far = inputs[1].detach() * 1e12  # far outside, and no index
    assert (triton_sampling(inputs[0], shapes, far, inputs[2]) == 0).all()
    lost = torch.full_like(inputs[1], float("nan"))
    assert triton_sampling(inputs[0], shapes, lost, inputs[2]).isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_torch_version_in_the_interpreter(name):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, name], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@gpu
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str
)
def test_equals_the_torch_version_on_a_gpu(name, dtype, tolerance):
    from brs_detr.ops.deform_attn_triton import triton_sampling

    inputs, gradient = problem(*PROBLEMS[name], device="cuda", dtype=dtype)
    sampled = (outcome(f, inputs, gradient, PROBLEMS[name][0]) for f in (triton_sampling, deformable_sampling))
    assert_equal(*sampled, tolerance)


def test_without_a_gpu_the_torch_version_runs():
    from brs_detr.ops.deform_attn_triton import fused_sampling

    shapes = PROBLEMS["odd sizes"][0]
    inputs, gradient = problem(*PROBLEMS["odd sizes"])
    ours, theirs = (outcome(f, inputs, gradient, shapes) for f in (fused_sampling, deformable_sampling))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_what_the_kernel_cannot_do_is_refused():
    from brs_detr.ops.deform_attn_triton import triton_sampling

    inputs, _ = problem(*PROBLEMS["odd sizes"])
    with pytest.raises(ValueError, match="tokens"):
        triton_sampling(inputs[0], [(5, 7)], *inputs[1:])
    with pytest.raises(ValueError, match="float64"):
        triton_sampling(inputs[0].double(), PROBLEMS["odd sizes"][0], *inputs[1:])


@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
def test_compiles_for_a_gpu_that_is_not_there(kernel):
    """To machine code for Hopper; what the interpreter forgives, the compiler does not."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        pytest.skip("compiles ahead of time with the interface of Triton 3.5 and newer")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import brs_detr.ops.deform_attn_triton as module

    function = getattr(module, kernel)
    constants = {"LEVELS": 4, "POINTS": 4, "BLOCK_Q": module.QUERIES_PER_PROGRAM, "BLOCK_D": 32}
    kinds = dict.fromkeys(("value", "out", "gradient"), "*bf16") | dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(("locations", "weights", "of_value", "of_locations", "of_weights"), "*fp32")
    kinds |= dict.fromkeys(("tokens", "queries", "heads", "dim"), "i32") | {"table": "*i32"}
    names = function.arg_names
    source = ASTSource(
        function, {name: kinds[name] for name in names}, {(names.index(k),): v for k, v in constants.items()}
    )
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]


if __name__ == "__main__":
    interpreted(sys.argv[1])
