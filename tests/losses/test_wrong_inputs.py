"""Invalid inputs raise or show in the loss: NaN and infinity, labels, indices, settings, half precision."""

import warnings

import pytest
import torch
from losses_reference import detector_like, gradient_of

from brs_detr.losses import (
    EpochBalance,
    PredictionSet,
    RankingObjective,
    ScoreObjective,
    alrp_loss,
    average_precision_loss,
    ndcg_loss,
    paired_giou_loss,
    paired_iou,
    rank_sort_loss,
    ranking,
)
from brs_detr.losses.checks import accumulation_dtype
from brs_detr.losses.objective import RANKING_LOSSES

METHODS = ["pairwise", "bucketed", "exact"]
LOSSES = {
    "rank": lambda logits, where, quality, **how: rank_sort_loss(logits, where, quality, **how).ranking,
    "sort": lambda logits, where, quality, **how: rank_sort_loss(logits, where, quality, **how).sorting,
    "ap": lambda logits, where, quality, **how: average_precision_loss(logits, where, **how),
    "interpolated": lambda logits, where, quality, **how: average_precision_loss(
        logits, where, interpolate=True, **how
    ),
    "alrp": lambda logits, where, quality, **how: alrp_loss(logits, where, quality, **how).classification,
    "alrp boxes": lambda logits, where, quality, **how: alrp_loss(logits, where, quality, **how).localization,
    "ndcg": lambda logits, where, quality, **how: ndcg_loss(logits, where, **how),
}
SIZES = [200, 6000]  # the CPU looks logits up in another way from 4096 on


def problem(size: int):
    """Logits whose entry 0 is a negative far below all positives, six positives, qualities."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size))
    where = torch.tensor([3, 17, 50, 90, 120, 199])
    logits[where] += 1
    logits[0] = -50
    return logits, where, torch.linspace(0.3, 0.9, 6)


@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_shows_in_the_loss_and_its_gradient(name, method, size, delta):
    for entry in (0, 1, 17):  # a negative below and one among the positives, a positive
        logits, where, quality = problem(size)
        logits[entry] = torch.nan
        logits.requires_grad_()
        loss = LOSSES[name](logits, where, quality.requires_grad_(), delta=delta, method=method)
        assert loss.isnan()
        if name != "alrp boxes":
            assert gradient_of(loss, logits).isnan().any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_shows_without_positives_too(name, method):
    logits = torch.tensor([1.0, torch.nan], requires_grad=True)
    assert LOSSES[name](logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0), method=method).isnan()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
def test_an_infinite_positive_has_no_rank(name, method):
    for value in (torch.inf, -torch.inf):
        logits, where, quality = problem(200)
        logits[17] = value
        assert LOSSES[name](logits, where, quality, method=method).isnan()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["rank", "sort", "alrp", "alrp boxes"])
def test_a_quality_that_is_nan_shows(name, method):
    logits, where, quality = problem(200)
    quality[2] = torch.nan
    assert LOSSES[name](logits, where, quality, method=method).isnan()


@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
def test_an_ignored_value_changes_nothing(name, method, size, delta):
    logits, where, quality = problem(size)
    valid = torch.ones(size, dtype=torch.bool)
    valid[[0, 1, 2, 5]] = False
    results = []
    for values in (torch.tensor([-50.0, 0.1, 0.2, 0.3]), torch.tensor([torch.nan, torch.nan, torch.inf, -torch.inf])):
        logits = logits.detach().clone()
        logits[[0, 1, 2, 5]] = values
        leaf, errors = logits.requires_grad_(), quality.clone().requires_grad_()
        loss = LOSSES[name](leaf, where, errors, valid=valid, delta=delta, method=method)
        results.append((loss.detach(), gradient_of(loss, errors if name == "alrp boxes" else leaf)))
    (value, gradient), (again, same) = results
    assert torch.equal(value, again) and torch.equal(gradient, same) and gradient.isfinite().all()
    assert name == "alrp boxes" or (gradient[~valid] == 0).all()


@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
def test_an_infinite_negative_ranks_as_a_huge_one(name, method, size, delta):
    results = []
    for high in (torch.inf, 1e4):
        logits, where, quality = problem(size)
        logits[1], logits[2] = high, -high
        leaf, errors = logits.requires_grad_(), quality.requires_grad_()
        loss = LOSSES[name](leaf, where, errors, delta=delta, method=method)
        results.append((loss.detach(), gradient_of(loss, errors if name == "alrp boxes" else leaf)))
    for infinite, huge in zip(*results):
        torch.testing.assert_close(infinite, huge, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", RANKING_LOSSES)
def test_an_objective_shows_a_nan_and_ignores_an_ignored_one(loss):
    labels, rows = torch.full((2000,), 3), torch.tensor([4, 9])
    labels[rows] = torch.tensor([0, 2])
    for ignored in (False, True):
        logits = torch.randn(2000, 3)
        logits[7, 1] = torch.nan
        logits.requires_grad_()
        valid = torch.ones(2000, dtype=torch.bool)
        valid[7] = not ignored
        boxes = {"giou": torch.rand(2, requires_grad=True)}
        terms = RankingObjective(loss)(
            PredictionSet(logits, labels, quality=torch.rand(2), box_losses=boxes, valid=valid, rows=rows)
        )
        total = sum(terms.values())
        assert total.isfinite() == ignored
        assert gradient_of(total, logits).isfinite().all() == ignored


OBJECTIVES = [
    RankingObjective("rs"),
    RankingObjective("bap"),
    ScoreObjective("focal", {"cls": 1}),
    ScoreObjective("quality_focal", {"cls": 1}),
    ScoreObjective("cross_entropy", {"cls": 1}),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: getattr(o, "loss", None) or o.classification)
def test_objectives_refuse_labels_that_no_class_has(objective):
    columns = 3 + (getattr(objective, "classification", "") == "cross_entropy")
    logits, labels, rows = torch.randn(6, columns), torch.tensor([3, 0, 3, 2, 3, 3]), torch.tensor([1, 3])

    def run(labels=labels, rows=rows, **more):
        return objective(PredictionSet(logits, labels, quality=torch.rand(2), box_losses={}, rows=rows, **more))

    run()
    ignored = torch.tensor([True, True, True, True, True, False])
    run(torch.tensor([3, 0, 3, 2, 3, -1]), valid=ignored)
    for label in (-1, 4, 91):
        with pytest.raises(ValueError, match=f"labels: row 4 has label {label}"):
            run(torch.tensor([3, 0, 3, 2, label, 3]))
    with pytest.raises(ValueError, match="rows: row 3 has label 3 and is background"):
        run(torch.tensor([3, 0, 3, 3, 3, 3]))
    with pytest.raises(ValueError, match="rows: row 3 has label 2 and is background or ignored"):
        run(valid=torch.tensor([True, True, True, False, True, True]))
    for kind in (torch.int32, torch.float32, torch.bool):
        with pytest.raises(ValueError, match="labels: torch"):
            run(labels.to(kind))
    with pytest.raises(ValueError, match=r"labels: torch\.int64 of shape"):
        run(labels[:5])
    with pytest.raises(ValueError, match=r"valid: torch\.uint8"):
        run(valid=ignored.to(torch.uint8))
    with pytest.raises(ValueError, match=r"rows: torch\.int32"):
        run(rows=rows.int())
    with pytest.raises(ValueError, match="logits: shape"):
        objective(PredictionSet(logits[None, None], labels, quality=torch.rand(2), box_losses={}, rows=rows))


def test_objectives_refuse_box_losses_of_other_positives():
    objective = RankingObjective("rs")
    labels = torch.tensor([1, 0, 0])
    with pytest.raises(ValueError, match="giou has shape"):
        objective(PredictionSet(torch.randn(3, 1), labels, quality=torch.rand(2), box_losses={"giou": torch.rand(3)}))


@pytest.mark.parametrize("name", LOSSES)
def test_positives_are_distinct_indices_of_logits_that_count(name):
    logits, where, quality = problem(200)
    for indices, message in (
        ([3, 17, 50, 17, 120, 199], "index 17 occurs twice"),
        ([3, 17, 50, 90, 120, 200], "index 200 is out of range"),
        ([-1, 17, 50, 90, 120, 199], "index -1 is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            LOSSES[name](logits, torch.tensor(indices), quality)
    valid = torch.ones(200, dtype=torch.bool)
    valid[50] = False
    with pytest.raises(ValueError, match="index 50 is ignored by valid"):
        LOSSES[name](logits, where, quality, valid=valid)


@pytest.mark.parametrize("method", ("pairwise", "bucketed", "exact"))
@pytest.mark.parametrize("wrong", (1.5, -0.2, 70.0, float("inf")))
def test_a_quality_is_a_fraction(wrong, method):
    logits, positives = torch.randn(20), torch.tensor([3, 7])
    with pytest.raises(ValueError, match=rf"quality: {wrong:.4g} is not in \[0, 1\]"):
        rank_sort_loss(logits, positives, torch.tensor([0.5, wrong]), method=method)
    rounded = torch.tensor([0.0, 1.0078125], dtype=torch.bfloat16)  # an IoU of 1 in half precision
    assert all(term.isfinite() for term in rank_sort_loss(logits, positives, rounded, method=method))


@pytest.mark.parametrize("value", [torch.nan, -0.5, torch.inf, -torch.inf])
def test_settings_that_are_no_number_are_refused(value):
    logits, where, quality = problem(200)
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match="delta"):
            loss(logits, where, quality, delta=value)
    for name in ("delta", "tau", "weight", "box_weight", "min_target"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            RankingObjective("alrp", **{name: value})
    for name in ("start", "cap"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            EpochBalance(**{name: value})
    with pytest.raises(ValueError, match=r"^giou: "):
        ScoreObjective("focal", {"cls": 1, "giou": value})
    with pytest.raises(ValueError, match=r"^gamma: "):
        ScoreObjective("focal", {"cls": 1}, gamma=value)


def test_tau_is_below_one():
    with pytest.raises(ValueError, match="tau: 1"):
        RankingObjective("alrp", tau=1)


def test_a_box_with_swapped_corners_is_an_empty_one():
    good = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    for swapped in ([8.0, 2.0, 3.0, 6.0], [8.0, 6.0, 3.0, 2.0], [10.0, 0.0, 0.0, 10.0]):
        for pair in ((good, torch.tensor([swapped])), (torch.tensor([swapped]), good)):
            assert 0 <= paired_giou_loss(*pair).item() <= 2
            assert paired_iou(*pair).item() == 0


def half(size: int = 31108):
    logits, where, quality = detector_like(size // 30, size - size // 30, torch.float32)
    return logits.detach().half().requires_grad_(), where, quality


def test_float16_logits_lose_gradients_unless_the_loss_is_scaled():
    logits, where, quality = half()
    single = logits.detach().float().requires_grad_()
    wanted = gradient_of(sum(rank_sort_loss(single, where, quality)), single)
    with pytest.warns(UserWarning, match="too small for float16"):
        loss = sum(rank_sort_loss(logits, where, quality))
    lost = (gradient_of(loss, logits) == 0) & (wanted != 0)
    assert lost.sum() > 50
    scaled = gradient_of(loss * 2.0**16, logits)
    assert ((scaled == 0) & (wanted.abs() > 1e-11)).sum() == 0
    assert torch.allclose(scaled.float() / 2.0**16, wanted, rtol=1e-3, atol=1e-11)


def test_float16_is_warned_of_only_outside_autocast():
    logits, where, quality = half(500)
    labels = torch.ones(500, dtype=torch.int64).index_fill(0, where, 0)
    objective = RankingObjective("rs")
    with pytest.warns(UserWarning, match="GradScaler"):
        objective(PredictionSet(logits[:, None], labels, quality=quality, box_losses={}, rows=where.sort()[0]))
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")
        objective(PredictionSet(logits[:, None], labels, quality=quality, box_losses={}, rows=where.sort()[0]))
        rank_sort_loss(logits, where, quality)


def test_without_float64_the_sums_are_float32():
    assert accumulation_dtype(torch.device("mps")) == torch.float32
    assert accumulation_dtype(torch.device("cpu")) == accumulation_dtype(torch.device("cuda")) == torch.float64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
def test_float32_sums_are_close(name, method, monkeypatch):
    """What a device without float64 computes: no float64 tensor is made on the way, and the result is near."""
    logits, where, quality = problem(6000)
    leaf = logits.requires_grad_()
    wanted = LOSSES[name](leaf, where, quality.requires_grad_(), method=method)
    of = quality if name == "alrp boxes" else leaf
    gradient = gradient_of(wanted, of)
    for module in ("ranking", "rank_sort", "alrp"):
        monkeypatch.setattr(f"brs_detr.losses.{module}.accumulation_dtype", lambda device: torch.float32)
    with NoDouble():
        loss = LOSSES[name](leaf, where, quality, method=method)
        again = gradient_of(loss, of)
    assert torch.allclose(loss, wanted, rtol=1e-4)
    assert torch.allclose(again, gradient, rtol=1e-3, atol=1e-6)


class NoDouble(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where an operation returns float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, function
        return result


def test_exact_is_what_the_functions_compute_by_default():
    logits, where, quality = problem(6000)
    for name, loss in LOSSES.items():
        by_default = loss(logits, where, quality)
        assert torch.equal(by_default, loss(logits, where, quality, method="exact")), name
    assert ranking.METHODS == ("pairwise", "bucketed", "exact")
