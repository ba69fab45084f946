"""The balance of positive and negative gradients: aLRP loss, Theorem 2, and what it is for other losses."""

import pytest
import torch
from torch import nn

from brs_detr.losses import (
    GradientSums,
    PredictionSet,
    RankingObjective,
    ScoreObjective,
    rank_sort_loss,
    watch_gradients,
)

ROWS, CLASSES = 500, 6


def predictions(seed=0, gap=0.0, dtype=torch.float32):
    """Of 500 rows of which 30 are positive and 20 ignored; the positives lie `gap` above the rest."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(ROWS, CLASSES, generator=generator) * 2).to(dtype)
    labels = torch.full((ROWS,), CLASSES)
    rows = torch.randperm(ROWS, generator=generator)[:30].sort()[0]
    labels[rows] = torch.randint(0, CLASSES, (30,), generator=generator)
    logits[rows, labels[rows]] += gap
    valid = torch.ones(ROWS, dtype=torch.bool)
    valid[torch.randperm(ROWS, generator=generator)[:20]] = False
    valid[rows] = True
    quality, giou = torch.rand(30, generator=generator), torch.rand(30, generator=generator) * 2
    return PredictionSet(
        logits.requires_grad_(), labels, quality=quality, box_losses={"giou": giou}, rows=rows, valid=valid
    )


def sums_of(objective, *batches):
    """Sums over negatives and positives of one backward pass through some batches."""
    sums = watch_gradients(nn.ModuleDict({"head": nn.ModuleDict({"objective": objective})}))
    for batch in batches:
        sum(objective(batch).values()).backward()
    return sums["head"].take()


@pytest.mark.parametrize("gap", [-2.0, 0.0, 3.0, 6.0])
@pytest.mark.parametrize("loss", ["alrp", "balrp", "ap", "bap"])
def test_positives_and_negatives_are_balanced_under_ap_and_alrp(loss, gap):
    negatives, positives = sums_of(RankingObjective(loss), predictions(gap=gap))
    assert positives > 0
    assert (negatives / positives).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("weights", [None, 0.2])
def test_the_sums_are_those_of_the_gradient_of_the_logits(weights):
    for objective in (
        RankingObjective("rs", 1.0 if weights is None else weights),
        ScoreObjective("focal", {"cls": weights or 1.0, "giou": 2.0}),
    ):
        batch = predictions()
        negatives, positives = sums_of(objective, batch)
        size = batch.logits.grad.abs()
        own = size[batch.rows, batch.labels[batch.rows]].sum()
        torch.testing.assert_close(positives.float(), own)
        torch.testing.assert_close(negatives.float(), size.sum() - own)
        assert size[~batch.valid].sum() == 0


def test_only_the_ranking_part_of_rank_and_sort_is_balanced():
    batch = predictions()
    where = batch.rows * CLASSES + batch.labels[batch.rows]
    ranking, _ = rank_sort_loss(batch.logits, where, batch.quality, valid=batch.valid[:, None].expand(-1, CLASSES))
    ranking.backward()
    size = batch.logits.grad.flatten().abs()
    assert (size.sum() - size[where].sum()).item() == pytest.approx(size[where].sum().item(), rel=1e-5)
    negatives, positives = sums_of(RankingObjective("rs"), predictions())
    assert abs(negatives / positives - 1) > 1e-3


def test_cross_entropy_is_far_from_balanced():
    """At logits of 0 each of N sigmoids has a gradient of 1/2."""
    batch = predictions()._replace(valid=None)
    negatives, positives = sums_of(
        ScoreObjective("binary_cross_entropy", {"cls": 1.0, "giou": 1.0}),
        batch._replace(logits=torch.zeros(ROWS, CLASSES, requires_grad=True)),
    )
    assert (negatives / positives).item() == pytest.approx((ROWS * CLASSES - 30) / 30)


def test_softmax_counts_the_background_of_every_row_with_the_negatives():
    batch = predictions()._replace(valid=None, logits=torch.zeros(ROWS, CLASSES + 1, requires_grad=True))
    negatives, positives = sums_of(ScoreObjective("cross_entropy", {"cls": 1.0, "giou": 1.0}), batch)
    share = 1 / (CLASSES + 1)
    assert (negatives / positives).item() == pytest.approx(
        (30 * (1 - share) + (ROWS - 30) * 2 * (1 - share)) / (30 * (1 - share))
    )


def test_sums_add_up_until_they_are_taken():
    objective = RankingObjective("alrp")
    first, second = (sums_of(objective, predictions(seed)) for seed in (1, 2))
    torch.testing.assert_close(sums_of(objective, predictions(1), predictions(2)), first + second)
    assert objective.gradient_sums.take() is None


def test_nothing_changes_but_the_sums():
    """Values, gradients and what else uses the logits are the same; without a gradient nothing is summed."""
    plain, watched = predictions(), predictions()
    sum(RankingObjective("brs")(plain).values()).backward()
    objective = RankingObjective("brs")
    sums = watch_gradients(nn.ModuleDict({"rpn": objective}))["rpn"]
    (sum(objective(watched).values()) + watched.logits.sum()).backward()
    torch.testing.assert_close(watched.logits.grad, plain.logits.grad + 1, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums.take().sum().float(), plain.logits.grad.abs().sum())
    with torch.no_grad():
        objective(watched)
    assert sums.take() is None


def test_sums_stay_on_the_device():
    """Tensors without data: reading a value would be an error."""
    sums, logits = GradientSums(), torch.empty(900, 11, device="meta", requires_grad=True)
    for _ in range(2):
        (sums.watch(logits, torch.empty(20, dtype=torch.int64, device="meta")) * 2).sum().backward()
    assert sums.take().device.type == "meta"


def test_without_positives_the_ranking_has_no_gradient():
    empty = PredictionSet(
        torch.randn(8, 3, requires_grad=True),
        torch.full((8,), 3),
        quality=torch.zeros(0),
        box_losses={"giou": torch.zeros(0)},
        rows=torch.zeros(0, dtype=torch.int64),
    )
    assert sums_of(RankingObjective("alrp"), empty).tolist() == [0, 0]
    negatives, positives = sums_of(ScoreObjective("focal", {"cls": 1.0, "giou": 1.0}), empty)
    assert negatives > 0 and positives == 0


def test_half_precision_logits():
    batch = predictions(dtype=torch.bfloat16)
    negatives, positives = sums_of(RankingObjective("alrp"), batch)
    # summed in float32 or wider, before the gradient becomes bfloat16
    assert (negatives / positives).item() == pytest.approx(1, abs=1e-6)
    assert batch.logits.grad.dtype == torch.bfloat16
