"""benchmarks/step.py: what a step may ask of a GPU, and that what is counted is the step that trains."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from support import ROOT, SMALL_DETECTOR, reset_accelerate

from brs_detr.config import load_config
from brs_detr.engine.trainer import Trainer
from brs_detr.models.transformer.attention import use_sampling
from brs_detr.ops.deform_attn import deformable_sampling

CLASSES = 5
SIZE = (64, 96)
TINY = ["model.backbone.name=test_resnet.r160_in1k", "model.backbone.pretrained=false"]


class Budget(NamedTuple):
    """What a step may ask.

    Attributes:
        operations: of a step of two images, forward and backward, that start kernels, with fused sampling.
        an_image: operations that each further image may add.
        waits: for results, with two images.
        copies: to the device that wait, with two images.
        an_image_waits: waits and copies that each further image may add.
    """

    operations: int
    an_image: int
    waits: int
    copies: int
    an_image_waits: int


# Measured with torch 2.15 and rounded up to tens; lower a number whenever the code needs fewer.
BUDGETS = {
    "brs_detr": Budget(0, 0, 0, 0, 0),
    "co_detr": Budget(0, 0, 0, 0, 0),
    "atss": Budget(0, 0, 0, 0, 0),
    "faster_rcnn": Budget(0, 0, 0, 0, 0),
    "r50": Budget(0, 0, 0, 0, 0),
}
RECIPES = {
    "brs_detr": ("demo.yaml", [*SMALL_DETECTOR, *TINY]),
    "co_detr": ("demo.yaml", [*SMALL_DETECTOR, *TINY, "model.loss=focal"]),
    "atss": ("cnn/atss_small.yaml", TINY),
    "faster_rcnn": ("cnn/faster_rcnn_small.yaml", TINY),
    "r50": ("brs_detr_r50_12e_coco.yaml", ["model.backbone.pretrained=false"]),
}


@pytest.fixture(scope="module")
def step(benchmark_module):
    yield benchmark_module("step")
    reset_accelerate()


def recipe(name):
    file, settings = RECIPES[name]
    return load_config(ROOT / "configs" / file, settings)


def counted(step, name, images):
    config = recipe(name)
    return step.count_step(config, step.generated_batch(images, SIZE, CLASSES), CLASSES, fused=True)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "r50" else []) for n in BUDGETS])
def test_a_step_stays_within_its_budget(step, name):
    budget, two, four = BUDGETS[name], counted(step, name, 2), counted(step, name, 4)
    report = "\n".join(step.section_lines(two, timed=False) + step.wait_lines("waits", two.waits + two.copies))
    print(name, two.total, (four.total-two.total)/2, two.waits.total(), two.copies.total(), (four.waits.total() + four.copies.total() - two.waits.total() - two.copies.total())/2)
    print(report)
    assert two.total <= budget.operations, report
    assert (four.total - two.total) / 2 <= budget.an_image, report
    assert two.waits.total() <= budget.waits, report
    assert two.copies.total() <= budget.copies, report
    more = four.waits.total() + four.copies.total() - two.waits.total() - two.copies.total()
    assert more / 2 <= budget.an_image_waits, report
