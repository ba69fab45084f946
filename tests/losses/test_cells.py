"""Sums of cells as a GPU computes them, on whatever device this runs, against adding one entry after the other."""

import pytest
import torch
from losses_reference import detector_like, gradient_of

from brs_detr.losses import alrp_loss, average_precision_loss, by_device, cells, ndcg_loss, rank_sort_loss


def entries(layers: int, length: int, count: int, unreached: float):
    """Cells (L * n,) of which a share is cell 0, and values (L, n)."""
    cell = torch.randint(1, count, (layers, length), dtype=torch.int32)
    cell[torch.rand(layers, length) < unreached] = 0
    start = torch.arange(layers, dtype=torch.int32)[:, None] * count
    return (cell + start).flatten(), torch.randn(layers, length, dtype=torch.float64)


@pytest.mark.parametrize("unreached", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 29, 5000])
@pytest.mark.parametrize("layers", [1, 6])
def test_copies_sum_to_what_one_address_sums_to(layers, count, unreached):
    where, x = entries(layers, 9000, count, unreached)
    plain = cells.plain_sums(where, [None, x], x, count)
    spread = cells.spread_sums(where, [None, x], x, count)
    assert spread.shape == plain.shape == (2, layers, count)
    assert torch.equal(spread[0, :, 1:], plain[0, :, 1:])
    torch.testing.assert_close(spread[1, :, 1:], plain[1, :, 1:], rtol=1e-12, atol=1e-11)


def test_few_slots_leave_one_copy(monkeypatch):
    monkeypatch.setattr(cells, "MAX_SLOTS", 10)
    where, x = entries(2, 5000, 300, 0.5)
    wanted = cells.plain_sums(where, [x], x, 300)[:, :, 1:]
    torch.testing.assert_close(cells.spread_sums(where, [x], x, 300)[:, :, 1:], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", [0, 1, 28])
def test_no_address_is_added_to_often(cell):
    """A million entries in one cell, as of a detector whose negatives all lie below, or all above, its positives."""
    where = torch.full((1_000_000,), cell, dtype=torch.int32)
    slots = cells.spread(where, 29, 29, cells.MAX_COPIES)
    assert slots.bincount().max() <= 1_000_000 / cells.MAX_COPIES + 1
    beside = slots.view(-1, 32)[:30000].diff(dim=1)
    assert (beside == 1).float().mean() > 0.99


def test_the_choice_is_made_by_device():
    assert by_device.choices(torch.device("cpu")) is by_device.CPU
    assert by_device.choices(torch.device("cuda", 0)) is by_device.GPU
    assert by_device.GPU.spread and not by_device.CPU.spread


LOSSES = {
    "rank_sort": lambda logits, where, quality, **how: sum(rank_sort_loss(logits, where, quality, **how)),
    "ap": lambda logits, where, quality, **how: average_precision_loss(logits, where, interpolate=True, **how),
    "alrp": lambda logits, where, quality, **how: sum(alrp_loss(logits, where, quality, **how)),
    "ndcg": lambda logits, where, quality, **how: ndcg_loss(logits, where, **how),
}


@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("method", ["bucketed", "exact"])
@pytest.mark.parametrize("positives", [14, 500])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_computed_as_on_a_gpu(name, positives, method, delta, monkeypatch):
    logits, where, quality = detector_like(positives, 9000)
    wanted = LOSSES[name](logits, where, quality, delta=delta, method=method)
    gradient = gradient_of(wanted, logits)
    monkeypatch.setattr(by_device, "CPU", by_device.GPU)
    loss = LOSSES[name](logits, where, quality, delta=delta, method=method)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient_of(loss, logits), gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize("shift", [-20.0, 0.0, 20.0])
def test_losses_on_a_real_gpu(shift, layers):
    """All negatives far below the positives, among them, and far above."""
    logits = torch.randn(layers, 50_000)
    where = torch.stack([torch.randperm(50_000)[:14] for _ in range(layers)])
    logits, quality = (logits + shift).scatter_(1, where, torch.randn(layers, 14)), torch.rand(layers, 14)
    results = []
    for device in ("cpu", "cuda"):
        leaf = logits.to(device).requires_grad_()
        terms = rank_sort_loss(leaf, where.to(device), quality.to(device))
        (terms.ranking + terms.sorting).sum().backward()
        results.append((terms.ranking.cpu(), terms.sorting.cpu(), leaf.grad.cpu()))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
