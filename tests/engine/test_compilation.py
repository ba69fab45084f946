"""Compiled layers compute what they are written to compute, and only a training sees them."""

import copy

import pytest
import torch
import torch._dynamo
from support import SMALL_BACKBONE
from torch import nn

from brs_detr.engine.compilation import CompilerError, compile_layers, require_compiler, uncompiled
from brs_detr.engine.config import TrainConfig
from brs_detr.models.build import build_model
from brs_detr.models.config import BRSDETRConfig, BRSDINOConfig, DenoisingConfig, RoIConfig, RPNConfig

SIZE = dict(
    backbone=SMALL_BACKBONE,
    dim=64,
    heads=2,
    levels=3,
    encoder_layers=2,
    decoder_layers=2,
    ffn_dim=32,
    queries=10,
    max_aux_queries=10,
    rpn=RPNConfig(proposals_before_nms=50, proposals=20),
    roi=RoIConfig(fc_dim=32),
)
SMALL = BRSDETRConfig(**SIZE)
DINO = BRSDINOConfig(**SIZE, denoising=DenoisingConfig(loss="rank", queries=6))
TARGET = {"boxes": torch.tensor([[8.0, 8, 40, 30], [30, 20, 60, 60]]), "labels": torch.tensor([0, 2])}


@pytest.fixture
def model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield build_model(SMALL, 3).train()
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def step(model, height, width, objects=2):
    """Losses and gradients of a step on two images of different sizes, the second of which has so many objects."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, height - 9 * i, width), generator=generator).byte() for i in range(2)]
    model.zero_grad()
    torch.manual_seed(1)
    losses = model(images, [TARGET, {name: values[:objects] for name, values in TARGET.items()}])
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_layers_of_a_kind_are_one_graph_and_compute_the_same_at_any_size(model):
    sizes = [(72, 96), (96, 80), (64, 128)]
    expected = [step(model, *size) for size in sizes]
    names, backend = list(model.state_dict()), Counting()
    assert compile_layers(model, backend, fullgraph=True) == 4
    for size, (losses, gradients) in zip(sizes, expected, strict=True):
        found, slopes = step(model, *size)
        for name, value in losses.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        for name, value in gradients.items():
            torch.testing.assert_close(slopes[name], value, rtol=1e-4, atol=1e-5)
    # of each kind one, and one more where only some inputs need a gradient
    assert 2 <= backend.graphs <= 4
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_layers_with_denoising_queries_are_compiled_once_whatever_the_objects():
    """Their number and the mask are inputs: an image may lack objects, and all may."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, backend = build_model(DINO, 3).train(), Counting()
    batches = [(72, 96, 2), (96, 80, 1), (64, 128, 0), (80, 64, 2)]
    expected = [step(model, *batch) for batch in batches]
    compile_layers(model, backend, fullgraph=True)
    for batch, (losses, gradients) in zip(batches, expected, strict=True):
        found, slopes = step(model, *batch)
        assert "denoising.1.rank" in found
        for name, value in losses.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        for name, value in gradients.items():
            torch.testing.assert_close(slopes[name], value, rtol=1e-4, atol=1e-5)
    # as without denoising, and one more for a mask of each image's own
    assert 2 <= backend.graphs <= 6
    torch._dynamo.reset()


@pytest.mark.slow
def test_layers_are_compiled_with_their_backward_pass(model):
    losses, gradients = step(model, 72, 96)
    for layer in model.encoder.layers:  # the decoder's took half a minute more
        layer.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    found, slopes = step(model, 72, 96)
    for name, value in losses.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    for name, value in gradients.items():
        torch.testing.assert_close(slopes[name], value, rtol=1e-4, atol=1e-5)


def test_copies_and_validations_run_the_layers_as_they_are_written(model):
    called = []

    def backend(graph, inputs):
        called.append(graph)
        raise AssertionError("compiled outside of the training")

    compile_layers(model, backend)
    average, image = copy.deepcopy(model).eval(), [torch.zeros(3, 64, 64, dtype=torch.uint8)]
    with torch.no_grad():
        average(image)
        with uncompiled(model):
            model.eval()(image)
    assert not called
    assert all(layer._compiled_call_impl is not None for layer in model.decoder.layers)


def test_a_detector_without_transformer_layers_is_refused():
    with pytest.raises(CompilerError, match=r"train\.compile=layers: this detector has no transformer layers"):
        compile_layers(nn.Sequential(nn.Conv2d(3, 8, 3)))


def test_a_machine_without_a_compiler_is_refused_before_the_training_begins():
    def backend(graph, inputs):
        raise RuntimeError("g++: command not found\n  and much more")

    state = torch.get_rng_state()
    with pytest.raises(CompilerError, match=r"does not work here \(.+\)\. Install a C\+\+ compiler") as caught:
        require_compiler(torch.device("cpu"), backend)
    assert "\n" not in str(caught.value) and "command not found" in str(caught.value)
    require_compiler(torch.device("cpu"), "eager")
    assert torch.equal(torch.get_rng_state(), state), "the trial must not change the training's random numbers"


def test_nothing_is_compiled_by_default():
    assert TrainConfig().compile == "none"
