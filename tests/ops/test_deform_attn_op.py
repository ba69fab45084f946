"""The operator of deformable attention: gradients, what it keeps, torch.compile, torch.export; on the CPU."""

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from brs_detr.models.transformer.attention import use_sampling
from brs_detr.models.transformer.encoder import DeformableEncoder, EncoderLayer
from brs_detr.ops import deform_attn_op
from brs_detr.ops.deform_attn import deformable_attention
from brs_detr.ops.deform_attn_op import attention_operator, automatic_attention, fused_attention, kernels_work

SHAPES = [(5, 7), (3, 2)]
HEADS, DIM, POINTS = 2, 4, 3
SIDES = [side for shape in SHAPES for side in shape]
plain_or_operator = pytest.mark.parametrize("sampling", [fused_attention, automatic_attention, attention_operator])


def problem(coordinates=2, batch=2, queries=5, dtype=torch.float64):
    """Value, references, offsets, logits; many samples lie outside."""
    tokens, samples = sum(h * w for h, w in SHAPES), HEADS * len(SHAPES) * POINTS
    value = torch.randn(batch, tokens, HEADS, DIM, dtype=dtype)
    references = torch.rand(batch, queries, len(SHAPES), coordinates, dtype=dtype)
    offsets = 2 * torch.randn(batch, queries, samples * 2, dtype=dtype)
    logits = 2 * torch.randn(batch, queries, samples, dtype=dtype)
    return value.requires_grad_(), references, offsets.requires_grad_(), logits.requires_grad_()


def outcome(attention, inputs, gradient):
    """Result and the gradients of value, offsets and logits."""
    value, references, offsets, logits = inputs
    result = attention(value, SHAPES, references, offsets, logits)
    return [result.detach(), *torch.autograd.grad(result, (value, offsets, logits), gradient)]


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("queries", [5, 0])
def test_equals_plain_torch_with_its_gradients(coordinates, queries):
    inputs, gradient = problem(coordinates, queries=queries), torch.randn(2, queries, HEADS * DIM).double()
    both = (outcome(attention, inputs, gradient) for attention in (attention_operator, deformable_attention))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_half_precision_gets_gradients_in_its_own_dtype():
    inputs, gradient = problem(dtype=torch.bfloat16), torch.randn(2, 5, HEADS * DIM).bfloat16()
    inputs = (inputs[0], inputs[1].float(), *inputs[2:])
    both = (outcome(attention, inputs, gradient) for attention in (attention_operator, deformable_attention))
    for ours, theirs in zip(*both, strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_torch_finds_no_fault_with_the_operator(coordinates):
    value, references, offsets, logits = problem(coordinates)
    torch.library.opcheck(torch.ops.brs_detr.deformable_attention, (value, SIDES, references, offsets, logits))
    inputs = (t.detach() for t in (torch.randn(2, 5, HEADS * DIM).double(), value))
    others = (t.detach() for t in (references, offsets, logits))
    torch.library.opcheck(torch.ops.brs_detr.deformable_attention_backward, (*inputs, SIDES, *others))


@plain_or_operator
def test_references_that_want_a_gradient_are_not_forgotten(sampling):
    value, references, offsets, logits = problem()
    references.requires_grad_()
    result = sampling(value, SHAPES, references, offsets, logits)
    if sampling is attention_operator:  # documented; the others take plain torch then
        assert torch.autograd.grad(result.sum(), references, allow_unused=True) == (None,)
    else:
        assert torch.autograd.grad(result.sum(), references)[0].abs().sum() > 0


def test_on_a_cpu_plain_torch_is_taken(monkeypatch):
    monkeypatch.setattr(deform_attn_op, "attention_operator", None)
    value, references, offsets, logits = problem()
    expected = deformable_attention(value, SHAPES, references, offsets, logits)
    for sampling in (fused_attention, automatic_attention):
        assert torch.equal(sampling(value, SHAPES, references, offsets, logits), expected)


def saved_bytes(function):
    """Bytes of the different storages that a forward pass keeps for the backward pass, and its result."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    return sum(kept.values()), result


def test_it_keeps_no_more_than_its_inputs():
    """All layers of an encoder share one tensor of references, which costs a layer nothing."""
    value, references, offsets, logits = problem(queries=41)
    nbytes = lambda *tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    kept, _ = saved_bytes(lambda: attention_operator(value, SHAPES, references, offsets, logits))
    assert kept == nbytes(value, references, offsets, logits)
    plain, _ = saved_bytes(lambda: deformable_attention(value, SHAPES, references, offsets, logits))
    assert plain > 2 * kept


def test_a_layer_more_keeps_value_offsets_and_logits_more():
    """Beside what its linear layers and norms keep, which is the same without the operator."""
    maps, padding = [torch.randn(2, 16, *shape) for shape in SHAPES], torch.zeros(2, 40, 56, dtype=torch.bool)
    tokens = sum(h * w for h, w in SHAPES)

    def a_layer(sampling):
        kept = []
        for layers in (1, 2):
            torch.manual_seed(0)
            encoder = DeformableEncoder(16, layers=layers, heads=HEADS, levels=2, points=POINTS, hidden=8)
            use_sampling(encoder, sampling)
            kept.append(saved_bytes(lambda encoder=encoder: encoder(maps, padding).tokens)[0])
        return kept[1] - kept[0]

    def without(value, shapes, references, offsets, logits):  # sums keep nothing
        return value.flatten(2) + offsets.sum(-1, keepdim=True) + logits.sum(-1, keepdim=True)

    others, samples = a_layer(without), HEADS * len(SHAPES) * POINTS
    inputs = 4 * 2 * tokens * (16 + 2 * samples + samples)  # float32, two images: value, offsets, logits
    assert a_layer(attention_operator) - others <= inputs
    assert a_layer(deformable_attention) - others > 2 * inputs


def layer_inputs(batch=2, dim=16):
    tokens = sum(h * w for h, w in SHAPES)
    x, position = torch.randn(batch, tokens, dim), torch.randn(batch, tokens, dim)
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[-1, ::7] = True
    return x, position, torch.rand(batch, tokens, 2, 2), SHAPES, padding


@pytest.mark.parametrize(
    ("backend", "dynamic", "autocast"),
    [("eager", None, False), ("aot_eager", None, True), ("aot_eager", True, False)],
)
def test_an_encoder_layer_compiles_to_one_graph(backend, dynamic, autocast):
    layer = EncoderLayer(16, HEADS, 2, POINTS, 32)
    inputs = layer_inputs()
    expected = layer(*inputs)
    use_sampling(layer, attention_operator)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = compiled(*inputs)
    torch.testing.assert_close(result, expected, rtol=0.1 if autocast else 1e-4, atol=0.1 if autocast else 1e-5)
    parameters = list(layer.parameters())
    theirs = torch.autograd.grad(expected.square().mean(), parameters)
    for mine, other in zip(torch.autograd.grad(result.square().mean(), parameters), theirs, strict=True):
        assert mine.isfinite().all()
        if not autocast:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("sampling", [fused_attention, automatic_attention])
def test_the_choice_by_device_compiles_too(sampling):
    layer = EncoderLayer(16, HEADS, 2, POINTS, 32)
    use_sampling(layer, sampling)
    inputs = layer_inputs()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(*inputs), layer(*inputs))
    torch._dynamo.reset()


class Attention(nn.Module):
    def forward(self, value, references, offsets, logits):
        return attention_operator(value, SHAPES, references, offsets, logits)


def test_exported_it_is_one_node_and_any_number_of_images():
    arguments = tuple(t.detach() for t in problem(dtype=torch.float32))
    images, queries = torch.export.Dim("images", max=64), torch.export.Dim("queries", max=4096)
    several = {0: images, 1: queries}
    program = torch.export.export(Attention(), arguments, dynamic_shapes=({0: images}, several, several, several))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.brs_detr.deformable_attention.default in called
    assert not any("grid_sampler" in str(target) for target in called)
    more = tuple(t.detach() for t in problem(batch=3, queries=11, dtype=torch.float32))
    torch.testing.assert_close(program.module()(*more), Attention()(*more))


def test_levels_that_do_not_add_up_are_refused():
    value, references, offsets, logits = problem()
    with pytest.raises(ValueError, match="tokens"):
        attention_operator(value, [(5, 7), (3, 3)], references, offsets, logits)


def test_kernels_that_do_not_work_are_named_and_left():
    """Without a GPU Triton has no driver: what a user sees whose system cannot compile or run the kernels."""
    deform_attn_op._trial.cache_clear()
    with pytest.warns(UserWarning, match="Triton's kernels do not work on cpu:0 .* Plain torch computes it"):
        assert not kernels_work(0, "cpu")
    with warnings.catch_warnings():  # once a process
        warnings.simplefilter("error")
        assert not kernels_work(0, "cpu")
    deform_attn_op._trial.cache_clear()


def test_the_trial_of_the_kernels_is_a_constant_to_a_compiler(monkeypatch):
    calls = []
    monkeypatch.setattr(deform_attn_op, "_trial", lambda *device: bool(calls.append(device)))
    compiled = torch.compile(lambda x: x + 1 if kernels_work(0) else x - 1, fullgraph=True, backend="eager")
    assert [compiled(torch.ones(2)).sum().item() for _ in range(3)] == [0, 0, 0]
    assert calls == [(0, "cuda")]
    with FakeTensorMode():
        assert kernels_work(0)  # nothing can be tried
    assert len(calls) == 1
    torch._dynamo.reset()


def test_kernels_with_other_results_are_left(monkeypatch):
    module = pytest.importorskip("brs_detr.ops.deform_attn_triton", reason="Triton is not installed")
    monkeypatch.setattr(module, "launch_forward", lambda *arguments: deformable_attention(*arguments) + 0.1)
    monkeypatch.setattr(module, "launch_backward", deform_attn_op.plain_gradients)
    deform_attn_op._trial.cache_clear()
    with pytest.warns(UserWarning, match="its results differ"):
        assert not kernels_work(0, "cpu")
    monkeypatch.setattr(module, "launch_forward", deformable_attention)
    deform_attn_op._trial.cache_clear()
    assert kernels_work(0, "cpu")
    deform_attn_op._trial.cache_clear()
