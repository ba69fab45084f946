"""Several rankings or sets in one call: what as many single calls return, for every loss, method and objective."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_reference import gradient_of
from torch.utils._python_dispatch import TorchDispatchMode

from brs_detr.losses import (
    PredictionSet,
    RankingObjective,
    ScoreObjective,
    SharedCount,
    SubsetLoss,
    alrp_loss,
    average_precision_loss,
    by_device,
    dominance,
    ndcg_loss,
    rank_sort_loss,
    watch_gradients,
)
from brs_detr.losses.objective import RANKING_LOSSES

LAYERS = 6
METHODS = ["pairwise", "bucketed", "exact"]
LOSSES = {
    "rank_sort": rank_sort_loss,
    "ap": lambda logits, where, quality, **how: (average_precision_loss(logits, where, **how),),
    "interpolated": lambda logits, where, quality, **how: (
        average_precision_loss(logits, where, interpolate=True, **how),
    ),
    "alrp": alrp_loss,
    "ndcg": lambda logits, where, quality, **how: (ndcg_loss(logits, where, **how),),
}
WEIGHT = torch.tensor([1.0, 0.5, 2.0, -1.0, 3.0, 0.25], dtype=torch.float64)


def rankings(length: int, positives: int, layers: int = LAYERS, ties: bool = False):
    """Logits (L, M) with an infinite negative in each, positives and qualities (L, P), valid (L, M)."""
    logits = torch.randn(layers, length, dtype=torch.float64)
    if ties:
        logits = (logits * 3).round() / 3
    where = torch.stack([torch.randperm(length)[:positives] for _ in range(layers)])
    valid = torch.rand(layers, length) < 0.9
    for layer in range(layers):
        negative = int((~torch.isin(torch.arange(length), where[layer])).nonzero()[layer])
        logits[layer, negative] = torch.inf if layer % 2 else -torch.inf
    return logits, where, torch.rand(layers, positives, dtype=torch.float64), valid.scatter(1, where, True)


def together_and_one_by_one(loss, logits, where, quality, valid, **how):
    """Values (T, L) and gradients (L, M) and (L, P) of the weighted sum, of one call and of L calls."""
    results = []
    for single in (False, True):
        leaves = [logits.clone().requires_grad_(), quality.clone().requires_grad_()]
        if single:
            rows = zip(*leaves, where, valid)
            terms = [loss(one, index, error, valid=mask, **how) for one, error, index, mask in rows]
            terms = [torch.stack(term) for term in zip(*terms)]
        else:
            terms = list(loss(leaves[0], where, leaves[1], valid=valid, **how))
        total = sum((term * WEIGHT[: len(term)]).sum() for term in terms)
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        results.append((torch.stack(terms).detach(), *gradients))
    return results


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
def test_one_call_equals_a_call_for_each(name, method, delta, ties):
    assert_same(*together_and_one_by_one(LOSSES[name], *rankings(300, 20, ties=ties), delta=delta, method=method))


@pytest.mark.parametrize(("length", "positives"), [(6000, 14), (6000, by_device.CPU.max_dense + 1)])
@pytest.mark.parametrize("method", ["bucketed", "exact"])
def test_one_call_equals_a_call_for_each_on_the_grid_and_above_the_dense_limit(method, length, positives):
    assert_same(*together_and_one_by_one(rank_sort_loss, *rankings(length, positives), method=method))


@st.composite
def small_rankings(draw):
    """Up to four rankings on a coarse grid, so that much is tied, and a half width."""
    layers, length = draw(st.integers(1, 4)), draw(st.integers(1, 10))
    positives = draw(st.integers(0, length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = torch.randint(-6, 7, (layers, length), generator=generator) * draw(st.sampled_from([0.25, 1.0]))
    where = torch.rand(layers, length, generator=generator).argsort(1)[:, :positives]
    quality = torch.randint(0, 5, (layers, positives), generator=generator) / 4
    valid = (torch.rand(layers, length, generator=generator) < 0.7).scatter(1, where, True)
    return (logits.double(), where, quality.double(), valid), draw(st.sampled_from([0.0, 0.25, 1.0]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=15, deadline=None)
@given(small_rankings())
def test_any_small_rankings(name, method, problem):
    arguments, delta = problem
    assert_same(*together_and_one_by_one(LOSSES[name], *arguments, delta=delta, method=method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
def test_any_shape_follows_the_leading_dimension(name, method):
    logits, where, quality, valid = rankings(60, 5)
    flat = LOSSES[name](logits, where, quality, valid=valid, method=method)
    shaped = LOSSES[name](logits.view(6, 3, 20), where, quality, valid=valid.view(6, 3, 20), method=method)
    assert all(torch.equal(a, b) and a.shape == (6,) for a, b in zip(flat, shaped))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
def test_without_positives_zeros_attached_for_each(name, method):
    logits = torch.tensor([[torch.inf, 0.0], [1.0, torch.nan], [2.0, 3.0]], requires_grad=True)
    nothing = torch.zeros(3, 0, dtype=torch.int64)
    for term in LOSSES[name](logits, nothing, torch.zeros(3, 0), method=method):
        torch.testing.assert_close(term, torch.tensor([0.0, torch.nan, 0.0]), equal_nan=True)
        assert (gradient_of(term.sum(), logits) == 0).all()


@pytest.mark.parametrize("length", [200, 6000])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_undefined_in_one_is_undefined_in_no_other(name, method, length):
    logits, where, quality, valid = rankings(length, 6)
    clean = together_and_one_by_one(LOSSES[name], logits, where, quality, valid, method=method)[0]
    logits[1, valid[1].nonzero()[0]] = torch.nan
    logits[3, where[3, 2]] = torch.inf
    values, gradient, _ = together_and_one_by_one(LOSSES[name], logits, where, quality, valid, method=method)[0]
    others = torch.tensor([0, 2, 4, 5])
    assert values[:, [1, 3]].isnan().all() and gradient[[1, 3]].isnan().any(1).all()
    assert torch.equal(values[:, others], clean[0][:, others]) and torch.equal(gradient[others], clean[1][others])


def test_few_matrix_entries_at_a_time(monkeypatch):
    arguments = rankings(300, 20)
    wanted = together_and_one_by_one(rank_sort_loss, *arguments)[0]
    for entries in (0, 2 * 20**2, 5 * 20**2):
        monkeypatch.setattr(dominance, "MAX_ENTRIES", entries)
        assert_same(together_and_one_by_one(rank_sort_loss, *arguments)[0], wanted)


class CountOperations(TorchDispatchMode):
    """Counts what would start a kernel: no views and no allocations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        self.count += not view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view"))
        return function(*args, **(kwargs or {}))


def test_operations_hardly_grow_with_the_layers(monkeypatch):
    """The numbers are those of a GPU, whose way of computing is taken on whatever device this runs."""
    monkeypatch.setattr(by_device, "CPU", by_device.GPU)
    counts = []
    for layers in (1, LAYERS):
        logits, where, quality, _ = rankings(6000, 300, layers)
        logits.requires_grad_()
        with CountOperations() as operations:
            terms = rank_sort_loss(logits, where, quality)
            (terms.ranking + terms.sorting).sum().backward()
        counts.append(operations.count)
    assert counts[1] <= counts[0] + 10 and counts[1] <= 165


ROWS, CLASSES, POSITIVES = 40, 5, 7


def prediction_sets(columns: int, **further):
    """Six sets as one, and its further attributes."""
    rows = torch.stack([torch.randperm(ROWS)[:POSITIVES].sort()[0] for _ in range(LAYERS)])
    labels = torch.full((LAYERS, ROWS), CLASSES).scatter(1, rows, torch.randint(CLASSES, (LAYERS, POSITIVES)))
    quality, l1, giou = (torch.rand(LAYERS, POSITIVES) for _ in range(3))
    logits = torch.randn(LAYERS, ROWS, columns)
    leaves = [values.requires_grad_() for values in (logits, l1, giou)]
    return PredictionSet(logits, labels, quality, {"l1": l1, "giou": giou}, rows=rows, **further), leaves


def layer_of(sets: PredictionSet, k: int) -> PredictionSet:
    """The k-th set alone."""
    one = {name: value[k] for name, value in sets._asdict().items() if isinstance(value, torch.Tensor)}
    return sets._replace(box_losses={name: loss[k] for name, loss in sets.box_losses.items()}, **one)


def objectives():
    for name in RANKING_LOSSES:
        yield name, lambda name=name: RankingObjective(name, score_weighted=True, period=4)
    yield "alrp by value", lambda: RankingObjective("alrp", period=None)
    yield "alrp without balance", lambda: RankingObjective("alrp", period=None, balanced=False)
    weights = {"cls": 2.0, "l1": 5.0, "giou": 2.0}
    for name in ("focal", "cross_entropy", "binary_cross_entropy", "quality_focal"):
        for divisor in ("positives", "rows"):
            yield (
                f"{name} by {divisor}",
                lambda name=name, divisor=divisor: ScoreObjective(name, weights, normalizer=divisor),
            )


@pytest.mark.parametrize("further", ["nothing", "valid", "box weights", "shared count"])
@pytest.mark.parametrize(("name", "make"), objectives(), ids=lambda value: value if isinstance(value, str) else "")
def test_an_objective_returns_what_it_returns_for_each_set(name, make, further):
    """In turn, too: aLRP's balance counts each set as an iteration and changes its factor between two of them."""
    sets, leaves = prediction_sets(CLASSES + name.startswith("cross"))
    if further == "valid":
        sets = sets._replace(valid=(torch.rand(LAYERS, ROWS) < 0.8).scatter(1, sets.rows, True))
    elif further == "box weights":
        sets = sets._replace(box_weight=torch.rand(LAYERS, POSITIVES))
    elif further == "shared count":
        sets = sets._replace(normalizer=SharedCount(11), rows=None)
    objective, same = make(), make()
    watched = watch_gradients(objective)
    together = objective(sets)
    separate = [same(layer_of(sets, k)) for k in range(LAYERS)]
    assert list(together) == list(separate[0])
    for key, term in together.items():
        torch.testing.assert_close(term, torch.stack([terms[key] for terms in separate]), rtol=1e-6, atol=1e-7)
    wanted = torch.autograd.grad(sum(sum(terms.values()) for terms in separate), leaves)
    found = torch.autograd.grad(sum(term.sum() for term in together.values()), leaves)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    if getattr(objective, "epoch_balance", None) is not None:
        assert objective.epoch_balance.factor == same.epoch_balance.factor != 50
    magnitude = sum(sums.take() for sums in watched.values()).sum()
    torch.testing.assert_close(magnitude.float(), wanted[0].abs().sum(), rtol=1e-5, atol=1e-7)


def test_sets_without_positives():
    sets, _ = prediction_sets(CLASSES)
    empty = {name: loss[:, :0] for name, loss in sets.box_losses.items()}
    sets = sets._replace(
        labels=torch.full((LAYERS, ROWS), CLASSES), quality=sets.quality[:, :0], box_losses=empty, rows=sets.rows[:, :0]
    )
    for same in (sets, sets._replace(rows=None)):
        terms = RankingObjective("brs")(same)
        assert all(term.shape == (LAYERS,) and not term.any() and term.requires_grad for term in terms.values())


def test_a_nan_in_one_set_is_in_no_other():
    sets, _ = prediction_sets(CLASSES)
    logits = sets.logits.detach().clone()
    logits[2, 1, 0] = torch.nan
    for objective in (RankingObjective("rs"), RankingObjective("alrp", period=None)):
        terms, clean = (objective(sets._replace(logits=values)) for values in (logits, sets.logits.detach()))
        others = torch.tensor([0, 1, 3, 4, 5])
        assert all(term[2].isnan() for term in terms.values())
        assert all(torch.equal(term[others], clean[key][others]) for key, term in terms.items())


def test_what_does_not_fit_is_refused():
    logits, where, quality, valid = rankings(50, 4)
    with pytest.raises(ValueError, match="positives of 5 rankings for logits"):
        rank_sort_loss(logits, where[:5], quality[:5])
    with pytest.raises(ValueError, match="positives of 6 rankings for logits"):
        rank_sort_loss(logits.flatten(), where, quality)
    with pytest.raises(ValueError, match="quality has shape"):
        rank_sort_loss(logits, where, quality[0])
    twice = where.clone()
    twice[3, 0] = twice[3, 1]
    with pytest.raises(ValueError, match=f"index {int(twice[3, 0])} occurs twice"):
        rank_sort_loss(logits, twice, quality)
    with pytest.raises(ValueError, match="index 50 is out of range for 50 logits"):
        rank_sort_loss(logits, where.index_fill(1, torch.tensor([0]), 50), quality)
    with pytest.raises(ValueError, match=f"index {int(where[2, 1])} is ignored"):
        rank_sort_loss(
            logits, where, quality, valid=valid.index_put((torch.tensor(2), where[2, 1]), torch.tensor(False))
        )


def test_sets_that_do_not_fit_are_refused():
    sets, _ = prediction_sets(CLASSES)
    objective = RankingObjective("rs")
    with pytest.raises(ValueError, match="mask: losses of some of the positives have no leading dimension"):
        objective(sets._replace(box_losses={"mask": SubsetLoss(torch.rand(2), torch.tensor([0, 1]))}))
    with pytest.raises(ValueError, match=r"rows: torch\.int64 of shape"):
        objective(sets._replace(rows=sets.rows[0]))
    with pytest.raises(ValueError, match=r"labels: torch\.int64 of shape"):
        objective(sets._replace(labels=sets.labels[0]))
    with pytest.raises(ValueError, match="giou has shape"):
        objective(sets._replace(box_losses={"giou": sets.box_losses["giou"][0]}))
    wrong = sets.labels.clone()
    wrong[4, 3] = 17
    with pytest.raises(ValueError, match="row 3 of set 4 has label 17"):
        objective(sets._replace(labels=wrong, rows=sets.rows))
    fewer = sets.labels.scatter(1, sets.rows[:, :1] * torch.tensor([1, 0, 0, 0, 0, 0])[:, None], CLASSES)
    with pytest.raises(ValueError, match="the sets differ in their number of positives"):
        objective(sets._replace(labels=fewer, rows=None))
