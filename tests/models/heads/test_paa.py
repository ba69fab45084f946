"""PAA's head, against arrays of the official ranking heads and against what must hold anyway."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

from brs_detr.models.heads.dense import DenseHead, DenseOutput
from brs_detr.models.heads.paa import PAAHead
from brs_detr.models.objective_config import RankingConfig, ScoreConfig, TermWeights
from brs_detr.models.one_stage_config import PAAHeadConfig
from brs_detr.ops.anchors import valid_extents
from brs_detr.ops.boxes import vote

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import cnn

CASES = ["normal", "own_padding", "empty_one", "empty_both"]
SHAPES = [(6, 8), (3, 4), (2, 2), (1, 1), (1, 1)]
SIZES = [(48, 64), (40, 56)]
OBJECT = [4.0, 4, 36, 36]


def published(loss="brs", classes=5, dim=64, **options):
    """The rank-based head; AP runs with half the usual half width, and its box loss has weight 1."""
    objective = RankingConfig(loss, score_weighted=True, delta=0.5, box_weight=1.0)
    return PAAHead(dim, classes, cnn.STRIDES, PAAHeadConfig(**{"objective": objective, **options}))


@pytest.mark.parametrize("loss", ["rs", "brs", "ap", "bap"])
@pytest.mark.parametrize("case", CASES)
def test_official_targets_losses_and_gradients(case, loss):
    recorded = cnn.load(f"paa_{case}")
    terms, assignment = published(loss).losses(recorded.output(), recorded.sizes(), recorded.targets())
    for image, labels in enumerate(assignment.per_image(assignment.labels)):
        valid = recorded.arrays[f"target.label_weights.{image}"] > 0
        assert torch.equal(labels, recorded.arrays[f"target.labels.{image}"][valid].long())
    if recorded.info["num_pos"] == 0:
        return recorded.assert_no_positives(terms)
    recorded.assert_losses(loss, terms)


@pytest.mark.parametrize("case", CASES[:3])
def test_official_candidates_and_their_costs(case):
    recorded = cnn.load(f"paa_{case}")
    head, output, targets = published(), recorded.output(), recorded.targets()
    extents = [valid_extents(size, output.shapes, cnn.STRIDES) for size in recorded.sizes()]
    seen = {}

    class Recorder(type(head.assigner)):
        def select(self, candidates, costs, level_counts, num_objects):
            seen.update(candidates=candidates, costs=costs)
            return super().select(candidates, costs, level_counts, num_objects)

    head.assigner = Recorder()
    assignment = head.assign(output, extents, targets)
    start = 0
    for image, costs in enumerate(assignment.per_image(seen["costs"])):
        candidates = assignment.per_image(seen["candidates"])[image]
        rows = (candidates >= 0).nonzero()[:, 0]
        if len(targets[image]["boxes"]) == 0:
            assert len(rows) == 0
            continue
        # The official rows count the padding too.
        inside = recorded.arrays[f"target.label_weights.{image}"].bool().nonzero()[:, 0]
        assert torch.equal(inside[rows], recorded.arrays[f"first.pos_inds.{image}"].long())
        assert torch.equal(candidates[rows] - start, recorded.arrays[f"first.pos_gt.{image}"].long())
        torch.testing.assert_close(costs[rows], recorded.arrays[f"first.pos_loss.{image}"], rtol=1e-5, atol=1e-6)
        start += len(targets[image]["boxes"])


def by_class(boxes, scores, labels):
    """Official detections come class after class; within a class both are sorted by score."""
    order = torch.argsort(labels * 10 - scores, stable=True)
    return boxes[order], scores[order], labels[order]


@pytest.mark.parametrize("voted", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_official_detections(case, voted):
    """Empty boxes, for which the official code returns nan, are compared by score and class."""
    recorded = cnn.load(f"paa_{case}")
    head = published(score_threshold=0.05, nms_iou=0.6, before_nms=5 * 1000)
    name = "det" if voted else "det_unvoted"
    if not voted:
        head.detect = lambda *arguments: DenseHead.detect(head, *arguments)
    for image, found in enumerate(head.predict(recorded.output(), recorded.sizes("img_shape"))):
        expected = recorded.arrays[f"{name}.{image}.bboxes"]
        labels = recorded.arrays[f"{name}.{image}.labels"].long()
        boxes, scores, labels = by_class(expected[:, :4], expected[:, 4], labels)
        ours = by_class(found["boxes"], found["scores"], found["labels"])
        assert torch.equal(ours[2], labels)
        filled = ~boxes.isnan().any(dim=1)
        torch.testing.assert_close(ours[1], scores, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[0][filled], boxes[filled], rtol=0, atol=1e-3)
        assert ours[0].isfinite().all()
        assert (found["scores"].diff() <= 0).all()  # best first, in any class


def feature_maps(dim=64, batch=2):
    return [torch.randn(batch, dim, h, w) for h, w in SHAPES]


def targets(*boxes_per_image):
    boxes = [torch.tensor(boxes).reshape(-1, 4) for boxes in boxes_per_image]
    return [{"boxes": own, "labels": torch.zeros(len(own), dtype=torch.int64)} for own in boxes]


@pytest.mark.parametrize("loss", ["brs", "rs", "bap", "ap", "alrp", "focal"])
@pytest.mark.parametrize("boxes", [([], []), ([OBJECT], []), ([OBJECT], [OBJECT])], ids=["none", "one", "both"])
@pytest.mark.parametrize("classes", [1, 3])
def test_every_parameter_has_a_gradient_whatever_the_images_show(loss, boxes, classes):
    options = {"stacked_convs": 1, "classes": classes}
    if loss == "focal":
        options |= {"objective": ScoreConfig(weights=TermWeights(giou=1.3)), "iou_branch": True}
    head = published(**options) if loss == "focal" else published(loss, **options)
    terms = head.losses(head(feature_maps()), SIZES, targets(*boxes)).terms
    assert ("iou" in terms) == (loss == "focal")
    sum(terms.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())
    if not any(boxes):
        assert all(float(value.detach()) == 0 for name, value in terms.items() if name != "cls")


def test_the_assignment_follows_the_outputs():
    """Of two anchors that overlap an object alike, the one whose class and box are predicted is positive."""
    head = published(classes=2)
    output = head(feature_maps(batch=1))
    logits = [torch.zeros_like(level) for level in output.logits]
    deltas = [torch.zeros_like(level) for level in output.deltas]
    boxes = targets([[20.0, 12, 52, 44]])  # centered between four cells of stride 8, and in their middle
    logits[0][0, 3, 4, 0, 0] = 6.0
    rows = head.losses(DenseOutput(logits, deltas), SIZES[:1], boxes).assignment.rows
    assert (3 * 8 + 4) * 3 in rows.tolist()
    logits[0][0, 3, 4, 0, 0], logits[0][0, 4, 5, 0, 0] = -6.0, 6.0
    rows = head.losses(DenseOutput(logits, deltas), SIZES[:1], boxes).assignment.rows
    assert (4 * 8 + 5) * 3 in rows.tolist() and (3 * 8 + 4) * 3 not in rows.tolist()


def test_iou_branch_by_hand():
    """Box losses are weighed with the IoU, the branch learns it, and scores are geometric means."""
    head = published(objective=ScoreConfig(weights=TermWeights(giou=1.3)), iou_branch=True, classes=2)
    output = head(feature_maps())
    extents = [valid_extents(size, output.shapes, cnn.STRIDES) for size in SIZES]
    assignment = head.assign(output, extents, targets([OBJECT], []))
    terms = head.terms(output, extents, assignment, head.normalizer(assignment))
    anchors = torch.cat(assignment.references)[assignment.rows]
    logits = torch.cat([level[0].reshape(-1, 1) for level in output.iou])[assignment.rows, 0]
    deltas = torch.cat([level[0].reshape(-1, 4) for level in output.deltas])[assignment.rows]
    quality, losses = head.box_losses(anchors, deltas, assignment.targets)
    cross_entropy = -(quality * logits.sigmoid().log() + (1 - quality) * (1 - logits.sigmoid()).log())
    count = max(len(quality), 2)  # of two images
    torch.testing.assert_close(terms["iou"], 0.5 * cross_entropy.sum() / count)
    expected = 1.3 * (quality * losses["giou"]).sum() / quality.sum().clamp(min=1)
    torch.testing.assert_close(terms["giou"], expected)
    scores = head.class_scores(output, 1)
    torch.testing.assert_close(scores, (output.logits[1].sigmoid() * output.iou[1].sigmoid()).sqrt())


def slow_vote(boxes, labels, candidates, scores, candidate_labels):
    voted = boxes.clone()
    for i, box in enumerate(boxes):
        total, mean = 0.0, torch.zeros(4)
        for other, score, label in zip(candidates, scores, candidate_labels):
            iou = float(box_iou(box[None], other[None]))
            if label == labels[i] and iou > 0.01:
                weight = float(torch.exp(torch.tensor(-((1 - iou) ** 2) / 0.025)) * score)
                total, mean = total + weight, mean + weight * other
        if total > 0:
            voted[i] = mean / total
    return voted


def test_votes_equal_the_slow_form_and_are_never_nan():
    corner = torch.rand(40, 2) * 20
    candidates = torch.cat([corner, corner + 10 + torch.rand(40, 2) * 10], dim=1)
    candidates[3] = torch.tensor([5.0, 5, 5, 20])  # empty: its IoU with itself is 0
    labels, scores = torch.randint(0, 2, (40,)), torch.rand(40)
    scores[5:8] = 0.0  # below the threshold: no vote
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of no effect on pixels
        ours = vote(candidates[:10], labels[:10], candidates, scores, labels)
    torch.testing.assert_close(ours, slow_vote(candidates[:10], labels[:10], candidates, scores, labels))
    assert torch.equal(ours[3], candidates[3])


def test_an_empty_box_at_the_border_is_not_nan():
    head = published(classes=1, stacked_convs=0, score_threshold=0.5)
    output = head(feature_maps(batch=1))
    logits = [torch.full_like(level, -9.0) for level in output.logits]
    deltas = [torch.zeros_like(level) for level in output.deltas]
    logits[0][0, 0, 7, 0] = 2.0
    deltas[0][0, 0, 7, 0, 0] = 100.0  # ten widths to the right: nothing is left inside the image
    (found,) = head.predict(DenseOutput(logits, deltas), SIZES[:1])
    assert found["boxes"].shape == (1, 4) and found["boxes"].isfinite().all()


def test_cost_is_focal_loss_plus_giou_loss():
    """Of all-zero logits, focal loss is (alpha + (1 - alpha) (C - 1)) ln(2) / 4."""
    output = DenseOutput(
        [torch.zeros(1, h, w, 3, 2) for h, w in SHAPES], [torch.zeros(1, h, w, 3, 4) for h, w in SHAPES]
    )
    head = published(classes=2, box_cost=1.3)
    anchors = [torch.cat([level.reshape(-1, 4) for level in head.anchors(SHAPES)])]
    counts = [[h * w * 3 for h, w in SHAPES]]
    candidates = DenseHead.match(head, anchors, counts, targets([OBJECT]), output, [SHAPES])
    costs = head.costs(anchors, candidates, output, [SHAPES])
    rows = (candidates.assigned == 0).nonzero()[:, 0]
    giou = generalized_box_iou(anchors[0][rows], torch.tensor([OBJECT]))[:, 0]
    torch.testing.assert_close(costs[rows], (0.25 + 0.75) * math.log(2) / 4 + 1.3 * (1 - giou))
    assert costs[candidates.assigned < 0].isinf().all()


def test_candidates_below_the_threshold_do_not_vote():
    head = published(classes=1, stacked_convs=0, score_threshold=0.3)
    logits = [torch.full((1, h, w, 3, 1), -1.0) for h, w in SHAPES]  # 0.27
    deltas = [torch.zeros(1, h, w, 3, 4) for h, w in SHAPES]
    logits[1][0, 1, 2, 0] = 3.0
    (found,) = head.predict(DenseOutput(logits, deltas), SIZES[:1])
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 0, 64, 48]]))
