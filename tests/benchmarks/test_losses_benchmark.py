"""benchmarks/losses.py: the loop that it times is the loss, and its table compares what ran side by side."""

import pytest
import torch


@pytest.fixture(scope="module")
def losses(benchmark_module):
    return benchmark_module("losses")


@pytest.mark.parametrize("distribution", ["paper", "trained"])
@pytest.mark.parametrize("percent", [0.1, 5.0])
def test_the_loop_is_the_loss(losses, distribution, percent):
    logits, positives, quality, _ = losses.sample(2000, percent, distribution, "cpu")
    logits, quality = logits.double(), quality.double()
    expected = losses.rank_sort_step(logits, positives, quality, "pairwise")
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(losses.loop_step(logits, positives, quality), expected)


def test_the_turns_of_a_part_of_the_positives_add_up(losses):
    logits, positives, quality, _ = losses.sample(500, 4.0, "paper", "cpu")
    parts = [losses.loop_step(logits, positives, quality, only=torch.arange(20)[i::2]) for i in (0, 1)]
    torch.testing.assert_close(sum(parts), losses.loop_step(logits, positives, quality))


def test_ratios_are_those_of_runs_that_took_turns(losses, monkeypatch):
    clock = iter(range(1000))
    order = []

    def timed(function, device):
        order.append(next(clock))
        return float(order[-1])

    monkeypatch.setattr(losses, "timed", timed)
    row = losses.measure(1000, 1.0, "paper", "cpu", repeats=2)
    # The turns are 0, 1, 2 (to warm up), then 3, 4, 5 and 6, 7, 8: focal, bucketed, exact.
    assert row["focal"] == 3.0
    assert row["exact"] == pytest.approx((5 / 3 + 8 / 6) / 2)
    assert "| 2.50 | 1.2 | 1.5 |" in losses.as_line(row, focal=2.5)
