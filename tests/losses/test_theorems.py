"""What the papers prove or print about the losses."""

import pytest
import torch
from losses_reference import detector_like, gradient_of

from brs_detr.losses import alrp_loss, average_precision_loss, ndcg_loss, rank_sort_loss

METHODS = ["pairwise", "bucketed", "exact"]


@pytest.mark.parametrize("method", METHODS)
def test_rank_sort_toy_example(method):
    """RS supplement, Fig. S1 and S2: loss 0.24; gradients there are printed without the division by P = 4."""
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0], dtype=torch.float64, requires_grad=True)
    quality = torch.tensor([0.9, 0.4, 0.8, 0.1], dtype=torch.float64)
    positives = torch.tensor([0, 1, 4, 6])
    ranking, sorting = rank_sort_loss(logits, positives, quality, delta=0, method=method)
    assert ranking.item() == pytest.approx(0.207143, abs=1e-6)
    assert sorting.item() == pytest.approx(0.0375, abs=1e-6)
    assert f"{(ranking + sorting).item():.2f}" == "0.24"
    printed = torch.tensor([0, 0.15, 0.34, 0.34, -0.55, 0.14, -0.43, 0])
    assert torch.allclose(4 * gradient_of(ranking + sorting, logits).float(), printed, atol=0.011)


@pytest.mark.parametrize("method", METHODS)
def test_bucketed_toy_example(method):
    """BRS supplement, Fig. S.1; the figure leaves out the sign of positives and the division by P = 2."""
    logits = torch.tensor([-2.0, 0.0, 1.0, -3.0, -4.0, 2.0, 3.0, -1.0], dtype=torch.float64, requires_grad=True)
    quality = torch.tensor([0.4, 0.8], dtype=torch.float64)
    ranking, sorting = rank_sort_loss(logits, torch.tensor([2, 4]), quality, delta=0, method=method)
    assert ranking.item() == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert sorting.item() == pytest.approx(0.2 / 2)
    printed = torch.tensor([0.125, 0.125, -0.4667, 0.125, -0.95, 0.4583, 0.4583, 0.125])
    assert torch.allclose(2 * gradient_of(ranking + sorting, logits).float(), printed, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_alrp_toy_example(method):
    """aLRP, Fig. 1: three box outputs with the same AP loss 0.36 and aLRP losses 0.53, 0.69, 0.89."""
    logits = torch.arange(10, 0, -1).double()
    positives = torch.tensor([0, 2, 5, 9])
    for order, printed in (([0, 1, 2, 3], "0.53"), ([1, 2, 3, 0], "0.69"), ([3, 2, 1, 0], "0.89")):
        errors = ((1 - torch.tensor([0.95, 0.80, 0.65, 0.50])) / 0.5)[order]
        part = alrp_loss(logits, positives, errors, delta=0, method=method)
        assert f"{average_precision_loss(logits, positives, delta=0, method=method).item():.2f}" == "0.36"
        assert f"{(part.classification + part.localization).item():.2f}" == printed


@pytest.mark.parametrize("positives", [1, 7, 60])
def test_at_delta_zero_bucketing_is_exact(positives):
    """BRS, Theorem 1 (against AP without interpolation), and the exact form equals the pairwise one."""
    logits, where, quality = detector_like(positives, 500)
    errors = torch.rand(positives)
    for loss in (
        lambda method: sum(rank_sort_loss(logits, where, quality, delta=0, method=method)),
        lambda method: average_precision_loss(logits, where, delta=0, method=method),
        lambda method: alrp_loss(logits, where, errors, delta=0, method=method).classification,
        lambda method: ndcg_loss(logits, where, delta=0, method=method),
    ):
        values = {method: loss(method) for method in METHODS}
        gradients = {method: gradient_of(value, logits) for method, value in values.items()}
        for method in ("bucketed", "exact"):
            assert torch.allclose(values[method], values["pairwise"], atol=1e-13, rtol=0)
            assert torch.allclose(gradients[method], gradients["pairwise"], atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("delta", [0, 0.5, 1.0])
def test_positives_and_negatives_get_equal_shares(method, delta):
    """AP loss and aLRP, Theorem 2: the magnitudes of the gradients of positives and of negatives sum to the same."""
    logits, where, _ = detector_like(20, 400)
    for loss in (
        average_precision_loss(logits, where, delta=delta, method=method),
        average_precision_loss(logits, where, delta=delta, method=method, interpolate=True),
        alrp_loss(logits, where, torch.rand(20), delta=delta, method=method).classification,
        ndcg_loss(logits, where, delta=delta, method=method),
    ):
        gradient = gradient_of(loss, logits)
        own = gradient[where].clone()
        gradient[where] = 0
        assert (own <= 0).all() and (gradient >= 0).all()
        assert gradient.sum().item() == pytest.approx(-own.sum().item(), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_loss_is_the_sum_of_its_update(method):
    """With target 0, the AP loss and the ranking term equal the summed gradients of the negatives."""
    logits, where, quality = detector_like(20, 400)
    negatives = torch.ones(420, dtype=torch.bool)
    negatives[where] = False
    for loss in (
        average_precision_loss(logits, where, method=method),
        rank_sort_loss(logits, where, quality, method=method).ranking,
    ):
        assert gradient_of(loss, logits)[negatives].sum().item() == pytest.approx(loss.item(), rel=1e-9)


def test_perfect_ranking_costs_nothing():
    logits = torch.linspace(10, -10, 21, dtype=torch.float64)
    where = torch.arange(5)
    quality = torch.linspace(0.9, 0.5, 5)
    for method in METHODS:
        assert all(term == 0 for term in rank_sort_loss(logits, where, quality, method=method))
        assert average_precision_loss(logits, where, method=method) == 0
        assert ndcg_loss(logits, where, delta=0, method=method).item() == pytest.approx(0, abs=1e-12)


def test_ndcg_by_hand():
    """Positives at ranks 1 and 3 of 4."""
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    discount = 1 / torch.tensor([2.0, 3.0, 4.0]).log2()
    wanted = 1 - (discount[0] + discount[2]) / (discount[0] + discount[1])
    for method in METHODS:
        assert ndcg_loss(logits, torch.tensor([0, 2]), delta=0, method=method).item() == pytest.approx(wanted.item())


def test_interpolation_takes_the_best_precision_at_higher_recall():
    """Positives at ranks 2 and 3: precisions 1/2 and 2/3, and the first is raised to 2/3."""
    logits = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    where = torch.tensor([1, 2])
    for method in METHODS:
        plain = average_precision_loss(logits, where, delta=0, method=method)
        raised = average_precision_loss(logits, where, delta=0, method=method, interpolate=True)
        assert plain.item() == pytest.approx(1 - (1 / 2 + 2 / 3) / 2)
        assert raised.item() == pytest.approx(1 - 2 / 3)


@pytest.mark.parametrize("method", METHODS)
def test_terms_carry_their_own_gradient(method):
    logits, where, quality = detector_like(20, 100)
    ranking, sorting = rank_sort_loss(logits, where, quality, method=method)
    of_ranking, of_sorting = gradient_of(ranking, logits), gradient_of(sorting, logits)
    assert of_sorting.count_nonzero() <= 20 and of_sorting.abs().sum() > 0
    assert torch.allclose(gradient_of(3 * ranking - 0.5 * sorting, logits), 3 * of_ranking - 0.5 * of_sorting)
    assert of_sorting.sum().abs() < 1e-12
