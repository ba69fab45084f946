"""benchmarks/bucketing_in_training.py: the gradients that it compares are those of the objective."""

import pytest
import torch
from torch import nn

from brs_detr.losses import PredictionSet, RankingObjective


@pytest.fixture
def meter(benchmark_module):
    bench = benchmark_module("bucketing_in_training")
    model = nn.Module()
    model.roi = nn.Module()
    model.roi.objective = RankingObjective("brs")
    found = bench.Meter(model)
    found.on = True
    return model.roi.objective, found


def layered(layers, valid=None):
    labels = torch.full((layers, 40), 3)
    labels[:, [4, 9, 17]] = torch.tensor([0, 2, 1])
    logits = torch.randn(layers, 40, 3, requires_grad=True)
    return PredictionSet(
        logits, labels, torch.rand(layers, 3), {}, rows=torch.tensor([[4, 9, 17]] * layers), valid=valid
    )


def test_each_layer_is_a_ranking_of_its_own(meter):
    objective, found = meter
    together = layered(2)
    objective(together)
    for layer in range(2):
        objective(
            PredictionSet(
                together.logits[layer], together.labels[layer], together.quality[layer], {}, together.rows[layer]
            )
        )
    assert [row["positives"] for row in found.rows] == [3] * 4 and found.rows[0]["logits"] == 120
    assert found.rows[:2] == found.rows[2:] and found.rows[0] != found.rows[1]
    assert {row["objective"] for row in found.rows} == {"roi"}
    # a positive per bucket, and few negatives beside it: near, but not equal
    assert all(0 < row["negatives"] < 1 and row["cosine"] > 0.9 for row in found.rows)


def test_sets_without_a_positive_are_not_compared(meter):
    objective, found = meter
    labels = torch.full((40,), 3)
    objective(PredictionSet(torch.randn(40, 3), labels, torch.zeros(0), {}, rows=torch.zeros(0, dtype=torch.int64)))
    assert found.rows == []


def test_ignored_rows_take_no_part(meter):
    objective, found = meter
    valid = torch.arange(40)[None] < 20
    everything = layered(1, valid)
    objective(everything)
    objective(everything._replace(logits=everything.logits[:, :20], labels=everything.labels[:, :20], valid=None))
    ignoring, without = ({**row, "logits": None} for row in found.rows)
    assert ignoring == pytest.approx(without)
