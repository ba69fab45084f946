"""By what the transformer of Co-DINO differs from that of Co-DETR: written again, as the papers have it."""

import math

import pytest
import torch
from torch import nn

from brs_detr.models.transformer.decoder import BoxPosition, QueryDecoder
from brs_detr.models.transformer.encoder import Memory
from brs_detr.models.transformer.two_stage import TwoStageHead, token_anchors

DIM, CLASSES, QUERIES, EPS = 16, 3, 5, 1e-3


def memory():
    """Of two images, the second of which fills three quarters of each side."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(8, 8), (4, 4)]
    padding = torch.zeros(2, 80, dtype=torch.bool)
    columns = torch.cat([torch.arange(side).repeat(side) / side for side, _ in shapes])
    rows = torch.cat([torch.arange(side).repeat_interleave(side) / side for side, _ in shapes])
    padding[1] = (columns >= 0.75) | (rows >= 0.75)
    sizes = torch.tensor([[[8.0, 8.0], [4.0, 4.0]], [[6.0, 6.0], [3.0, 3.0]]])
    ratios = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.75, 0.7], [0.6, 0.65]]])
    return Memory(torch.randn(2, 80, DIM, generator=generator), padding, shapes, sizes, ratios)


def encoding_of(box):
    """DAB-DETR's sine encoding of one box cx, cy, w, h: DIM / 2 channels each for y, x, w and h, in this order."""
    cx, cy, w, h = map(float, box)
    waves = DIM // 2
    return [
        (math.sin, math.cos)[k % 2](2 * math.pi * value / 10000 ** (2 * (k // 2) / waves))
        for value in (cy, cx, w, h)
        for k in range(waves)
    ]


def test_a_position_is_a_perceptron_on_the_encoding_with_y_before_x():
    torch.manual_seed(0)
    position, boxes = BoxPosition(DIM), torch.rand(2, QUERIES, 4)
    encoded = torch.tensor([[encoding_of(box) for box in own] for own in boxes])
    expected = position.second(position.first(encoded).clamp(min=0))
    torch.testing.assert_close(position(boxes), expected, rtol=1e-4, atol=1e-5)


def logit(x):
    """The inverse sigmoid of DINO, which moves numbers within 0.001 of 0 and 1."""
    x = x.clamp(0, 1)
    return (x.clamp(min=EPS) / (1 - x).clamp(min=EPS)).log()


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    made = QueryDecoder(
        DIM,
        CLASSES,
        layers=3,
        heads=2,
        levels=2,
        points=2,
        hidden=32,
        position=BoxPosition(DIM),
        norm=nn.LayerNorm(DIM),
        eps=EPS,
    )
    nn.init.normal_(made.norm.weight, 1, 0.5)
    nn.init.normal_(made.norm.bias)
    for regress in made.regressors:
        nn.init.normal_(regress[-1].weight, std=0.3)
    return made


def test_layers_hand_on_boxes_of_their_output_and_score_those_of_its_norm(decoder):
    """Positions are those of the box that a query has come to, in the padded finest level; some are at the border."""
    torch.manual_seed(2)
    source, x = memory(), torch.randn(2, QUERIES, DIM)
    start = torch.rand(2, QUERIES, 4)
    start[0, 0], start[1, 1] = torch.tensor([0.0, 1.0, 1e-5, 1.0]), torch.tensor([1.0, 0.0, 0.5, 1e-4])
    found = decoder(x, None, start, source)
    box, looked_at = start, start
    for number in range(3):
        on_levels = torch.stack([box * source.valid_ratios[:, level].repeat(1, 2)[:, None] for level in (0, 1)], 2)
        x = decoder.layers[number](x, decoder.position(on_levels[:, :, 0]), on_levels, source)
        classify, regress = decoder.classifiers[number], decoder.regressors[number]
        torch.testing.assert_close(found.logits[number], classify(decoder.norm(x)), rtol=1e-4, atol=1e-5)
        expected = torch.sigmoid(regress(decoder.norm(x)) + logit(looked_at))
        torch.testing.assert_close(found.boxes[number], expected, rtol=1e-4, atol=1e-5)
        looked_at = torch.sigmoid(regress(x) + logit(box))
        box = looked_at.detach()
    # a box reaches the regressor of the layer before, and none further back
    grads = torch.autograd.grad(found.boxes[2].sum(), [one[-1].weight for one in decoder.regressors])
    assert [bool(one.any()) for one in grads] == [False, True, True]


def test_tokens_are_chosen_by_their_best_class_and_only_these_learn():
    torch.manual_seed(0)
    head, source = TwoStageHead(DIM, CLASSES, QUERIES, class_agnostic=False), memory()
    nn.init.normal_(head.classifier.weight)
    nn.init.normal_(head.regressor[-1].weight, std=0.1)
    with torch.no_grad():
        (logits, boxes), valid = head.predict(source)
    assert torch.equal(valid, token_anchors(source)[1]) and not valid.all()
    found = head(source)
    assert found.predictions.logits.shape == (2, QUERIES, CLASSES)
    for image in range(2):
        best = [max(map(float, row)) if ok else -math.inf for row, ok in zip(logits[image], valid[image], strict=True)]
        order = sorted(range(len(best)), key=lambda token: -best[token])[:QUERIES]
        assert found.chosen[image].tolist() == order
        for own, all_of_them in zip(found.predictions, (logits[image], boxes[image]), strict=True):
            torch.testing.assert_close(own[image], all_of_them[order])
        torch.testing.assert_close(found.references[image], boxes[image, order])
    assert not found.references.requires_grad
