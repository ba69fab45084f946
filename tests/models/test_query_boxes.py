"""The decoder's queries from the RPN's proposals."""

import pytest
import torch
from support import DEMO, SMALL_DETECTOR

from brs_detr.config import load_config
from brs_detr.models.build import build_model
from brs_detr.ops.boxes import Regions
from brs_detr.ops.images import ImageBatch


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = load_config(DEMO, [*SMALL_DETECTOR, "model.query_boxes=rpn", "model.proposal_nms_iou=0.5"])
    return build_model(config.model, 3)


IMAGES = ImageBatch.from_list([torch.randint(0, 255, (3, 64, 80)), torch.randint(0, 255, (3, 72, 48))])


def test_queries_begin_at_the_proposals_of_the_rpn(model):
    model.eval()
    with torch.no_grad():
        memory = model.encode_batch(IMAGES)
        regions = model.rpn.regions(model.rpn(model.pyramid(memory)), IMAGES.sizes)
        references = model.references(model.proposals(memory), regions, IMAGES.sizes)
    for own, start, (h, w) in zip(regions.boxes, references, IMAGES.sizes, strict=True):
        x, y, width, height = (start[0] * torch.tensor([w, h, w, h])).tolist()
        best = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        assert best == pytest.approx(own[0].tolist(), abs=1e-3)


def test_an_image_is_detected_alone_as_in_a_batch(model):
    model.eval()
    alone = ImageBatch.from_list([IMAGES.pixels[1][:, :72, :48]])
    with torch.no_grad():
        memory = [model.encode_batch(images) for images in (IMAGES, alone)]
        # of the same features: padding changes those of a backbone
        regions = model.rpn.regions(model.rpn(model.pyramid(memory[1])), alone.sizes)
        own = model.references(model.proposals(memory[1]), regions, alone.sizes)
        both = model.proposals(memory[1])._replace(references=model.proposals(memory[1]).references.repeat(2, 1, 1))
        few = regions.valid & (torch.arange(regions.valid.shape[1]) < 2)
        joined = Regions(regions.boxes.repeat(2, 1, 1), torch.cat([few, regions.valid]))
        padded = model.references(both, joined, alone.sizes * 2)
    assert torch.equal(padded[1], own[0])


def test_every_parameter_learns_also_without_objects(model):
    model.train()
    targets = [{"boxes": torch.tensor([[5.0, 5, 30, 40]]), "labels": torch.tensor([1])}]
    targets.append({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)})
    loss = sum(model(IMAGES, targets).values())
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
