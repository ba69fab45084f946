"""Joining the detections of several heads: comparable scores, one box where heads agree, nothing else."""

import pytest
import torch

from brs_detr.models.ensemble import LEVELS, Ensemble


def test_a_score_becomes_its_rank_in_the_validation_per_object():
    """Ten detections, two objects: 1 / (1 + rank / 2), ranks 0 to 9."""
    scores = torch.arange(10, 0, -1) / 100
    ensemble = Ensemble.learn({"a": scores.flip(0)}, {"a": 0.5}, num_objects=2)
    expected = 1 / (1 + torch.arange(10) / 2)
    found = ensemble.comparable("a", scores)
    assert (found - expected).abs().max() < 2 / LEVELS and found[0] == 1


def test_comparable_scores_rise_with_the_scores_and_stay_in_their_range():
    torch.manual_seed(0)
    ensemble = Ensemble.learn({"a": torch.rand(5000) ** 3 * 0.07}, {"a": 0.5}, num_objects=480)
    scores = torch.linspace(0, 0.07, 1001)
    found = ensemble.comparable("a", torch.cat([scores, torch.ones(1)]))
    assert (found.diff() >= 0).all() and found.min() >= 0 and found.max() == 1
    inner = found[(found > 1 / LEVELS) & (found < 1)]
    assert len(inner) > 500 and (inner.diff() > 0).all()


def test_two_heads_whose_scores_differ_in_scale_only_have_the_same_comparable_scores():
    scores = torch.rand(3000, generator=torch.Generator().manual_seed(1))
    ensemble = Ensemble.learn({"a": scores, "b": scores * 0.01}, {"a": 0.5, "b": 0.4}, num_objects=300)
    torch.testing.assert_close(ensemble.comparable("a", scores), ensemble.comparable("b", scores * 0.01))


@pytest.mark.parametrize("scores", [torch.zeros(0), torch.full((5,), 0.3)])
def test_heads_that_found_nothing_or_everything_alike_are_learned(scores):
    ensemble = Ensemble.learn({"a": scores}, {"a": -1.0}, num_objects=4)
    found = ensemble.comparable("a", torch.tensor([0.0, 0.3, 0.9]))
    assert found.isfinite().all() and (found.diff() >= 0).all()


def linear(**ap):
    """An ensemble whose comparable scores are the scores."""
    return Ensemble(ap, {head: torch.linspace(0, 1, LEVELS + 1).tolist() for head in ap})


def found(*rows):
    """x1 of a box of 10 x 10 pixels, score, label."""
    boxes = torch.tensor([[x, 0.0, x + 10, 10] for x, _, _ in rows]).reshape(-1, 4)
    return {
        "boxes": boxes,
        "scores": torch.tensor([row[1] for row in rows]),
        "labels": torch.tensor([row[2] for row in rows]).long(),
    }


def test_where_heads_agree_the_box_of_the_best_one_stays_with_the_mean_score():
    """IoU of boxes one pixel apart: 9 / 11."""
    detections = {"b": found((1, 0.9, 0), (50, 0.8, 0)), "a": found((0, 0.5, 0), (50, 0.7, 1))}
    joined = linear(a=0.6, b=0.2).join(detections, nms_iou=0.6)
    # (0.6 * 0.5 + 0.2 * 0.9) / 0.8; head a alone, of the second class; head b alone
    torch.testing.assert_close(joined["scores"], torch.tensor([0.6, 0.525, 0.2]))
    assert joined["boxes"][:, 0].tolist() == [0, 50, 50] and joined["labels"].tolist() == [0, 1, 0]


def test_a_detection_counts_for_one_box_only():
    """Of two boxes of the best head, it belongs to the one that it overlaps most."""
    joined = linear(a=0.5, b=0.5).join({"a": found((0, 0.4, 0), (6, 0.4, 0)), "b": found((2, 1.0, 0))}, nms_iou=0.3)
    assert joined["boxes"][:, 0].tolist() == [0, 6]
    torch.testing.assert_close(joined["scores"], torch.tensor([0.7, 0.2]))


def test_a_head_without_detections_is_joined():
    joined = linear(a=0.5, b=0.5).join({"a": found(), "b": found((2, 0.8, 1))}, nms_iou=0.6)
    assert joined["boxes"][:, 0].tolist() == [2] and joined["scores"].tolist() == pytest.approx([0.4])
    assert len(linear(a=0.5).join({"a": found()}, nms_iou=0.6)["scores"]) == 0


@pytest.mark.parametrize(("returned", "kept"), [((300, 300, 100), 300), ((60, 60, 10), 100), ((30, 10, 0), 40)])
def test_as_many_remain_as_the_head_with_the_most_has_and_a_hundred_if_that_is_less(returned, kept):
    """Boxes of all heads lie apart."""
    rows = [[(20 * i, 0.5, label) for i in range(count)] for label, count in enumerate(returned)]
    detections = dict(zip("abc", (found(*own) for own in rows), strict=True))
    assert len(linear(a=0.6, b=0.5, c=0.4).join(detections, nms_iou=0.6)["scores"]) == kept


def test_what_is_written_to_a_file_is_read_back():
    ensemble = Ensemble.learn({"a": torch.rand(50), "b": torch.rand(70)}, {"a": 0.3, "b": 0.4}, 10)
    assert list(ensemble.ap) == ["b", "a"]
    assert Ensemble.restore(ensemble.as_dict(), ("a", "b")) == ensemble


@pytest.mark.parametrize(
    "values",
    [
        3,
        {},
        {"ap": {"a": "x"}, "levels": {"a": [0.0]}},
        {"ap": {"a": 0.5}, "levels": {"a": [0.0, 1.0]}},
        {"ap": {"b": 0.5}, "levels": {"b": [0.0] * (LEVELS + 1)}},
        {"ap": {"a": 0.5}, "levels": {"a": [1.0] + [0.0] * LEVELS}},
    ],
)
def test_damaged_values_are_refused(values):
    with pytest.raises(ValueError, match="heads' scores"):
        Ensemble.restore(values, ("a",))
