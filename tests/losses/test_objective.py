"""The contract between heads and objectives: names, values, normalization, and what happens at the edges."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from brs_detr.losses import (
    PredictionSet,
    RankingObjective,
    ScoreObjective,
    SharedCount,
    alrp_loss,
    average_precision_loss,
    distributed,
    rank_sort_loss,
)
from brs_detr.losses.objective import RANKING_LOSSES

CLASSES = 4
LABELS = torch.tensor([4, 2, 4, 0, 4, 3, 4, 4])
ROWS = torch.tensor([1, 3, 5])
QUALITY = torch.tensor([0.9, 0.3, 0.6])


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def box_losses() -> dict[str, torch.Tensor]:
    return {"l1": torch.rand(3, requires_grad=True), "giou": torch.rand(3, requires_grad=True)}


def test_ranking_runs_over_all_logits_with_the_own_class_positive():
    logits = leaf(8, CLASSES)
    terms = RankingObjective("brs", weight=3.0)(PredictionSet(logits, LABELS, quality=QUALITY, box_losses={}))
    positives = torch.tensor([1 * 4 + 2, 3 * 4 + 0, 5 * 4 + 3])
    flat = rank_sort_loss(logits, positives, QUALITY, method="bucketed")
    assert torch.allclose(terms["rank"], 3 * flat.ranking) and torch.allclose(terms["sort"], 3 * flat.sorting)


@pytest.mark.parametrize("score_weighted", [False, True])
def test_every_box_term_has_the_value_of_the_ranking_terms(score_weighted):
    objective = RankingObjective("brs", weight=2.0, score_weighted=score_weighted)
    boxes = box_losses()
    terms = objective(PredictionSet(leaf(8, CLASSES), LABELS, quality=QUALITY, box_losses=boxes, rows=ROWS))
    ranking = terms["rank"] + terms["sort"]
    assert torch.allclose(terms["l1"], ranking) and torch.allclose(terms["giou"], ranking)


def test_score_weighting_weighs_each_box():
    logits = torch.full((8, CLASSES), -20.0)
    logits[1, 2], logits[3, 0], logits[5, 3] = 0.0, -20.0, 0.0
    boxes = {"giou": torch.rand(3, requires_grad=True)}
    terms = RankingObjective("rs", score_weighted=True)(
        PredictionSet(logits, LABELS, quality=QUALITY, box_losses=boxes, rows=ROWS)
    )
    terms["giou"].backward()
    gradient = boxes["giou"].grad
    assert gradient[1] < 1e-6 * gradient[0] and torch.isclose(gradient[0], gradient[2])


def test_score_weights_send_no_gradient_into_the_logits():
    logits, boxes = leaf(8, CLASSES), box_losses()
    objective = RankingObjective("brs", score_weighted=True)
    objective(PredictionSet(logits, LABELS, quality=QUALITY, box_losses=boxes, rows=ROWS))["giou"].backward()
    assert not logits.grad.any() and boxes["giou"].grad.any()


def test_quality_is_a_target_without_gradient():
    quality = QUALITY.clone().requires_grad_()
    for objective in (ScoreObjective("quality_focal", {"cls": 1}), RankingObjective()):
        sum(objective(PredictionSet(leaf(8, CLASSES), LABELS, quality=quality, box_losses={})).values()).backward()
    assert quality.grad is None


def test_quality_focal_by_hand():
    """One row, IoU 0.75, probability 0.5: (0.75 - 0.5)^2 * ln 2; another class at 0.5: 0.5^2 * ln 2."""
    objective = ScoreObjective("quality_focal", {"cls": 1})
    terms = objective(PredictionSet(torch.zeros(1, 2), torch.tensor([1]), quality=torch.tensor([0.75]), box_losses={}))
    assert terms["cls"].item() == pytest.approx((0.0625 + 0.25) * 0.693147, abs=1e-6)


@pytest.mark.parametrize(("name", "options"), [("ap", {"method": "exact", "interpolate": True}), ("bap", {})])
def test_average_precision_is_interpolated_where_it_is_exact(name, options):
    """One negative is above all positives: precisions 1/2, 2/3 and 3/4 become 3/4 each."""
    logits = torch.full((8, CLASSES), -9.0)
    logits[0, 0], logits[1, 2], logits[3, 0], logits[5, 3] = 12.0, 8.0, 4.0, 0.0
    terms = RankingObjective(name, weight=3.0)(PredictionSet(logits, LABELS, quality=QUALITY, box_losses={}))
    method = RANKING_LOSSES[name].method
    expected = average_precision_loss(logits, ROWS * CLASSES + LABELS[ROWS], delta=1.0, **{"method": method, **options})
    torch.testing.assert_close(terms["rank"], 3 * expected)


@pytest.mark.parametrize("tau", [0.5, 0.7])
def test_alrp_divides_the_error_by_one_minus_tau(tau):
    logits, giou = leaf(8, CLASSES), torch.tensor([0.1, 0.4, 0.3])
    terms = RankingObjective("alrp", weight=1.0, tau=tau)(
        PredictionSet(logits, LABELS, quality=QUALITY, box_losses={"giou": giou})
    )
    part = alrp_loss(logits, ROWS * CLASSES + LABELS[ROWS], giou / 2 / {0.5: 0.5, 0.7: 0.3}[tau], method="exact")
    torch.testing.assert_close(terms["giou"], 50 * part.localization)


def test_alrp_takes_iou_losses_whose_largest_value_is_one():
    """aLRP loss, Table 2, rows "w IoU": the error is (1 - IoU) / (1 - tau)."""
    logits, iou = leaf(8, CLASSES), torch.tensor([0.1, 0.4, 0.3], requires_grad=True)
    terms = RankingObjective("alrp", weight=1.0, tau=0.5)(
        PredictionSet(logits, LABELS, quality=QUALITY, box_losses={"iou": iou})
    )
    part = alrp_loss(logits, ROWS * CLASSES + LABELS[ROWS], iou / 0.5, method="exact")
    assert terms.keys() == {"rank", "iou"}
    torch.testing.assert_close(terms["iou"], 50 * part.localization)


def test_alrp_without_balance_has_a_fixed_weight():
    logits, giou = leaf(8, CLASSES), torch.tensor([0.1, 0.4, 0.3])
    for weight in (1.0, 25.0):
        terms = RankingObjective("alrp", weight=1.0, balanced=False, box_weight=weight)(
            PredictionSet(logits, LABELS, quality=QUALITY, box_losses={"giou": giou})
        )
        part = alrp_loss(logits, ROWS * CLASSES + LABELS[ROWS], giou / 2 / 0.5, method="exact")
        torch.testing.assert_close(terms["giou"], weight * part.localization)


def test_given_rows_equal_found_rows():
    logits, boxes = leaf(8, CLASSES), box_losses()
    for objective in (RankingObjective(), ScoreObjective("focal", {"cls": 1, "l1": 1, "giou": 1})):
        found = objective(PredictionSet(logits, LABELS, quality=QUALITY, box_losses=boxes))
        given = objective(PredictionSet(logits, LABELS, quality=QUALITY, box_losses=boxes, rows=ROWS))
        assert found.keys() == given.keys() and all(torch.equal(found[key], given[key]) for key in found)


def all_objectives():
    weights = {"cls": 2, "l1": 5, "giou": 2}
    return [
        *(RankingObjective(name) for name in RANKING_LOSSES),
        *(
            ScoreObjective(name, weights, normalizer=normalizer)
            for name in ("focal", "cross_entropy", "binary_cross_entropy", "quality_focal")
            for normalizer in ("positives", "rows")
        ),
    ]


def name_of(objective) -> str:
    return getattr(objective, "loss", None) or f"{objective.classification}-{objective.normalizer}"


def columns(objective) -> int:
    return CLASSES + (getattr(objective, "classification", "") == "cross_entropy")


@pytest.mark.parametrize("objective", all_objectives(), ids=name_of)
def test_without_positives_every_term_is_there_finite_and_attached(objective):
    logits = leaf(8, columns(objective))
    boxes = {"l1": leaf(3)[:0], "giou": leaf(3)[:0]}
    labels = torch.full((8,), CLASSES)
    terms = objective(PredictionSet(logits, labels, quality=torch.zeros(0), box_losses=boxes))
    assert {"l1", "giou"} < terms.keys()
    assert all(term.isfinite() and term.requires_grad for term in terms.values())
    sum(terms.values()).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("objective", all_objectives(), ids=name_of)
def test_ignored_rows_have_no_gradient_even_if_infinite(objective):
    valid = torch.ones(8, dtype=torch.bool)
    valid[[0, 7]] = False
    values = torch.randn(8, columns(objective))
    values[0], values[7] = torch.inf, -torch.inf
    logits = values.requires_grad_()
    terms = objective(PredictionSet(logits, LABELS, quality=QUALITY, box_losses=box_losses(), valid=valid))
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert (logits.grad[~valid] == 0).all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("objective", all_objectives(), ids=name_of)
def test_ignored_rows_are_as_good_as_absent(objective):
    valid = torch.tensor([True, True, False, True, True, True, True, False])
    logits, boxes = leaf(8, columns(objective)), box_losses()
    masked = objective(PredictionSet(logits, LABELS, quality=QUALITY, box_losses=boxes, valid=valid))
    absent = objective(PredictionSet(logits[valid], LABELS[valid], quality=QUALITY, box_losses=boxes))
    assert all(torch.allclose(masked[key], absent[key]) for key in absent)


@pytest.mark.parametrize("objective", all_objectives(), ids=name_of)
def test_half_precision_under_autocast(objective):
    logits = torch.randn(8, columns(objective)).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = objective(PredictionSet(logits, LABELS, quality=QUALITY.bfloat16(), box_losses=box_losses()))
    assert all(term.dtype == torch.float32 for term in terms.values())
    sum(terms.values()).backward()
    assert logits.grad.dtype == torch.bfloat16 and logits.grad.isfinite().all()


def test_no_positives_with_infinite_logits_is_not_nan():
    logits = torch.full((8, CLASSES), torch.inf, requires_grad=True)
    terms = RankingObjective()(
        PredictionSet(logits, torch.full((8,), CLASSES), quality=torch.zeros(0), box_losses={"l1": torch.zeros(0)})
    )
    sum(terms.values()).backward()
    assert all(term == 0 for term in terms.values()) and (logits.grad == 0).all()


def test_zero_quality_positives_still_train_boxes():
    boxes = box_losses()
    terms = RankingObjective()(PredictionSet(leaf(8, CLASSES), LABELS, quality=torch.zeros(3), box_losses=boxes))
    terms["giou"].backward()
    assert (boxes["giou"].grad > 0).all()


def test_focal_sums_over_positives():
    logits, boxes = leaf(8, CLASSES), box_losses()
    target = F.one_hot(LABELS, CLASSES + 1)[:, :CLASSES].float()
    terms = ScoreObjective("focal", {"cls": 2, "l1": 5, "giou": 2})(
        PredictionSet(logits, LABELS, quality=QUALITY, box_losses=boxes)
    )
    assert torch.allclose(terms["cls"], 2 * sigmoid_focal_loss(logits, target, reduction="sum") / 3)
    assert torch.allclose(terms["l1"], 5 * boxes["l1"].mean())
    counted = ScoreObjective("focal", {"cls": 1, "l1": 1, "giou": 1})(
        PredictionSet(logits, LABELS, quality=QUALITY, box_losses=boxes, normalizer=torch.tensor(6))
    )
    assert torch.allclose(counted["cls"], terms["cls"] / 2 / 2) and torch.allclose(counted["l1"], boxes["l1"].sum() / 6)


def test_rows_normalizer_divides_by_rows():
    logits, boxes = leaf(8, CLASSES + 1), box_losses()
    objective = ScoreObjective("cross_entropy", {"cls": 1, "l1": 1, "giou": 1}, normalizer="rows")
    terms = objective(PredictionSet(logits, LABELS, quality=QUALITY, box_losses=boxes))
    assert torch.allclose(terms["cls"], F.cross_entropy(logits, LABELS))
    assert torch.allclose(terms["giou"], boxes["giou"].sum() / 8)


def test_box_weights_normalize_by_their_sum():
    boxes, weight = box_losses(), torch.tensor([0.9, 0.8, 0.7])
    objective = ScoreObjective("focal", {"cls": 1, "l1": 1, "giou": 1})
    terms = objective(PredictionSet(leaf(8, CLASSES), LABELS, quality=QUALITY, box_losses=boxes, box_weight=weight))
    assert torch.allclose(terms["l1"], (boxes["l1"] * weight).sum() / 2.4)


def test_quality_focal_is_least_where_the_score_equals_the_iou():
    objective = ScoreObjective("quality_focal", {"cls": 1})
    logits = torch.full((8, CLASSES), -30.0)
    logits[ROWS, LABELS[ROWS]] = QUALITY.logit()
    assert objective(PredictionSet(logits, LABELS, quality=QUALITY, box_losses={}))["cls"] < 1e-6


def test_errors_name_what_to_change():
    with pytest.raises(ValueError, match="unknown ranking loss"):
        RankingObjective("bert")
    with pytest.raises(ValueError, match="one per positive"):
        RankingObjective()(PredictionSet(leaf(8, CLASSES), LABELS, quality=torch.rand(2), box_losses={}))
    with pytest.raises(ValueError, match="no weight for the box loss 'dice'"):
        ScoreObjective("focal", {"cls": 1})(
            PredictionSet(leaf(8, CLASSES), LABELS, quality=QUALITY, box_losses={"dice": torch.rand(3)})
        )


@pytest.mark.parametrize("loss", ["focal", "quality_focal"])
def test_a_gamma_without_gradient_at_easy_logits_is_refused(loss):
    with pytest.raises(ValueError, match=r"gamma must be 0 or at least 1, not 0\.5"):
        ScoreObjective(loss, {"cls": 1}, gamma=0.5)
    for gamma in (0.0, 1.0, 1.5, 2.0):
        logits = (120.0 * torch.tensor([[-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])).requires_grad_()
        predictions = PredictionSet(logits, torch.tensor([0, 0, 2]), quality=torch.tensor([0.5, 1.0]), box_losses={})
        ScoreObjective(loss, {"cls": 1}, gamma=gamma)(predictions)["cls"].backward()
        assert torch.isfinite(logits.grad).all()


def test_average_precision_keeps_a_fixed_box_weight():
    boxes = box_losses()
    terms = RankingObjective("bap", box_weight=2.0)(
        PredictionSet(leaf(8, CLASSES), LABELS, quality=QUALITY, box_losses=boxes)
    )
    assert terms.keys() == {"rank", "l1", "giou"}
    assert torch.allclose(terms["giou"], 2 * boxes["giou"].mean())


def test_alrp_balanced_by_value_weighs_boxes_like_the_classification():
    objective = RankingObjective("alrp", weight=3.0, period=None)
    terms = objective(PredictionSet(leaf(8, CLASSES), LABELS, quality=QUALITY, box_losses={"giou": 1 - QUALITY}))
    torch.testing.assert_close(terms["giou"], terms["rank"])


@pytest.mark.parametrize("loss", ["alrp", "balrp"])
def test_alrp_takes_the_errors_of_masks_where_there_are_no_boxes(loss):
    """1 - Dice lies in 0..1 and the GIoU loss in 0..2: the same error gives the same loss."""
    logits, error = leaf(8, CLASSES), 1 - QUALITY
    masks, boxes = (
        RankingObjective(loss, weight=3.0)(PredictionSet(logits, LABELS, quality=QUALITY, box_losses=losses))
        for losses in ({"mask": error}, {"giou": 2 * error})
    )
    assert masks["rank"] == boxes["rank"] and masks["mask"] == boxes["giou"]


def test_alrp_needs_boxes():
    with pytest.raises(ValueError, match="box losses named 'giou'"):
        RankingObjective("alrp")(PredictionSet(leaf(8, CLASSES), LABELS, quality=QUALITY, box_losses={}))


def test_box_weights_are_relative_in_a_ranking():
    """Weights 3, 1, 0 have the mean 4 / 3; a factor common to all changes nothing."""
    boxes, weight = {"giou": torch.tensor([0.5, 0.2, 0.9])}, torch.tensor([3.0, 1.0, 0.0])
    predictions = PredictionSet(leaf(8, CLASSES), LABELS, quality=QUALITY, box_losses=boxes, box_weight=weight)
    objective = RankingObjective("bap", box_weight=1.0)
    torch.testing.assert_close(objective(predictions)["giou"], torch.tensor((3 * 0.5 + 0.2) / 4))
    again = objective(predictions._replace(box_weight=7 * weight))
    torch.testing.assert_close(again["giou"], objective(predictions)["giou"])
    with pytest.raises(ValueError, match="box_weight has shape"):
        objective(predictions._replace(box_weight=torch.ones(2)))


def test_sets_with_a_shared_count_exchange_one_number_and_a_ranking_none(monkeypatch):
    exchanged = []
    monkeypatch.setattr(distributed, "process_mean", lambda value: exchanged.append(value) or value.clamp(min=1))
    count = SharedCount(6)
    predictions = PredictionSet(leaf(8, CLASSES), LABELS, quality=QUALITY, box_losses={}, normalizer=count)
    RankingObjective()(predictions)
    assert not exchanged
    focal = ScoreObjective("focal", {"cls": 1})
    terms = [focal(predictions), focal(predictions)]
    assert [value.item() for value in exchanged] == [6]
    alone = focal(predictions._replace(normalizer=None))
    assert all(torch.allclose(term["cls"], alone["cls"] / 2) for term in terms)
