"""Every CNN detector learns with the losses it is used with, and images without objects train what they can."""

import pytest
import torch
from support import ROOT, module_from

from brs_detr.config import load_config
from brs_detr.models.detector import Detector
from brs_detr.run.setup import build_detector

overfit = module_from(ROOT / "benchmarks" / "cnn_overfit.py")
SCORE_BASED = overfit.SCORE_BASED
RANKING = ("brs", "rs", "bap", "ap", "balrp", "alrp")
SMALLER = ["model.backbone.name=test_resnet.r160_in1k", "model.dim=32"]
CLASSES = 3


def build(detector: str, loss: str, *settings: str) -> Detector:
    recipe = ROOT / "configs" / "cnn" / f"{detector}_small.yaml"
    return build_detector(load_config(recipe, [*overfit.settings(detector, loss), *settings]), CLASSES)


def drawn_batch(objects: list[int]) -> tuple[list[torch.Tensor], list[dict]]:
    """Gray images of 64 x 96 pixels with bright squares, whose color is their class; `objects` in each image."""
    images, targets = [], []
    for image, count in enumerate(objects):
        pixels, masks = torch.full((3, 64, 96), 90.0), torch.zeros(count, 64, 96, dtype=torch.uint8)
        boxes = torch.zeros(count, 4)
        for i in range(count):
            side, x, y = 18 + 6 * i, 4 + 30 * i, 6 + 5 * image
            pixels[i, y : y + side, x : x + side] = 250.0
            masks[i, y : y + side, x : x + side] = 1
            boxes[i] = torch.tensor([x, y, x + side, y + side])
        images.append(pixels)
        targets.append({"boxes": boxes, "labels": torch.arange(count), "masks": masks})
    return images, targets


@pytest.mark.parametrize("detector", SCORE_BASED)
@pytest.mark.parametrize("loss", ["brs", "score"])
def test_the_loss_of_a_fixed_batch_falls_in_five_steps(detector, loss):
    model = build(detector, loss, *SMALLER)
    batch = drawn_batch([3, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        value = sum(model(*batch).values())
        losses.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("loss", [*RANKING, "score"])
@pytest.mark.parametrize("detector", SCORE_BASED)
def test_images_without_objects_train_what_they_can(detector, loss):
    model = build(detector, loss, *SMALLER)
    for objects in ([0, 0], [0, 2]):
        model.zero_grad(set_to_none=True)
        terms = model(*drawn_batch(objects))
        sum(terms.values()).backward()
        # data-parallel training waits for the gradient of every parameter
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        assert all(term.isfinite() for term in terms.values())
        # without any object a ranking loss compares nothing, and a score-based one has only background to learn
        compared = {name: float(term.detach()) for name, term in terms.items() if not name.endswith("cls")}
        assert any(compared.values()) if sum(objects) else not any(compared.values())


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["atss", "faster_rcnn"])
def test_a_detector_overfits_eight_images(detector, shared_data, tmp_path):
    recipe = ROOT / "configs" / "cnn" / f"{detector}_small.yaml"
    config = load_config(recipe, [f"data.root={shared_data / 'bccd'}", "model.loss=brs"])
    figures = overfit.train_and_score(config, *overfit.read_batches(config, 8, tmp_path), steps=150)
    assert figures["AP"] >= 0.8
