"""bf16: the network rounds, matching costs and losses do not."""

from pathlib import Path

import pytest
import torch
import torchvision

from brs_detr.config import apply_overrides, load_config
from brs_detr.losses.objective import RankingObjective, ScoreObjective
from brs_detr.models.build import build_model
from brs_detr.ops.images import ImageBatch

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
SCORE_BASED = ["model.name=co_detr"]


def recorded(monkeypatch, owner, method):
    """Arguments and results of every call of a method."""
    calls, call = [], getattr(owner, method)

    def note(*arguments, **keywords):
        result = call(*arguments, **keywords)
        calls.append((arguments, keywords, result))
        return result

    monkeypatch.setattr(owner, method, note)
    return calls


def exact_cost(matcher, logits, boxes, labels, targets, scale):
    """Deformable DETR's cost of every pair in one image, in float64."""
    logits, boxes, targets, scale = (x.double() for x in (logits, boxes, targets, scale))
    chance = logits.sigmoid()[:, labels]
    focal = 0.25 * (1 - chance) ** 2 * -chance.log() - 0.75 * chance**2 * -(1 - chance).log()
    corners = [torchvision.ops.box_convert(b * scale, "cxcywh", "xyxy") for b in (boxes, targets)]
    giou = torchvision.ops.generalized_box_iou(*corners)
    return matcher.cls * focal + matcher.l1 * torch.cdist(boxes, targets, p=1) - matcher.giou * giou


@pytest.mark.parametrize("settings", [[], SCORE_BASED], ids=["brs", "focal"])
def test_costs_and_losses_are_those_of_float32_on_what_the_network_says(monkeypatch, settings):
    """Under autocast they equal, to float32's rounding, what the same inputs give in float64 without it."""
    torch.manual_seed(0)
    model = build_model(apply_overrides(load_config(DEMO), settings).model, 3)
    costs = recorded(monkeypatch, model.matcher, "cost")
    forward = (ScoreObjective if settings else RankingObjective).forward
    losses = []

    def note(objective, predictions):
        terms = forward(objective, predictions)
        losses.append((objective, predictions, terms))
        return terms

    monkeypatch.setattr(ScoreObjective if settings else RankingObjective, "forward", note)
    boxes = torch.tensor([[8.0, 8, 40, 40], [20, 10, 60, 50]])
    images = ImageBatch(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), [(64, 64)], [(64, 64)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model(images, [{"boxes": boxes, "labels": torch.arange(2), "image_id": 0}])
        assert model.backbone(torch.zeros(1, 3, 64, 64))[0].dtype == torch.bfloat16  # the network did round
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert costs and losses
    for (predictions, packed), _, result in costs:
        assert result.dtype == torch.float32
        logits, boxes, labels = predictions
        layers = zip(logits[None], boxes[None]) if logits.ndim == 3 else zip(logits, boxes)
        for (own_logits, own_boxes), found in zip(layers, result, strict=True):
            exact = exact_cost(model.matcher, own_logits[0], own_boxes[0], labels, packed.boxes, packed.scales[0])
            torch.testing.assert_close(found.double(), exact.T, rtol=1e-4, atol=1e-4)
    for objective, predictions, result in losses:
        again = forward(objective, predictions)  # without autocast
        assert all(torch.equal(again[name], value) for name, value in result.items())
        assert all(value.dtype == torch.float32 for value in predictions.box_losses.values())
        assert predictions.quality.dtype == torch.float32
