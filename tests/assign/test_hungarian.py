"""Hungarian matching against brute force, and over several prediction sets at once."""

import math
from itertools import permutations

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from brs_detr.assign.hungarian import HungarianMatcher, PredictedSet
from brs_detr.ops.targets import PackedTargets


def boxes(n):
    return torch.cat([torch.rand(n, 2) * 0.6 + 0.2, torch.rand(n, 2) * 0.2 + 0.1], -1)


def targets(counts, size=100):
    made = []
    for n in counts:
        center, side = torch.rand(n, 2) * 60 + 20, torch.rand(n, 2) * 20 + 5
        made.append({"boxes": torch.cat([center - side, center + side], -1), "labels": torch.randint(0, 3, (n,))})
    return PackedTargets.pack(made, [(size, size)] * len(counts))


def test_packing_normalizes_by_each_images_own_size():
    one = {"boxes": torch.tensor([[0.0, 0.0, 50.0, 20.0]]), "labels": torch.tensor([1])}
    packed = PackedTargets.pack([one, one], [(40, 100), (80, 200)])
    torch.testing.assert_close(packed.boxes, torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.125, 0.125, 0.25, 0.25]]))
    assert packed.spans == [(0, 1), (1, 2)]


def test_finds_the_cheapest_pairing():
    packed, logits, predicted = targets([3]), torch.randn(1, 5, 3), boxes(5)[None]
    matcher = HungarianMatcher()
    one = PredictedSet(logits, predicted, packed.labels)
    (match,) = matcher([one], packed)
    (cost,) = matcher.cost(one, packed)
    best = min(sum(float(cost[g, q]) for g, q in enumerate(p)) for p in permutations(range(5), 3))
    assert abs(float(cost[match.objects, match.rows].sum()) - best) < 1e-5


def test_sets_and_images_are_matched_as_if_alone():
    packed = targets([2, 0, 4])
    sets = [
        PredictedSet(torch.randn(3, q, 3), torch.stack([boxes(q) for _ in range(3)]), packed.labels) for q in (6, 9)
    ]
    together = HungarianMatcher()(sets, packed)
    for one, match in zip(sets, together):
        (alone,) = HungarianMatcher()([one], packed)
        assert torch.equal(match.rows, alone.rows) and torch.equal(match.objects, alone.objects)
        assert torch.equal(match.objects.sort().values, torch.arange(6))
        assert torch.equal(match.rows.sort().values, match.rows)


def readable_cost(matcher, logits, boxes, labels, targets, scale):
    """The cost (Q, G) of every pair in one image, of one set, by torchvision's operators."""
    chance = logits[:, labels].sigmoid()
    present = matcher.alpha * (1 - chance) ** matcher.gamma * -(chance + 1e-12).log()
    absent = (1 - matcher.alpha) * chance**matcher.gamma * -(1 - chance + 1e-12).log()
    distance = (boxes[:, None] - targets[None]).abs().sum(-1)
    corners = [box_convert(b * scale, "cxcywh", "xyxy") for b in (boxes, targets)]
    return matcher.cls * (present - absent) + matcher.l1 * distance - matcher.giou * generalized_box_iou(*corners)


@pytest.mark.parametrize("counts", [(2, 0, 4), (0, 0), (7,), (1, 12, 3)])
def test_layers_and_images_together_cost_and_match_as_each_alone(counts):
    packed, matcher = targets(counts), HungarianMatcher()
    logits, predicted = torch.randn(4, len(counts), 9, 3) * 3, torch.rand(4, len(counts), 9, 4) * 0.5 + 0.1
    together = PredictedSet(logits, predicted, packed.labels)
    cost = matcher.cost(together, packed)
    (match,) = matcher([together], packed)
    for layer in range(4):
        (alone,) = matcher([PredictedSet(logits[layer], predicted[layer], packed.labels)], packed)
        assert torch.equal(match.rows[layer], alone.rows) and torch.equal(match.objects[layer], alone.objects)
        for image, (start, stop) in enumerate(packed.spans):
            own = packed.labels[start:stop], packed.boxes[start:stop], packed.scales[start:stop]
            if stop > start:
                one = logits[layer, image], predicted[layer, image]
                expected = readable_cost(matcher, *one, *own[:2], own[2][0])
                torch.testing.assert_close(cost[layer, start:stop].T, expected, rtol=1e-5, atol=1e-6)


def test_the_costs_are_solved_later_as_at_once():
    packed, matcher = targets([2, 3]), HungarianMatcher()
    one = PredictedSet(torch.randn(2, 6, 3), torch.rand(2, 6, 4) * 0.5 + 0.1, packed.labels)
    begun = matcher.begin([one], packed)
    (later,), (at_once,) = begun.solve(), matcher([one], packed)
    assert torch.equal(later.rows, at_once.rows) and torch.equal(later.objects, at_once.objects)


def test_more_objects_than_queries_matches_every_query():
    packed = targets([5])
    (match,) = HungarianMatcher()([PredictedSet(torch.randn(1, 3, 3), boxes(3)[None], packed.labels)], packed)
    assert len(match.rows) == 3 and len(match.objects.unique()) == 3


def test_no_objects_gives_an_empty_match():
    packed = targets([0, 0])
    one = PredictedSet(torch.randn(2, 3, 3), torch.stack([boxes(3)] * 2), packed.labels)
    (match,) = HungarianMatcher()([one], packed)
    assert match.rows.shape == match.objects.shape == (0,) and match.rows.dtype == torch.int64


def test_a_nan_prediction_is_matched_last():
    packed, logits = targets([1]), torch.zeros(1, 3, 3)
    logits[0, 0] = torch.nan
    (match,) = HungarianMatcher()([PredictedSet(logits, boxes(3)[None], packed.labels)], packed)
    assert int(match.rows) != 0


def one_cost(classification, l1, giou):
    """Cost of one query with probability 0.8 for the object's class, its box beside the object's."""
    logits = torch.tensor([[-3.0, math.log(4)]])
    predicted = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    # (0.4, 0.6, 0.2, 0.2) of an image of 200 x 100 pixels
    packed = PackedTargets.pack(
        [{"boxes": torch.tensor([[60.0, 50, 100, 70]]), "labels": torch.tensor([1])}], [(100, 200)]
    )
    matcher = HungarianMatcher(classification, l1, giou)
    return matcher.cost(PredictedSet(logits[None], predicted[None], packed.labels), packed).item()


def test_each_cost_by_hand():
    """0.25 * 0.2^2 * -ln 0.8 - 0.75 * 0.8^2 * -ln 0.2; |0.1| + |0.1| + |0.2|; -(0.02 / 0.1 - 0.02 / 0.12)."""
    assert one_cost(1, 0, 0) == pytest.approx(0.0022314 - 0.7725302, abs=1e-6)
    assert one_cost(0, 1, 0) == pytest.approx(0.4, abs=1e-6)
    assert one_cost(0, 0, 1) == pytest.approx(-1 / 30, abs=1e-6)
    assert one_cost(4, 5, 2) == pytest.approx(-4 * 0.7702988 + 5 * 0.4 - 2 / 30, abs=1e-5)


def test_the_cheaper_of_two_queries_by_hand():
    """With equal boxes the query that is surer of the object's class gets it; with equal scores the nearer box."""
    packed = PackedTargets.pack(
        [{"boxes": torch.tensor([[40.0, 20, 60, 40]]), "labels": torch.tensor([1])}], [(100, 200)]
    )
    same, other = torch.tensor([0.25, 0.3, 0.1, 0.2]), torch.tensor([0.35, 0.3, 0.1, 0.2])
    for logits, predicted in (
        ([[0.0, 1.0], [0.0, 2.0]], [same, same]),
        ([[9.0, 1.0], [-9.0, 1.1]], [same, same]),
        ([[0.0, 1.0], [0.0, 1.0]], [other, same]),
    ):
        one = PredictedSet(torch.tensor([logits]), torch.stack(predicted)[None], packed.labels)
        (match,) = HungarianMatcher()([one], packed)
        assert (match.rows.tolist(), match.objects.tolist()) == ([1], [0])
