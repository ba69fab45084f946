"""Weights of the localization terms: continuous near a perfect ranking, and aLRP's factors as recorded."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from brs_detr.losses import EpochBalance, PredictionSet, RankingObjective, rank_sort_loss, self_balance
from brs_detr.losses.balance import MIN_TARGET

RECORDED = json.loads((Path(__file__).resolve().parents[1] / "golden" / "alrp_balance.json").read_text())
LABELS, ROWS, QUALITY = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 3]), torch.tensor([0.9, 0.8])


def test_the_value_is_that_of_the_ranking_down_to_the_least_target():
    term = torch.tensor(0.25, requires_grad=True)
    for target in (MIN_TARGET, 0.3, 1.5):
        assert self_balance(term, torch.tensor(target), 2.0).item() == pytest.approx(2 * target)
    assert self_balance(term, torch.tensor(MIN_TARGET / 10), 2.0).item() == pytest.approx(2 * MIN_TARGET)
    assert self_balance(term, torch.tensor(MIN_TARGET / 10), 2.0, min_target=0.0).item() == pytest.approx(
        2 * MIN_TARGET / 10
    )


def test_the_ratio_obeys_its_cap():
    assert self_balance(torch.tensor(1e-9), torch.tensor(1.0), 2.0, cap=10.0) == pytest.approx(2e-8)


def box_gradient(gap: float) -> float:
    """Gradient of the boxes where the positives lie `gap` above the negatives (the step is 0.5 wide on either side)."""
    logits = torch.tensor([[gap], [0.0], [0.0], [gap]], requires_grad=True)
    boxes = torch.tensor([0.2, 0.2], requires_grad=True)
    terms = RankingObjective("rs")(
        PredictionSet(logits, LABELS, quality=QUALITY, box_losses={"giou": boxes}, rows=ROWS)
    )
    terms["giou"].backward()
    return boxes.grad.sum().item()


def test_boxes_are_pulled_without_a_cliff_as_the_ranking_becomes_perfect():
    gaps = [0.0, 0.2, 0.4, 0.45, 0.49, 0.499, 0.49999, 0.5, 0.6, 2.0]
    pulls = [box_gradient(gap) for gap in gaps]
    assert all(earlier >= later - 1e-6 for earlier, later in pairwise(pulls))
    assert pulls[-1] == pytest.approx(2 * MIN_TARGET / 0.2)
    assert pulls[-4] == pytest.approx(pulls[-1], rel=1e-4)


def test_a_ranking_that_is_not_nearly_perfect_balances_as_published():
    logits = torch.randn(4, 1, requires_grad=True)
    logits.data[ROWS] -= 2
    ranking = sum(rank_sort_loss(logits, ROWS, QUALITY))
    assert ranking > MIN_TARGET
    boxes = {"giou": torch.rand(2)}
    terms = RankingObjective("rs", 2.0)(PredictionSet(logits, LABELS, quality=QUALITY, box_losses=boxes, rows=ROWS))
    assert terms["giou"].item() == pytest.approx(2 * ranking.item(), rel=1e-5)


def test_alrp_factors_are_those_recorded_from_the_official_head():
    balance = EpochBalance(RECORDED["period"], RECORDED["start"])
    for step in RECORDED["iterations"]:
        localization = torch.tensor(0.0 if step["empty"] else step["loc_unweighted"])
        value = balance(torch.tensor(step["loss_cls"]), localization, 0 if step["empty"] else 5)
        assert value.item() == pytest.approx(step["loss_bbox_weighted"], rel=1e-6)
        assert balance.factor.item() == pytest.approx(step["weight_after"], rel=1e-6)


def alrp_step(objective, labels=LABELS):
    rows = (labels == 0).nonzero()[:, 0]
    boxes = torch.full((len(rows),), 0.3, requires_grad=True)
    logits = torch.tensor([[0.0], [1.0], [0.5], [0.2]])
    return objective(PredictionSet(logits, labels, quality=QUALITY[: len(rows)], box_losses={"giou": boxes}, rows=rows))


def test_an_objective_counts_steps_with_objects_and_uses_the_factor_that_they_give():
    objective = RankingObjective("alrp", weight=1.0, period=2)
    first = alrp_step(objective)
    localization = first["giou"].item() / 50
    alrp_step(objective, torch.ones(4, dtype=torch.int64))
    assert objective.epoch_balance.factor == 50
    ratio = (first["rank"].item() + localization) / localization
    second = alrp_step(objective)
    assert second["giou"].item() == pytest.approx(ratio * localization, rel=1e-5)
    second["giou"].backward()


def test_boxes_of_a_nearly_perfect_ranking_are_still_balanced_against_the_least_value():
    balance, paper = EpochBalance(2), EpochBalance(2, min_target=0.0)
    for _ in range(2):
        for one in (balance, paper):
            one(torch.tensor(0.0), torch.tensor(MIN_TARGET / 4))
    assert balance.factor == pytest.approx(4) and paper.factor == 1
    assert RankingObjective("alrp", min_target=0.3).epoch_balance.min_target == 0.3


def test_a_step_that_is_not_finite_does_not_spoil_the_factor():
    balance = EpochBalance(2)
    for value in (0.5, torch.nan, torch.inf, 0.5):
        balance(torch.tensor(0.5), torch.tensor(value))
    assert balance.factor == 2


def test_in_evaluation_nothing_is_counted():
    balance = EpochBalance(1).eval()
    balance(torch.tensor(0.5), torch.tensor(0.5))
    assert balance.factor == 50 and not balance.sums.any()
