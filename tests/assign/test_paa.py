"""Probabilistic anchor assignment, against a slow form object by object and step by step."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from brs_detr.assign.max_iou import BACKGROUND
from brs_detr.assign.paa import PAAAssigner, fit_mixture, separate


def slow_density(x, mean, variance, weight):
    return math.log(weight) - 0.5 * (math.log(2 * math.pi * variance) + (x - mean) ** 2 / variance)


def slow_sum(logs):
    top = max(logs)
    return top + math.log(sum(math.exp(value - top) for value in logs))


def slow_fit(costs):
    """Parameters (mean, variance, weight) of both Gaussians, as scikit-learn's GaussianMixture fits them."""
    fit, bound = [(min(costs), 1.0, 0.5), (max(costs), 1.0, 0.5)], -math.inf
    for _ in range(100):
        logs = [[slow_density(x, *gaussian) for gaussian in fit] for x in costs]
        previous, bound = bound, sum(slow_sum(pair) for pair in logs) / len(costs)
        fit = []
        for k in (0, 1):
            share = [math.exp(pair[k] - slow_sum(pair)) for pair in logs]
            size = sum(share) + 10 * 2.220446049250313e-16
            mean = sum(s * x for s, x in zip(share, costs)) / size
            variance = sum(s * (x - mean) ** 2 for s, x in zip(share, costs)) / size + 1e-5
            fit.append((mean, variance, size / len(costs)))
        if abs(bound - previous) < 1e-3:
            break
    return fit


def slow_positives(costs):
    """Indices into ascending costs."""
    if len(costs) < 2:
        return []
    fit = slow_fit(costs)
    logs = [[slow_density(x, *gaussian) for gaussian in fit] for x in costs]
    cheap = [i for i, (first, second) in enumerate(logs) if first >= second]
    if not cheap:
        return []
    likeliest = max(cheap, key=lambda i: slow_sum(logs[i]))
    return [i for i in cheap if i <= likeliest]


def slow_select(candidates, costs, level_counts, num_objects, topk):
    assigned = [BACKGROUND] * len(candidates)
    start, obj = 0, 0
    for counts, objects in zip(level_counts, num_objects):
        for _ in range(objects):
            rows, first = [], start
            for count in counts:
                own = [i for i in range(first, first + count) if candidates[i] == obj]
                rows += sorted(own, key=lambda i: costs[i])[:topk]
                first += count
            rows.sort(key=lambda i: costs[i])
            for index in slow_positives([float(costs[i]) for i in rows]):
                assigned[rows[index]] = obj
            obj += 1
        start += sum(counts)
    return assigned


def padded(*lists):
    table = torch.full((len(lists), max(map(len, lists))), torch.inf, dtype=torch.float64)
    for row, values in zip(table, lists):
        row[: len(values)] = torch.tensor(sorted(values), dtype=torch.float64)
    return table


def random_costs(count):
    """Some objects with a clear valley, some without."""
    gap = float(torch.rand(())) * 4
    return (torch.rand(count, dtype=torch.float64) + gap * (torch.rand(count) > 0.4)).sort().values.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_the_mixture_equals_the_slow_form(seed):
    torch.manual_seed(seed)
    lists = [random_costs(int(count)) for count in torch.randint(2, 46, (20,))]
    costs = padded(*lists)
    fit = fit_mixture(torch.where(costs.isfinite(), costs, 0.0), costs.isfinite())
    for row, own in enumerate(lists):
        for k, expected in enumerate(slow_fit(own)):
            ours = [float(values[row, k]) for values in fit]
            assert ours == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for own, chosen in zip(lists, separate(costs)):
        assert chosen.nonzero()[:, 0].tolist() == slow_positives(own)


@pytest.mark.parametrize("topk", [1, 3, 9])
def test_selection_equals_the_slow_form(topk):
    """Two images; one object has no candidate and one has a single one; the last levels are tiny."""
    level_counts, num_objects = [[60, 20, 5, 1], [40, 12, 2, 1]], [4, 3]
    rows = [torch.randint(-1, 3, (86,)), torch.randint(-1, 2, (55,))]
    rows[0][7] = 3
    candidates = torch.cat([rows[0], torch.where(rows[1] >= 0, rows[1] + 4, rows[1])])
    costs = torch.rand(141, dtype=torch.float64) * 3
    ours = PAAAssigner(topk=topk).select(candidates, costs, level_counts, num_objects)
    assert ours.tolist() == slow_select(candidates.tolist(), costs, level_counts, num_objects, topk)
    assert set(ours.tolist()) == {BACKGROUND, 0, 1, 2, 4, 5}


def test_cheap_candidates_up_to_the_likeliest_are_positive():
    """Two clear groups; the positives are the cheaper group but for what costs more than its densest point."""
    costs = padded([0.1, 0.49, 0.5, 0.51, 0.9, 7.0, 7.2, 7.4])
    assert separate(costs)[0].tolist() == [True, True, True] + [False] * 5


@pytest.mark.parametrize("costs", [[], [0.3]])
def test_fewer_than_two_candidates_give_no_positive(costs):
    assert not separate(padded(costs, [0.1, 0.2, 3.0]))[0].any()


def test_equal_costs_are_finite():
    costs = padded([0.7] * 9)
    fit = fit_mixture(costs, torch.ones_like(costs).bool())
    assert all(values.isfinite().all() for values in fit)
    assert separate(costs).any()


def test_an_object_does_not_depend_on_the_others():
    lists = [random_costs(n) for n in (30, 7, 2, 45)]
    together = separate(padded(*lists))
    for own, chosen in zip(lists, together):
        assert torch.equal(separate(padded(own))[0], chosen[: len(own)])


def test_without_objects_everything_is_background():
    none = torch.full((5,), BACKGROUND)
    assert torch.equal(PAAAssigner().select(none, torch.full((5,), torch.inf), [[3, 2]], [0]), none)
    one_empty = PAAAssigner().select(
        torch.tensor([-1, -1, 0, 0, 0]), torch.tensor([9.0, 9, 1, 1.1, 4]), [[2], [3]], [0, 1]
    )
    assert one_empty.tolist()[:2] == [BACKGROUND] * 2 and 0 in one_empty.tolist()


def test_candidates_overlap_by_a_tenth_or_are_the_best_of_their_object():
    corner = torch.rand(200, 2) * 60
    anchors = torch.cat([corner, corner + 8 + torch.rand(200, 2) * 10], dim=1)
    objects = torch.tensor([[10.0, 10, 30, 30], [40, 40, 44, 41]])  # no anchor overlaps the second by a tenth
    assigned = PAAAssigner()(anchors, [150, 50], objects)
    iou = box_iou(anchors, objects)
    assert float(iou[:, 1].max()) < 0.1
    assert assigned[iou[:, 1].argmax()] == 1
    rest = assigned != 1
    assert torch.equal(assigned[rest] == 0, iou[rest, 0] >= 0.1)
