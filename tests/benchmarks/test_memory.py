"""benchmarks/memory.py: what it counts is what a step keeps, though it computes no products."""

import pytest
import torch
from accelerate import Accelerator
from support import DEMO, SMALL_DETECTOR, reset_accelerate
from torch import nn

from brs_detr.config import load_config
from brs_detr.models.transformer.attention import use_sampling
from brs_detr.ops.deform_attn_op import attention_operator

SIZE = (96, 128)


@pytest.fixture(scope="module")
def memory(benchmark_module):
    yield benchmark_module("memory")
    reset_accelerate()


def small(*settings):
    return load_config(DEMO, [*SMALL_DETECTOR, "model.backbone.pretrained=false", "data.workers=0", *settings])


def test_a_perceptron_keeps_its_inputs_and_what_its_activation_gave(memory):
    """Counted by hand: 8 rows of 16, of 32 hidden and of 4 channels; the input was there before."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.ones(8, 16)
    with memory.WithoutProducts(), memory.PeakMemory() as counted:
        out = model(x)
        before = counted.live
        out.sum().backward()
    assert before == 4 * (8 * 32 + 8 * 4)
    assert not out.any()
    assert [p.grad.shape for p in model.parameters()] == [p.shape for p in model.parameters()]


def test_attention_keeps_inputs_and_result_instead_of_weights(memory):
    query = torch.ones(2, 3, 50, 8, requires_grad=True)
    mask = torch.zeros(2, 1, 50, 50)
    with memory.WithFusedAttention(), memory.PeakMemory() as counted:
        out = nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        assert counted.live == query.numel() * 4
        out.sum().backward()
    assert query.grad.shape == query.shape


@pytest.mark.parametrize("settings", [(), ("model.name=co_dino", "model.denoising.queries=10")], ids=["brs", "co_dino"])
def test_the_peak_is_that_of_a_step_that_computes(memory, settings):
    """But for the number of auxiliary queries, which depends on what is predicted."""
    config = small(*settings)
    (counted,), _ = memory.peaks_of(config, 2, [SIZE], 5)
    model = memory.build(config, 5)
    use_sampling(model, attention_operator)
    batch = memory.generated_batch(2, SIZE, 5)
    step = memory.build_step(config, batch, 5, Accelerator(cpu=True), model)
    step()
    with memory.PeakMemory() as real:
        step()
    assert counted == pytest.approx(real.peak, rel=0.05)


def test_what_was_there_before_the_step(memory):
    """Parameters, buffers and AdamW's two moments of what is trained, in float32."""
    config = small()
    (_,), fixed = memory.peaks_of(config, 1, [SIZE], 5)
    model = memory.build(config, 5)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert fixed == 4 * (3 * trained + sum(p.numel() for p in model.parameters() if not p.requires_grad)) + buffers


def test_the_line_and_the_cards(memory):
    assert memory.line_through([(1, 100), (2, 7), (4, 11)]) == (2, 3)
    gib = 2**30
    assert memory.cards_for(21 * gib) == "24 GB, 40 GB, 80 GB"
    assert memory.cards_for(23 * gib) == "40 GB, 80 GB"
    assert memory.cards_for(79 * gib) == "more than 80 GB"
