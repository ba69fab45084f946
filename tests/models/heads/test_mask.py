"""Mask head, against arrays of the official ranking heads and against what must hold anyway."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pycocotools import mask as coco_mask
from support import region_losses
from torchvision.ops import roi_align

from brs_detr.assign.assignment import HeadAssignment
from brs_detr.losses.objective import PredictionSet, RankingObjective
from brs_detr.models.config import RoIConfig
from brs_detr.models.heads.mask import MaskHead, paste_detections
from brs_detr.models.heads.roi import RoIHead
from brs_detr.models.objective_config import RankingConfig, ScoreConfig, TermWeights
from brs_detr.models.rcnn_config import MaskConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import cnn

STRIDES = (4, 8, 16, 32)
SIZES = [(64, 96), (40, 80)]
PUBLISHED = RoIConfig(RankingConfig(score_weighted=True), fc_dim=16, add_ground_truth=True, low_quality=True)
CE = ScoreConfig("cross_entropy", TermWeights(l1=1.0), normalizer="rows")


def heads(loss="brs", classes=5, dim=4, **mask):
    if loss == "cross_entropy":
        config = replace(PUBLISHED, objective=CE, box_loss="l1", sample=16)
    else:
        config = replace(PUBLISHED, objective=replace(PUBLISHED.objective, loss=loss))
    own = MaskConfig(**mask).resolved(config.objective)
    return RoIHead(dim, classes, STRIDES, config), MaskHead(dim, classes, STRIDES, own)


@pytest.mark.parametrize("loss", ["rs", "brs"])
@pytest.mark.parametrize("case", ["normal", "empty_one"])
def test_official_targets_losses_and_gradients(case, loss):
    recorded = cnn.load(f"mask_rcnn_{case}")
    roi, mask = heads(loss)
    targets = recorded.targets()
    for image, target in enumerate(targets):
        height, width = recorded.sizes("img_shape")[image]
        target["masks"] = recorded.arrays[f"gt_masks.{image}"].reshape(-1, height, width)
    seen = {}

    def answer(features, rois, classes):
        seen.update(rois=rois, classes=classes)
        return recorded.leaves["mask.pred_gt_class"]

    def compare(logits, wanted, compare=mask.compare):
        seen["targets"] = wanted
        return compare(logits, wanted)

    sizes = recorded.sizes("img_shape")
    roi.pool_rois, roi.classify_pooled = lambda *_: None, lambda _: recorded.regions()
    mask.forward, mask.compare = answer, compare
    terms = region_losses(roi, [], recorded.proposals(), sizes, targets, mask.losses)[0]
    for ours, theirs in zip(seen["rois"], recorded.rois("mask.rois"), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(seen["classes"], recorded.arrays["mask.labels"].long())
    assert torch.equal(seen["targets"], recorded.arrays["mask.target"])
    recorded.assert_losses(loss, terms)


def feature_maps(dim=4, batch=2):
    return [torch.randn(batch, dim, h, w) for h, w in [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]]


def random_boxes(count):
    corner = torch.rand(count, 2) * 20
    return torch.cat([corner, corner + 5 + torch.rand(count, 2) * 14], dim=1)


def random_targets(*counts, classes=5):
    """Objects whose masks fill a part of their boxes."""
    targets = []
    for count, (height, width) in zip(counts, SIZES):
        boxes = random_boxes(count)
        y, x = torch.arange(height)[:, None], torch.arange(width)
        x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < (y0 + y1) / 2)
        targets.append({"boxes": boxes, "labels": torch.randint(classes, (count,)), "masks": inside.to(torch.uint8)})
    return targets


@pytest.mark.parametrize("loss", ["brs", "rs", "bap", "balrp", "bndcg", "cross_entropy"])
@pytest.mark.parametrize(("counts", "proposals"), [((0, 0), 9), ((3, 0), 9), ((3, 2), 9), ((2, 0), 0), ((0,), 0)])
def test_every_parameter_has_a_gradient_whatever_the_images_show(loss, counts, proposals):
    roi, mask = heads(loss)
    boxes = [random_boxes(proposals) for _ in counts]
    features = feature_maps(batch=len(counts))
    terms, _ = region_losses(roi, features, boxes, SIZES[: len(counts)], random_targets(*counts), mask.losses)
    sum(terms.values()).backward()
    for parameter in (*roi.parameters(), *mask.parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    assert (float(terms["mask"].detach()) > 0) == any(counts)
    assert any(parameter.grad.any() for parameter in mask.parameters()) == any(counts)


def assignment_of(*counts, classes=3, background=5):
    """Positives of two objects an image, and background."""
    rois = [random_boxes(count + background) for count in counts]
    labels, rows, objects, start = [], [], [], 0
    for image, count in enumerate(counts):
        own = torch.randint(2, (count,))
        labels.append(torch.cat([own + image, torch.full((background,), classes)]))
        rows.append(torch.arange(count) + start)
        objects.append(own + 2 * image)
        start += count + background
    return HeadAssignment(rois, torch.cat(labels), torch.cat(rows), None, matched_idxs=torch.cat(objects))


def test_above_the_limit_masks_targets_labels_and_weights_stay_together():
    """Each chosen mask has the loss of its own RoI and object, and the weight of its own scores."""
    torch.manual_seed(0)
    counts, classes, limit = (170, 140), 3, 200
    assignment, features, targets = assignment_of(*counts), feature_maps(), random_targets(2, 2)
    mask = MaskHead(4, classes, STRIDES, MaskConfig("dice", max_masks=limit))
    values, chosen = mask.losses(features, assignment, targets)["mask"]
    assert len(chosen) == limit == len(chosen.unique()) and not torch.equal(chosen, torch.arange(limit))
    assert (chosen < counts[0]).any() and (chosen >= counts[0]).any()
    boxes = torch.cat(assignment.references)[assignment.rows]
    expected = []
    for positive in range(sum(counts)):  # one at a time, with RoIAlign written out
        image, roi = int(positive >= counts[0]), boxes[positive : positive + 1]
        own = int(assignment.matched_idxs[positive]) - 2 * image
        bitmap = targets[image]["masks"][own].float()[None, None]
        wanted = (roi_align(bitmap, [roi], 28, sampling_ratio=0, aligned=True)[0] >= 0.5).float()
        label = assignment.labels[assignment.rows[positive : positive + 1]]
        p = mask([x[image : image + 1] for x in features], [roi], label).sigmoid()
        expected.append(1 - 2 * (p * wanted).sum() / (p.square().sum() + wanted.square().sum() + 1e-5))
    expected = torch.stack(expected).detach()
    torch.testing.assert_close(values.detach(), expected[chosen], rtol=1e-4, atol=1e-5)

    logits = torch.randn(len(assignment.labels), classes)
    given = values.detach().requires_grad_()
    predictions = PredictionSet(
        logits,
        assignment.labels,
        quality=torch.rand(sum(counts)),
        box_losses={"mask": mask.losses(features, assignment, targets)["mask"]._replace(values=given, chosen=chosen)},
        rows=assignment.rows,
    )
    terms = RankingObjective("brs", 1.0, score_weighted=True)(predictions)
    terms["mask"].backward()
    scores = logits.sigmoid().amax(1)[assignment.rows[chosen]]
    factor = given.grad / scores
    torch.testing.assert_close(factor, factor[:1].expand(limit), rtol=1e-5, atol=0)


def test_the_order_of_the_choice_changes_nothing():
    """A permutation that keeps everybody chooses everybody, whatever its order."""
    torch.manual_seed(0)
    assignment, features, targets = assignment_of(6, 5), feature_maps(), random_targets(2, 2)
    mask = MaskHead(4, 3, STRIDES, MaskConfig("dice", max_masks=10))
    results = []
    for keep in (list(range(10)), list(range(9, -1, -1))):
        mask.permute = lambda count, device, keep=keep: torch.tensor([*keep, 10])
        results.append(mask.losses(features, assignment, targets)["mask"])
    assert torch.equal(results[0].chosen, results[1].chosen) and torch.equal(results[0].values, results[1].values)


def test_cross_entropy_is_the_mean_over_the_masks():
    """He et al., section 3: the mean over the cells, of positives only; not divided by the number of RoIs."""
    torch.manual_seed(0)
    roi, mask = heads("cross_entropy")
    features, targets = feature_maps(), random_targets(3, 2)
    seen = []
    mask.compare, compare = (lambda *args: seen.append(compare(*args)) or seen[-1]), mask.compare
    terms, _ = region_losses(roi, features, [random_boxes(9)] * 2, SIZES, targets, mask.losses)
    torch.testing.assert_close(terms["mask"], seen[0].mean())
    logits, wanted = torch.randn(2, 28, 28), (torch.rand(2, 28, 28) > 0.5).float()
    p = logits.sigmoid()
    by_hand = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean(dim=(1, 2))
    torch.testing.assert_close(compare(logits, wanted), by_hand)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        *((RankingConfig(loss), "dice") for loss in ("brs", "rs", "bap", "alrp", "ndcg")),
        *((ScoreConfig(loss), "binary_cross_entropy") for loss in ("focal", "cross_entropy")),
    ],
)
def test_the_mask_loss_follows_the_objective_unless_it_is_chosen(objective, expected):
    assert MaskHead(4, 3, STRIDES, MaskConfig().resolved(objective)).loss == expected
    for chosen in ("dice", "binary_cross_entropy"):
        assert MaskConfig(chosen).resolved(objective).loss == chosen
    with pytest.raises(ValueError, match="follows an objective"):
        MaskHead(4, 3, STRIDES, MaskConfig())


def test_layers_are_those_of_the_paper():
    mask = MaskHead(256, 80, STRIDES, MaskConfig("dice"))
    shapes = [tuple(parameter.shape) for parameter in mask.parameters() if parameter.ndim == 4]
    assert shapes == [(256, 256, 3, 3)] * 4 + [(256, 256, 2, 2), (80, 256, 1, 1)]


def test_masks_are_those_of_each_regions_class_in_order():
    """RoIs of several levels, each alone gives the mask it gives among others."""
    mask, features = MaskHead(4, 3, STRIDES, MaskConfig("dice")), feature_maps(batch=1)
    rois = torch.tensor([[0.0, 0, 90, 60], [3, 3, 9, 12], [1, 1, 500, 500], [4, 4, 30, 30]])
    classes = torch.tensor([2, 0, 1, 2])
    together = mask(features, [rois], classes)
    assert together.shape == (4, 28, 28)
    for row in range(4):
        alone = mask(features, [rois[row : row + 1]], classes[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


def test_detections_get_the_masks_of_their_labels_as_run_lengths():
    mask, features = MaskHead(4, 3, STRIDES, MaskConfig("dice")), feature_maps()
    boxes = [torch.tensor([[4.0, 8, 32, 36]]), torch.zeros(0, 4)]
    found = [{"boxes": own, "labels": torch.full((len(own),), 2), "scores": torch.ones(len(own))} for own in boxes]
    with torch.no_grad():
        mask.score.weight.zero_()
        mask.score.bias.copy_(torch.tensor([-5.0, -5.0, 5.0]))
    predicted = mask.predict(features, found)
    assert [own["masks"].shape for own in predicted] == [(1, 28, 28), (0, 28, 28)]
    for own in predicted:
        own["boxes"] = own["boxes"] * 2  # the stored image is twice as large
    pasted = paste_detections(predicted, [(128, 192), (80, 160)])
    assert [len(own["masks"]) for own in pasted] == [1, 0]
    bitmap = torch.from_numpy(coco_mask.decode(pasted[0]["masks"][0]))
    expected = torch.zeros(128, 192, dtype=torch.uint8)
    expected[16:72, 8:64] = 1
    assert torch.equal(bitmap, expected)
    assert pasted[0]["scores"] is predicted[0]["scores"]


def test_bfloat16_autocast_gives_float32_losses():
    roi, mask = heads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = [torch.nn.functional.conv2d(x, torch.eye(4)[..., None, None]) for x in feature_maps()]
        terms, _ = region_losses(roi, features, [random_boxes(8)] * 2, SIZES, random_targets(3, 2), mask.losses)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values())
