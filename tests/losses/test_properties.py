"""Properties that hold for any input, tried on small lists full of ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_reference import bucketed_average_precision, gradient_of

from brs_detr.losses import alrp_loss, average_precision_loss, ndcg_loss, rank_sort_loss

FAST = settings(max_examples=40, deadline=None)
LOSSES = ["rank", "sort", "ap", "interpolated", "alrp", "ndcg"]
DELTAS = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def problems(draw):
    """Logits on a coarse grid, positives, their qualities on a coarse grid, and a mask that spares the positives."""
    size = draw(st.integers(1, 14))
    logits = draw(st.lists(st.integers(-6, 6), min_size=size, max_size=size))
    positives = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    quality = draw(st.lists(st.integers(0, 4), min_size=len(positives), max_size=len(positives)))
    valid = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    valid[positives] = True
    scale = draw(st.sampled_from([0.25, 1.0]))
    return (
        torch.tensor(logits, dtype=torch.float64).mul(scale).requires_grad_(),
        torch.tensor(positives),
        torch.tensor(quality, dtype=torch.float64) / 4,
        valid,
    )


def evaluate(name: str, problem, delta: float, method: str):
    """Value and gradient of one loss; the quality doubles as localization error."""
    logits, positives, quality, valid = problem
    how = {"valid": valid, "delta": delta, "method": method}
    if name in ("rank", "sort"):
        value = rank_sort_loss(logits, positives, quality, **how)[("rank", "sort").index(name)]
    elif name == "alrp":
        value = alrp_loss(logits, positives, quality, **how).classification
    elif name == "ndcg":
        value = ndcg_loss(logits, positives, **how)
    else:
        value = average_precision_loss(logits, positives, interpolate=name == "interpolated", **how)
    return value.detach(), gradient_of(value, logits)


def same(first, second, tolerance: float = 1e-12) -> bool:
    return all(torch.allclose(a, b, atol=tolerance, rtol=0) for a, b in zip(first, second))


@pytest.mark.parametrize("name", LOSSES)
@FAST
@given(problems(), DELTAS)
def test_exact_equals_pairwise(name, problem, delta):
    assert same(evaluate(name, problem, delta, "exact"), evaluate(name, problem, delta, "pairwise"))


@pytest.mark.parametrize("name", LOSSES)
@FAST
@given(problems())
def test_bucketed_equals_pairwise_at_delta_zero_even_with_ties(name, problem):
    assert same(evaluate(name, problem, 0.0, "bucketed"), evaluate(name, problem, 0.0, "pairwise"))


@FAST
@given(problems(), DELTAS)
def test_bucketed_equals_the_walk_down_the_list(problem, delta):
    logits, positives, _, valid = problem
    negative = valid.clone()
    negative[positives] = False
    wanted = bucketed_average_precision(logits.detach(), positives, negative, delta)
    assert same(evaluate("rank", problem, delta, "bucketed"), wanted)


@pytest.mark.parametrize("method", ["bucketed", "exact"])
@pytest.mark.parametrize("name", LOSSES)
@FAST
@given(problems(), DELTAS, st.randoms(use_true_random=False))
def test_order_of_the_input_does_not_matter(name, method, problem, delta, random):
    logits, positives, quality, valid = problem
    order = list(range(len(logits)))
    random.shuffle(order)
    order = torch.tensor(order)
    place = order.argsort()
    shuffle = torch.tensor(random.sample(range(len(positives)), len(positives)))
    value, gradient = evaluate(name, problem, delta, method)
    shuffled = (logits.detach()[order].requires_grad_(), place[positives[shuffle]], quality[shuffle], valid[order])
    assert same(evaluate(name, shuffled, delta, method), (value, gradient[order]))


@pytest.mark.parametrize("method", ["bucketed", "exact"])
@pytest.mark.parametrize("name", LOSSES)
@FAST
@given(problems(), DELTAS, st.sampled_from([-1000.0, 3.5, 2.0**30]))
def test_only_differences_of_logits_matter(name, method, problem, delta, shift):
    logits, *rest = problem
    moved = ((logits.detach() + shift).requires_grad_(), *rest)
    assert same(evaluate(name, moved, delta, method), evaluate(name, problem, delta, method), 1e-9)


@pytest.mark.parametrize("method", ["pairwise", "bucketed", "exact"])
@pytest.mark.parametrize("name", LOSSES)
@FAST
@given(problems(), DELTAS)
def test_gradients_balance_and_spare_ignored_entries(name, method, problem, delta):
    value, gradient = evaluate(name, problem, delta, method)
    assert value.isfinite() and gradient.isfinite().all()
    assert abs(gradient.sum()) < 1e-12
    assert (gradient[~problem[3]] == 0).all()
