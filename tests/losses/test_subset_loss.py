"""Box losses of some of the positives only: whose weights they get, and what they are divided by."""

import pytest
import torch

from brs_detr.losses import PredictionSet, RankingObjective, ScoreObjective, SubsetLoss

CLASSES = 4
LABELS = torch.tensor([4, 2, 4, 0, 4, 3, 1, 4])
ROWS = torch.tensor([1, 3, 5, 6])
QUALITY = torch.tensor([0.9, 0.3, 0.6, 0.5])
LOSSES = ["brs", "rs", "bap", "ap", "balrp", "alrp", "bndcg", "ndcg"]


def prediction_set(box_losses, **further):
    torch.manual_seed(0)
    logits = torch.randn(8, CLASSES, requires_grad=True)
    return PredictionSet(logits, LABELS, quality=QUALITY, box_losses=box_losses, rows=ROWS, **further)


def objectives():
    yield from (RankingObjective(name, 1.0, score_weighted=True, period=None) for name in LOSSES)
    for normalizer in ("positives", "rows"):
        yield ScoreObjective("focal", {"cls": 1.0, "giou": 2.0, "mask": 1.0}, normalizer=normalizer)


@pytest.mark.parametrize("objective", objectives(), ids=lambda o: getattr(o, "loss", "focal"))
def test_all_positives_in_any_order_are_like_one_value_per_positive(objective):
    giou, values, order = torch.rand(4), torch.rand(4), torch.tensor([2, 0, 3, 1])
    terms = []
    for mask in (values, SubsetLoss(values[order], order)):
        terms.append(objective(prediction_set({"giou": giou, "mask": mask})))
    assert terms[0].keys() == terms[1].keys()
    for name, value in terms[0].items():
        if name == "mask" and getattr(objective, "normalizer", None) == "rows":  # a mean over masks, not over rows
            value = value * 8 / 4
        torch.testing.assert_close(terms[1][name], value)


@pytest.mark.parametrize("loss", ["rs", "brs"])
@pytest.mark.parametrize("chosen", [[3], [2, 0], [1, 3, 0]])
def test_values_have_the_scores_of_their_own_positives(loss, chosen):
    """The value is that of the ranking, the gradient goes by each positive's highest score."""
    values = torch.rand(len(chosen), requires_grad=True)
    predictions = prediction_set({"giou": torch.rand(4), "mask": SubsetLoss(values, torch.tensor(chosen))})
    terms = RankingObjective(loss, 1.0, score_weighted=True)(predictions)
    torch.testing.assert_close(terms["mask"], terms["rank"] + terms["sort"])
    terms["mask"].backward()
    scores = predictions.logits.detach().sigmoid().amax(1)[ROWS[torch.tensor(chosen)]]
    mean = (scores * values.detach()).sum() / scores.sum()
    torch.testing.assert_close(values.grad, terms["mask"].detach() / mean * scores / scores.sum())


def test_given_box_weights_are_those_of_the_chosen_positives():
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for objective, name in ((RankingObjective("ap", box_weight=1.0), "ap"), (ScoreObjective("focal", W), "focal")):
        values = torch.tensor([0.5, 0.25], requires_grad=True)
        chosen = SubsetLoss(values, torch.tensor([3, 1]))
        terms = objective(prediction_set({"mask": chosen}, box_weight=weight))
        assert float(terms["mask"].detach()) == pytest.approx((4 * 0.5 + 2 * 0.25) / 6), name


W = {"cls": 1.0, "mask": 1.0}


@pytest.mark.parametrize("objective", objectives(), ids=lambda o: getattr(o, "loss", "focal"))
@pytest.mark.parametrize("positives", [0, 4])
def test_no_value_at_all_is_a_zero_on_the_graph(objective, positives):
    logits = torch.randn(8, CLASSES, requires_grad=True)
    values = torch.rand(3, requires_grad=True)
    mask = SubsetLoss(values[:0], torch.zeros(0, dtype=torch.int64))
    labels = LABELS if positives else torch.full_like(LABELS, CLASSES)
    boxes = {"giou": torch.rand(positives), "mask": mask}
    terms = objective(PredictionSet(logits, labels, QUALITY[:positives], boxes, rows=ROWS[:positives]))
    assert float(terms["mask"].detach()) == 0
    terms["mask"].backward()
    assert not values.grad.any() and not logits.grad.any()


@pytest.mark.parametrize(
    ("values", "chosen", "message"),
    [
        (torch.rand(2), torch.tensor([0]), "mask: values of shape"),
        (torch.rand(2), torch.tensor([0.0, 1.0]), "mask: values of shape"),
        (torch.rand(5), torch.arange(5), "mask: 5 values are too many for 4"),
        (torch.rand(2), torch.tensor([1, 1]), "mask: chosen repeats a positive"),
        (torch.rand(2), torch.tensor([1, 4]), "mask: chosen repeats a positive or has none of 0 to 3"),
    ],
)
def test_wrong_subsets_are_refused(values, chosen, message):
    with pytest.raises(ValueError, match=message):
        RankingObjective()(prediction_set({"mask": SubsetLoss(values, chosen)}))


def test_alrp_needs_the_boxes_of_all_positives():
    with pytest.raises(ValueError, match="one per positive"):
        RankingObjective("alrp")(prediction_set({"giou": SubsetLoss(torch.rand(1), torch.tensor([0]))}))
