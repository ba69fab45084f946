"""Edge cases: no logits, no positives, ties, huge logits, half precision, zero qualities, invalid arguments."""

import subprocess
import sys

import pytest
import torch
from losses_reference import detector_like, gradient_of

from brs_detr.losses import alrp_loss, average_precision_loss, ndcg_loss, rank_sort_loss

METHODS = ["pairwise", "bucketed", "exact"]


def all_terms(logits, positives, quality, **how) -> list[torch.Tensor]:
    """Every term of every loss."""
    return [
        *rank_sort_loss(logits, positives, quality, **how),
        average_precision_loss(logits, positives, **how),
        average_precision_loss(logits, positives, interpolate=True, **how),
        *alrp_loss(logits, positives, quality, **how),
        ndcg_loss(logits, positives, **how),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_no_positives(method):
    logits = torch.tensor([torch.inf, -torch.inf, 1.0], requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    terms = all_terms(logits, nothing, torch.zeros(0), method=method)
    assert all(term == 0 for term in terms)
    assert (gradient_of(sum(terms), logits) == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_logits_at_all(method):
    logits = torch.zeros(0, 80, requires_grad=True)
    terms = all_terms(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0), method=method)
    assert all(term.shape == () and term == 0 for term in terms)
    sum(terms).backward()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("delta", [0, 0.5])
def test_only_positives_leave_the_sorting(method, delta):
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    quality = torch.rand(9)
    ranking, sorting = rank_sort_loss(logits, torch.arange(9), quality, delta=delta, method=method)
    assert ranking == 0 and sorting > 0
    assert average_precision_loss(logits, torch.arange(9), delta=delta, method=method) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("delta", [0, 0.5])
def test_all_tied(method, delta):
    """Every logit equal: each of P positives sees N negatives, all at H(0)."""
    logits = torch.full((30,), 0.7, requires_grad=True)
    ranking, sorting = rank_sort_loss(logits, torch.arange(10), torch.full((10,), 0.5), delta=delta, method=method)
    assert ranking.item() == pytest.approx(20 / 30) and sorting == 0
    gradient = gradient_of(ranking, logits)
    assert torch.allclose(gradient[10:], torch.full((20,), 1 / 30))
    assert torch.allclose(gradient[:10], torch.full((10,), -1 / 15))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("delta", [0, 0.5, 1.0])
def test_huge_logits(method, delta):
    """Logits of +-1e4 rank as their signs do."""
    logits, where, quality = detector_like(20, 200)
    huge = (logits.detach().sign() * 1e4).requires_grad_()
    small = (logits.detach().sign() * 10).requires_grad_()
    terms = all_terms(huge, where, quality, delta=delta, method=method)
    wanted = all_terms(small, where, quality, delta=delta, method=method)
    assert torch.allclose(torch.stack(terms), torch.stack(wanted), atol=1e-10)
    assert torch.allclose(gradient_of(sum(terms), huge), gradient_of(sum(wanted), small), atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_infinite_negatives_rank_first_and_last(method):
    logits = torch.tensor([torch.inf, 0.0, -torch.inf, -torch.inf], requires_grad=True)
    terms = all_terms(logits, torch.tensor([1]), torch.tensor([0.5]), delta=0.0, method=method)
    assert terms[0] == 0.5
    gradient = gradient_of(terms[0], logits)
    assert gradient.tolist() == [0.5, -0.5, 0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_zero_quality_stays_positive(method):
    logits, where, _ = detector_like(10, 100)
    ranking, sorting = rank_sort_loss(logits, where, torch.zeros(10), method=method)
    assert ranking > 0 and sorting.abs() < 1e-12
    assert (gradient_of(ranking, logits)[where] < 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_quality_gets_no_gradient(method):
    logits, where, quality = detector_like(10, 100)
    quality.requires_grad_()
    sum(rank_sort_loss(logits, where, quality, method=method)).backward()
    assert quality.grad is None


@pytest.mark.parametrize("method", METHODS)
def test_alrp_localization_part_trains_the_boxes(method):
    """The box of the best positive weighs in every rank, that of the worst only in its own."""
    logits, where, errors = detector_like(10, 50)
    errors.requires_grad_()
    part = alrp_loss(logits, where, errors, method=method)
    gradient = gradient_of(part.localization, errors)
    order = logits.detach()[where].argsort()
    assert (gradient[order].diff() > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_under_autocast(method):
    logits, where, quality = detector_like(30, 300, torch.float32)
    half = logits.detach().bfloat16()
    wanted = half.float().requires_grad_()
    leaf = half.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = all_terms(leaf, where, quality.bfloat16(), method=method)
    reference = all_terms(wanted, where, quality.bfloat16(), method=method)
    assert all(term.dtype == torch.float32 for term in terms)
    assert all(torch.equal(a, b) for a, b in zip(terms, reference))
    for term, same in zip(terms[:5], reference):
        gradient = gradient_of(term, leaf)
        assert gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, gradient_of(same, wanted).bfloat16())


@pytest.mark.parametrize("method", METHODS)
def test_any_shape_means_the_flat_list(method):
    logits, where, quality = detector_like(10, 110)
    valid = torch.rand(120) < 0.8
    valid[where] = True
    flat = all_terms(logits, where, quality, valid=valid, method=method)
    shaped = all_terms(logits.view(2, 15, 4), where, quality, valid=valid.view(2, 15, 4), method=method)
    assert all(torch.equal(a, b) for a, b in zip(flat, shaped))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("delta", [0, 0.5])
def test_repeats_bit_for_bit(method, delta):
    torch.use_deterministic_algorithms(True)
    try:
        logits, where, quality = detector_like(500 if method == "exact" else 50, 5000, torch.float32)
        runs = []
        for _ in range(2):
            terms = all_terms(logits, where, quality, delta=delta, method=method)
            runs.append([*terms, gradient_of(sum(terms), logits)])
        assert all(torch.equal(a, b) for a, b in zip(*runs))
    finally:
        torch.use_deterministic_algorithms(False)


def test_trivial_negatives_get_exactly_nothing():
    logits = torch.cat([torch.randn(20) + 5, torch.randn(5000) - 5]).requires_grad_()
    for method in ("bucketed", "exact"):
        gradient = gradient_of(sum(rank_sort_loss(logits, torch.arange(20), torch.rand(20), method=method)), logits)
        assert (gradient[20:][logits[20:] < logits[:20].min() - 0.5] == 0).all()


def test_wrong_arguments_are_named():
    logits, where, quality = detector_like(3, 10)
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        rank_sort_loss(logits, where, quality, method="fast")
    with pytest.raises(ValueError, match="at least 0"):
        ndcg_loss(logits, where, delta=-1)
    with pytest.raises(ValueError, match="one value per positive"):
        rank_sort_loss(logits, where, quality[:2])
    with pytest.raises(ValueError, match=r"torch\.int64 indices"):
        average_precision_loss(logits, where.float())
    with pytest.raises(ValueError, match=r"torch\.bool of the logits"):
        alrp_loss(logits, where, quality, valid=torch.ones(4, dtype=torch.bool))


def test_imports_torch_only():
    code = "import sys, brs_detr.losses; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torchvision" not in loaded
    assert all(name.startswith("brs_detr.losses") for name in loaded if name.startswith("brs_detr."))
