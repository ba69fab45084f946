"""Which samples of the dense heads become decoder queries."""

import torch

from brs_detr.assign.assignment import HeadAssignment
from brs_detr.models.transformer.collaborative import AuxSamples, aux_samples, select_queries

CLASSES, DIM, SIZES = 3, 8, [(100, 200), (100, 100)]


def samples(labels):
    """Samples whose features carry their index, so that they can be recognized."""
    labels = [torch.tensor(one) for one in labels]
    boxes = [torch.tensor([[10.0, 20.0, 30.0, 60.0]]).repeat(len(one), 1) for one in labels]
    targets = [box * (label < CLASSES)[:, None] for box, label in zip(boxes, labels)]
    features = [torch.arange(len(one)).float()[:, None].repeat(1, DIM) for one in labels]
    return AuxSamples(boxes, labels, targets, features)


def select(heads, **options):
    """`select_queries` with the positives counted."""
    counts = [[sum(label < CLASSES for label in labels.tolist()) for labels in own.labels] for own in heads]
    return select_queries(heads, counts, SIZES, CLASSES, **options)


def test_positives_come_first_and_background_fills_up_to_the_least():
    (chosen,) = select([samples([[3, 1, 3] * 5, [3] * 12])])
    assert chosen.boxes.shape == (2, 9, 4)
    assert chosen.rows.tolist() == [0, 1, 2, 3, 4] and chosen.labels.tolist() == [1] * 5
    assert sorted(chosen.features[0, :5, 0].tolist()) == [1, 4, 7, 10, 13]
    assert (chosen.features[0, 5:, 0] % 3 != 1).all()


def test_boxes_and_targets_are_normalized_by_their_own_image():
    (chosen,) = select([samples([[1] * 9, [2] * 9])])
    torch.testing.assert_close(chosen.boxes[0, 0], torch.tensor([0.1, 0.4, 0.1, 0.4]))
    torch.testing.assert_close(chosen.boxes[1, 0], torch.tensor([0.2, 0.4, 0.2, 0.4]))
    torch.testing.assert_close(chosen.targets, chosen.boxes.flatten(0, 1))


def test_every_image_gets_as_many_queries_as_the_richest_within_the_limit():
    heads = [samples([[0] * 20, [3] * 30]), samples([[0] * 40, [1] * 2 + [3] * 9])]
    first, second = select(heads, max_queries=30)
    assert first.boxes.shape[1] == 20 and second.boxes.shape[1] == 30
    assert len(first.rows) == 20
    # the second image repeats its 11 samples over 30 slots; its 2 positives stand in slots 0, 1, 11, 12, 22, 23
    assert len(second.rows) == 30 + 6
    assert set(second.labels.tolist()) == {0, 1}


def test_a_image_without_positives_gets_background_only():
    (chosen,) = select([samples([[3] * 20, [3] * 5])])
    assert chosen.rows.shape == (0,) and chosen.targets.shape == (0, 4) and chosen.boxes.shape == (2, 9, 4)


def test_an_image_without_any_sample_gets_the_full_image_as_background():
    empty = AuxSamples(
        [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, 4)], [torch.zeros(0, DIM)]
    )
    full = samples([[1] * 10])
    both = AuxSamples(*(a + b for a, b in zip(full, empty)))
    (chosen,) = select([both])
    assert len(chosen.rows) == 10 and chosen.boxes[1].tolist() == [[0.5, 0.5, 1.0, 1.0]] * 10


def test_samples_of_an_assignment_are_split_by_image_and_cut():
    """Two images of 2 and 3 references; the object of the second image's first reference becomes its target."""
    boxes = [torch.rand(2, 4), torch.rand(3, 4)]
    features = [torch.rand(2, DIM), torch.rand(3, DIM)]
    target = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assignment = HeadAssignment(boxes, torch.tensor([3, 3, 1, 3, 3]), torch.tensor([2]), target)
    cut = aux_samples(assignment, features, max_samples=2)
    assert [one.tolist() for one in cut.labels] == [[3, 3], [1, 3]]
    assert not cut.targets[0].any() and cut.targets[1].tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]
    for column, given in ((cut.boxes, boxes), (cut.features, features)):
        assert all(one.equal(full[:2]) for one, full in zip(column, given, strict=True))
    assert [len(one) for one in aux_samples(assignment, features).labels] == [2, 3]
