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
CO_DINO = ["model.name=co_dino"]
BRS_DINO = ["model.name=brs_dino", "model.denoising.loss=rank"]
SETTINGS = {"brs": [], "focal": SCORE_BASED, "co_dino": CO_DINO, "brs_dino": BRS_DINO}


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


@pytest.mark.parametrize("name", SETTINGS)
def test_costs_and_losses_are_those_of_float32_on_what_the_network_says(monkeypatch, name):
    """Under autocast they equal, to float32's rounding, what the same inputs give in float64 without it."""
    torch.manual_seed(0)
    model = build_model(apply_overrides(load_config(DEMO), SETTINGS[name]).model, 3)
    costs = recorded(monkeypatch, model.matcher, "cost")
    kind = RankingObjective if name.startswith("brs") else ScoreObjective
    forward, losses = kind.forward, []

    def note(objective, predictions):
        terms = forward(objective, predictions)
        losses.append((objective, predictions, terms))
        return terms

    monkeypatch.setattr(kind, "forward", note)
    boxes = torch.tensor([[8.0, 8, 40, 40], [20, 10, 60, 50]])
    images = ImageBatch(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), [(64, 64)], [(64, 64)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model(images, [{"boxes": boxes, "labels": torch.arange(2), "image_id": 0}])
        assert model.backbone(torch.zeros(1, 3, 64, 64))[0].dtype == torch.bfloat16  # the network did round
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert costs and losses
    if name.endswith("dino"):
        assert any(objective is model.denoising_objective for objective, _, _ in losses)
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


@pytest.mark.parametrize("name", ["co_dino", "brs_dino"])
def test_noised_boxes_are_not_rounded(name):
    """Half a pixel of a small object is more than bf16 tells apart; only the decoder's layers round."""
    torch.manual_seed(0)
    model = build_model(apply_overrides(load_config(DEMO), SETTINGS[name]).model, 3)
    made, (boxes, labels) = [], (torch.rand(2, 4) * 8 + torch.tensor([20.0, 20, 40, 40]), torch.arange(2))
    model.denoising.register_forward_hook(lambda _, __, output: made.append(output))
    images = ImageBatch(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), [(64, 64)], [(64, 64)])
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            terms = model(images, [{"boxes": boxes, "labels": labels, "image_id": 0}])
            sum(terms.values()).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    plain, rounded = made
    assert all(torch.equal(getattr(plain, part), getattr(rounded, part)) for part in ("boxes", "content", "targets"))
    assert rounded.boxes.dtype == rounded.content.dtype == torch.float32
