"""Which encoder tokens become queries where overlapping proposals are demoted."""

import pytest
import torch
from torchvision.ops import box_convert, box_iou

from brs_detr.models.transformer.encoder import Memory
from brs_detr.models.transformer.two_stage import CANDIDATES, TwoStageHead, demote_overlapping, token_anchors


def greedy(scores, boxes, iou, candidates):
    """Indices in the expected order, of one image: kept, suppressed; a pair at a time."""
    order = [i for i in scores.argsort(descending=True).tolist() if scores[i] > -torch.inf][:candidates]
    corners = box_convert(boxes, "cxcywh", "xyxy")
    kept, suppressed = [], []
    for i in order:
        clashes = any(box_iou(corners[i : i + 1], corners[j : j + 1]).item() > iou for j in kept)
        (suppressed if clashes else kept).append(i)
    return kept + suppressed


@pytest.mark.parametrize("candidates", [5, 40, 100])
def test_the_order_is_that_of_greedy_suppression_in_each_image(candidates):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 60, generator=generator)
    scores[1, :30] = -torch.inf
    boxes = torch.rand(3, 60, 4, generator=generator) * 0.3 + 0.2
    demoted = demote_overlapping(scores, boxes, 0.4, candidates)
    for image in range(3):
        expected = greedy(scores[image], boxes[image], 0.4, candidates)
        ordered = demoted[image].argsort(descending=True, stable=True)[: len(expected)]
        assert ordered.tolist() == expected
        assert demoted[image].isneginf().sum() == 60 - len(expected)


def test_the_order_survives_logits_that_differ_by_one_rounding_step():
    scores = torch.tensor([[1e4, 1e4 + 2e-3, 1e4 - 2e-3]])
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]]])
    demoted = demote_overlapping(scores, boxes, 0.5, 3)
    assert demoted[0].argsort(descending=True).tolist() == [1, 2, 0]


def memory(images=2):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(images, 8 * 8 + 4 * 4, 16, generator=generator)
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    padding[1, 40:60] = True
    sizes = torch.tensor([[[8.0, 8.0], [4.0, 4.0]]] * images)
    return Memory(tokens, padding, [(8, 8), (4, 4)], sizes, torch.ones(images, 2, 2))


def test_the_queries_start_at_different_places_and_never_in_the_padding():
    torch.manual_seed(0)
    plain, spread = TwoStageHead(16, 3, 12), TwoStageHead(16, 3, 12, nms_iou=0.05)
    with torch.no_grad():
        plain.regressor[-1].bias[2:] = 1.5  # boxes that overlap their neighbors'
    spread.load_state_dict(plain.state_dict())
    before, after = plain(memory()), spread(memory())
    assert torch.equal(before.predictions.logits, after.predictions.logits)

    def overlaps(references):
        corners = box_convert(references, "cxcywh", "xyxy")
        return sum(int((box_iou(one, one) > 0.05).sum()) - len(one) for one in corners)

    assert overlaps(after.references) < overlaps(before.references)
    assert token_anchors(memory())[1].gather(1, after.chosen).all()
    # an image's queries do not depend on the others of its batch
    first = memory()
    alone = Memory(first.tokens[:1], first.padding[:1], first.shapes, first.valid_sizes[:1], first.valid_ratios[:1])
    assert torch.equal(spread(alone).chosen, after.chosen[:1])


def test_with_as_many_queries_as_tokens_all_are_chosen_once():
    head = TwoStageHead(16, 3, 500, nms_iou=0.3)
    chosen = head(memory()).chosen
    assert chosen.shape == (2, 80) and CANDIDATES > 1
    assert all(sorted(row.tolist()) == list(range(80)) for row in chosen)


def test_regions_come_first_then_tokens_and_overlapping_ones_last():
    head = TwoStageHead(16, 3, 3, nms_iou=0.5)
    far = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1], [0.2, 0.8, 0.1, 0.1]])
    near = far + torch.tensor([0.01, 0.0, 0.0, 0.0])  # IoU 0.8
    regions = torch.stack([torch.stack([far[0], near[0], far[1]]), torch.stack([far[3], far[0], far[0]])])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    tokens = torch.stack([torch.stack([near[1], far[2], far[3]]), torch.stack([near[3], far[1], near[1]])])
    chosen = head.with_regions(regions, valid, tokens)
    assert torch.equal(chosen[0], torch.stack([far[0], far[1], far[2]]))
    # two places of the second image: the third reference overlaps one of them, and padding is never one
    assert torch.equal(chosen[1], torch.stack([far[3], far[1], near[3]]))


def test_without_suppression_regions_and_tokens_keep_their_order():
    head = TwoStageHead(16, 3, 4)
    regions, tokens = torch.rand(2, 3, 4), torch.rand(2, 4, 4)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    chosen = head.with_regions(regions, valid, tokens.requires_grad_())
    assert torch.equal(chosen[0], torch.cat([regions[0, :2], tokens[0, :2]])) and torch.equal(chosen[1], tokens[1])
    assert not chosen.requires_grad


def test_where_there_are_no_regions_the_tokens_stay():
    tokens = torch.rand(2, 3, 4) * 0.1 + torch.arange(3)[:, None] * 0.3
    nothing = torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool)
    assert torch.equal(TwoStageHead(16, 3, 3, nms_iou=0.5).with_regions(*nothing, tokens), tokens)
