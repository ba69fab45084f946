"""The dense heads of a step, read with one wait, against each head's own losses, which wait image by image."""

from dataclasses import replace

import pytest
import torch

from brs_detr.models.config import AuxATSSConfig, BRSDETRConfig, CoDETRConfig
from brs_detr.models.heads.atss import ATSSHead
from brs_detr.models.heads.roi import RoIHead
from brs_detr.models.heads.rpn import RPNHead
from brs_detr.models.heads.step import DenseStep, RegionStep, read_counts
from brs_detr.ops.boxes import Regions

STRIDES, SHAPES = (8, 16, 32), [(12, 16), (6, 8), (3, 4)]
SIZES = [(96, 120), (70, 128), (96, 128)]


def targets(counts):
    made = []
    for count, (h, w) in zip(counts, SIZES):
        center, half = torch.rand(count, 2) * torch.tensor([w, h]), torch.rand(count, 2) * 20 + 4
        boxes = torch.cat([(center - half).clamp(min=0), center + half], dim=1)
        made.append({"boxes": boxes, "labels": torch.randint(0, 3, (count,))})
    return made


def regions(counts):
    """Proposals of three images, some of them missing."""
    corner = torch.rand(3, 12, 2) * 60
    boxes = torch.cat([corner, corner + torch.rand(3, 12, 2) * 60 + 2], dim=2)
    return Regions(boxes, torch.arange(12) < torch.tensor(counts)[:, None])


def losses_of_regions(roi, maps, proposals, given):
    """Terms and assignment with the number of RoIs and of positives read image by image."""
    rois, assigned = roi.sample(proposals, SIZES, given)
    assignment = roi.assign(rois, assigned, given)
    return roi.terms(roi(maps, rois), assignment, {}), assignment


@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 0), (1, 9, 2)])
@pytest.mark.parametrize("proposals", [(12, 12, 12), (12, 0, 7)])
@pytest.mark.parametrize("family", [BRSDETRConfig, CoDETRConfig])
def test_heads_together_learn_what_each_alone_learns(counts, proposals, family):
    torch.manual_seed(sum(counts))
    config = family()
    everything = {"sample": None, "add_ground_truth": True} if family is CoDETRConfig else {}
    rpn = RPNHead(16, STRIDES, replace(config.rpn, sample=None, objective=BRSDETRConfig.rpn.objective, box_loss="giou"))
    roi = RoIHead(16, 3, STRIDES, replace(config.roi, fc_dim=16, **everything))
    atss = ATSSHead(16, 3, STRIDES, replace(config.atss, topk=4), norm_groups=4)
    maps = [torch.randn(3, 16, h, w) for h, w in SHAPES]
    given, found = targets(counts), regions(proposals)
    there, anchors, dense = found.never_empty(SIZES), rpn(maps), atss(maps)
    steps = [
        DenseStep(rpn, anchors, SIZES, given),
        RegionStep(roi, maps, there, SIZES, given),
        DenseStep(atss, dense, SIZES, given),
    ]
    read_counts(steps)
    alone = [
        rpn.losses(anchors, SIZES, given),
        losses_of_regions(roi, maps, found.per_image(), given),
        atss.losses(dense, SIZES, given),
    ]
    for step, (terms, assignment) in zip(steps, alone, strict=True):
        own = step.assignment
        assert torch.equal(own.labels, assignment.labels) and torch.equal(own.rows, assignment.rows)
        assert torch.equal(own.targets, assignment.targets)
        assert all(torch.equal(*pair) for pair in zip(own.references, assignment.references, strict=True))
        assert own.counts == [int((labels < step.head.num_classes).sum()) for labels in own.per_image(own.labels)]
        losses = step.losses()
        assert losses.keys() == terms.keys()
        for name, value in losses.items():
            torch.testing.assert_close(value, terms[name], rtol=1e-6, atol=1e-7)
    pooled = roi.pool_rois(maps, alone[1][1].references).features()
    assert torch.equal(torch.cat(steps[1].features(maps)), pooled)


def test_regions_that_are_missing_are_nobodys_best_box():
    """An object that no proposal overlaps enough stays without one, whatever stands in the empty places."""
    roi = RoIHead(4, 3, STRIDES, replace(BRSDETRConfig().roi, fc_dim=8, low_quality=True))
    boxes = torch.tensor([[[0.0, 0, 20, 20], [30, 30, 60, 60], [31, 31, 60, 60]]])
    given = [{"boxes": torch.tensor([[30.0, 30, 60, 60]]), "labels": torch.tensor([1])}]
    step = RegionStep(
        roi,
        [torch.randn(1, 4, *s) for s in SHAPES],
        Regions(boxes, torch.tensor([[True, False, False]])),
        [(90, 90)],
        given,
    )
    read_counts([step])
    assert step.assignment.labels.tolist() == [3] and step.assignment.references[0].equal(boxes[0, :1])


def test_an_image_without_any_region_is_one_itself():
    there = regions((12, 0, 7)).never_empty(SIZES)
    assert there.valid.sum(dim=1).tolist() == [12, 1, 7]
    assert there.boxes[1, 0].tolist() == [0, 0, 128, 70]


def test_no_head_reads_nothing():
    read_counts([])


def test_positives_are_counted_by_image_with_several_anchors_a_cell():
    head = ATSSHead(16, 3, STRIDES, replace(AuxATSSConfig(), scales_per_octave=2, topk=4), norm_groups=4)
    given = targets((4, 0, 3))
    step = DenseStep(head, head([torch.randn(3, 16, *shape) for shape in SHAPES]), SIZES, given)
    read_counts([step])
    labels = step.assignment.per_image(step.assignment.labels)
    assert step.assignment.counts == [int((own < 3).sum()) for own in labels] and step.assignment.counts[1] == 0
