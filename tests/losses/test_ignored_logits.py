"""Logits that a ranking leaves out, and box terms with fixed weights: what a set of denoising queries needs."""

import pytest
import torch
from losses_reference import gradient_of

from brs_detr.losses import (
    PredictionSet,
    RankingObjective,
    ScoreObjective,
    SubsetLoss,
    alrp_loss,
    average_precision_loss,
    ndcg_loss,
    rank_sort_loss,
)
from brs_detr.losses.objective import RANKING_LOSSES

ROWS, CLASSES, POSITIVES, LAYERS = 24, 4, 5, 3
WEIGHTS = {"l1": 5.0, "giou": 2.0}


def problem(seed=0, layers=LAYERS):
    """A set with L rankings in which a sixth of the logits and a fifth of the rows, none of them positive, are out."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, ROWS, CLASSES, generator=generator).requires_grad_()
    rows = torch.stack([torch.randperm(ROWS, generator=generator)[:POSITIVES].sort().values for _ in range(layers)])
    own = torch.randint(CLASSES, (layers, POSITIVES), generator=generator)
    labels = torch.full((layers, ROWS), CLASSES).scatter(1, rows, own)
    valid = (torch.rand(layers, ROWS, generator=generator) < 0.8).scatter(1, rows, True)
    ignored = torch.rand(layers, ROWS, CLASSES, generator=generator) < 1 / 6
    ignored.flatten(1).scatter_(1, rows * CLASSES + own, False)
    boxes = {name: torch.rand(layers, POSITIVES, generator=generator).requires_grad_() for name in WEIGHTS}
    quality = torch.rand(layers, POSITIVES, generator=generator)
    return PredictionSet(logits, labels, quality, boxes, rows=rows, valid=valid, ignored=ignored)


def layer_of(found, layer):
    """One of the sets, as a set without the leading dimension, and its leaves."""
    leaves = found.logits[layer].detach().requires_grad_(), found.box_losses["giou"][layer].detach().requires_grad_()
    boxes = {"l1": found.box_losses["l1"][layer].detach(), "giou": leaves[1]}
    parts = {name: getattr(found, name)[layer] for name in ("labels", "quality", "rows", "valid", "ignored")}
    return PredictionSet(logits=leaves[0], box_losses=boxes, **parts), leaves


def ranking_of_the_others(found, name):
    """The ranking terms of one set whose logits that do not count are not there at all, pair by pair."""
    family, method, delta = RANKING_LOSSES[name]
    counted = [
        (row, column)
        for row in range(ROWS)
        for column in range(CLASSES)
        if found.valid[row] and not found.ignored[row, column]
    ]
    positives = torch.tensor([counted.index((row, int(found.labels[row]))) for row in found.rows.tolist()])
    logits = torch.stack([found.logits[place] for place in counted])
    how = {"delta": delta, "method": "pairwise" if method == "exact" else method}
    if family == "rank_sort":
        return [*rank_sort_loss(logits, positives, found.quality, **how)]
    if family == "average_precision":
        return [average_precision_loss(logits, positives, interpolate=method == "exact", **how)]
    if family == "ndcg":
        return [ndcg_loss(logits, positives, **how)]
    return [alrp_loss(logits, positives, found.box_losses["giou"] / 2 / 0.5, **how)[0]]


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_the_ranking_is_that_without_the_ignored_logits(name):
    """Value and gradient, of one set as of several in one call."""
    together = problem()
    objective = RankingObjective(name, weight=3.0, box_weights=WEIGHTS)
    terms = objective(together)
    ranked = [terms[key] for key in ("rank", "sort") if key in terms]
    gradient = gradient_of(sum(term.sum() for term in ranked), together.logits)
    assert (gradient[together.ignored] == 0).all() and (gradient[~together.valid] == 0).all()
    for layer in range(LAYERS):
        alone, (logits, _) = layer_of(together, layer)
        expected = ranking_of_the_others(alone, name)
        single = objective(alone)
        for term, one, own in zip(ranked, expected, (single[key] for key in ("rank", "sort") if key in single)):
            torch.testing.assert_close(term[layer], 3 * one, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(own, 3 * one, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient[layer], 3 * gradient_of(sum(expected), logits), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", RANKING_LOSSES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_ignored_logit_may_be_anything(name, value):
    found, spoiled = problem(), problem()
    with torch.no_grad():
        spoiled.logits[spoiled.ignored] = value
    for score_weighted in (False, True):  # by the highest class probability of those that count
        objective, results = RankingObjective(name, box_weights=WEIGHTS, score_weighted=score_weighted), []
        for one in (found, spoiled):
            terms = objective(one)
            results.append((terms, gradient_of(sum(term.sum() for term in terms.values()), one.logits)))
        (terms, gradient), (again, same) = results
        assert all(torch.equal(terms[key], again[key]) for key in terms) and torch.equal(gradient, same)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_fixed_weights_are_those_of_means_and_nothing_else_moves_the_boxes(name):
    """Whatever the ranking, its weight or a balance; also aLRP's boxes, which are no part of its gradient then."""
    found = problem()
    terms = RankingObjective(name, weight=7.0, box_weight=11.0, balanced=False, box_weights=WEIGHTS)(found)
    for key, weight in WEIGHTS.items():
        torch.testing.assert_close(terms[key], weight * found.box_losses[key].mean(1))
        gradient = gradient_of(sum(term.sum() for term in terms.values()), found.box_losses[key])
        torch.testing.assert_close(gradient, torch.full_like(gradient, weight / POSITIVES))
    balanced = RankingObjective(name, weight=7.0, box_weight=11.0)(found)
    assert all(not torch.allclose(balanced[key], terms[key]) for key in WEIGHTS)
    assert all(torch.equal(balanced[key], terms[key]) for key in ("rank", "sort") if key in terms)


def test_fixed_weights_of_losses_of_some_positives():
    found, _ = layer_of(problem(), 0)
    some = SubsetLoss(torch.tensor([0.5, 0.25]), torch.tensor([3, 1]))
    terms = RankingObjective("brs", box_weights={"mask": 4.0})(found._replace(box_losses={"mask": some}))
    torch.testing.assert_close(terms["mask"], torch.tensor(4 * 0.375))


def test_fixed_weights_without_a_positive_are_zeros_on_the_graph():
    found = problem()
    nothing = torch.zeros(LAYERS, 0)
    empty = found._replace(
        labels=torch.full((LAYERS, ROWS), CLASSES),
        rows=nothing.long(),
        quality=nothing,
        box_losses={name: nothing.clone().requires_grad_() for name in WEIGHTS},
    )
    for rows in (ROWS, 0):  # in a batch without objects there is no denoising row at all
        one = empty._replace(
            logits=found.logits[:, :rows],
            labels=empty.labels[:, :rows],
            valid=found.valid[:, :rows],
            ignored=found.ignored[:, :rows],
        )
        for name in RANKING_LOSSES:
            terms = RankingObjective(name, box_weights=WEIGHTS)(one)
            assert all(term.shape == (LAYERS,) and (term == 0).all() for term in terms.values())
            assert (gradient_of(sum(term.sum() for term in terms.values()), found.logits) == 0).all()


def test_weights_of_boxes_are_checked():
    with pytest.raises(ValueError, match=r"box_weights\['giou'\]: -2\.0 is out of range"):
        RankingObjective("brs", box_weights={"l1": 5.0, "giou": -2.0})
    for weights in ({"l1": 5.0}, {}):
        with pytest.raises(ValueError, match=r"no weight for the box loss '(giou|l1)': add it to box_weights"):
            RankingObjective("brs", box_weights=weights)(problem())
    weights = dict(WEIGHTS)
    objective = RankingObjective("brs", box_weights=weights)
    weights["l1"] = 0.0
    torch.testing.assert_close(objective(problem())["l1"], 5 * problem().box_losses["l1"].mean(1))


def test_ignored_logits_are_checked():
    found = problem()
    objective = RankingObjective("brs")
    for wrong in (found.ignored.int(), found.ignored[:, :, :3], found.ignored[0]):
        with pytest.raises(
            ValueError, match=r"ignored: torch\.(int32|bool) of shape .* does not match logits of shape"
        ):
            objective(found._replace(ignored=wrong))
    first = int(found.rows[0, 0])
    of_a_positive = found.ignored.clone()
    of_a_positive[0, first, found.labels[0, first]] = True
    with pytest.raises(ValueError, match=r"positives: index \d+ is ignored by valid"):
        objective(found._replace(ignored=of_a_positive))


@pytest.mark.parametrize("loss", ["focal", "quality_focal", "binary_cross_entropy"])
def test_score_based_losses_refuse_ignored_logits(loss):
    with pytest.raises(ValueError, match=r"ignored: score-based losses count all logits of a row"):
        ScoreObjective(loss, {"cls": 1, **WEIGHTS})(problem())
