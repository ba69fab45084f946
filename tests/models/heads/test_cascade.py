"""Cascade head, against arrays of the official ranking heads and against what must hold anyway."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from brs_detr.models.heads.cascade import CascadeHead
from brs_detr.models.heads.roi import RoIOutput
from brs_detr.models.objective_config import RankingConfig, ScoreConfig, TermWeights
from brs_detr.models.rcnn_config import CascadeConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import cnn

STRIDES = (4, 8, 16, 32)
SIZES = [(64, 96), (40, 80)]
PUBLISHED = CascadeConfig(fc_dim=16, score_threshold=0.4)
CASES = ["normal", "empty_one", "empty_both"]
CE = ScoreConfig("cross_entropy", TermWeights(l1=1.0, giou=10.0), normalizer="rows")


def published(loss="brs", classes=5, dim=4, **changes):
    config = replace(PUBLISHED, **changes)
    if loss is not None:
        config = replace(config, objective=replace(config.objective, loss=loss))
    return CascadeHead(dim, classes, STRIDES, config)


def play(head, recorded, stages):
    """Let every stage answer with its recorded output, and keep the RoIs it was asked for."""
    asked = []
    for stage, prefix in zip(head.stages, stages, strict=True):

        def answer(features, rois, prefix=prefix):
            asked.append(rois)
            return recorded.regions(prefix)

        stage.forward = answer
    return asked


@pytest.mark.parametrize("loss", ["rs", "brs"])
@pytest.mark.parametrize("case", CASES)
def test_official_refinement_targets_losses_and_gradients(case, loss):
    recorded = cnn.load(f"cascade_rcnn_{case}")
    head, stages = published(loss), ["s0.", "s1.", "s2."]
    asked = play(head, recorded, stages)
    assigned = [stage.sample for stage in head.stages]
    seen = []
    for stage, sample in zip(head.stages, assigned, strict=True):
        stage.sample = lambda *args, sample=sample: seen.append((args, sample(*args))) or seen[-1][1]
    terms, last = head.losses([], recorded.proposals(), recorded.sizes("img_shape"), recorded.targets())
    for k, rois in enumerate(asked):
        (proposals, *_), (_, objects) = seen[k]
        if k:
            for image, boxes in enumerate(proposals):
                torch.testing.assert_close(boxes, recorded.arrays[f"s{k - 1}.refined.{image}"], rtol=0, atol=1e-3)
        for ours, theirs in zip(rois, recorded.rois(f"s{k}.rois"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
        for image, indices in enumerate(objects):
            expected = recorded.arrays[f"s{k}.sample.{image}.pos_gt_inds"].long()
            assert torch.equal(indices[indices >= 0], expected)
    assert torch.equal(last.labels, recorded.arrays["s2.target.labels"].long())
    if not any(recorded.info["num_pos"]):  # theirs return a constant of 1 for each term
        return recorded.assert_no_positives(terms)
    recorded.assert_losses(loss, terms)


@pytest.mark.parametrize("case", CASES)
def test_official_detections(case):
    recorded = cnn.load(f"cascade_rcnn_{case}")
    head, stages = published(), ["test.s0.", "test.s1.", "test.s2."]
    asked = play(head, recorded, stages)
    found = head.predict([], recorded.proposals(), recorded.sizes("img_shape"))
    for prefix, rois in zip(stages, asked, strict=True):
        for ours, theirs in zip(rois, recorded.rois(f"{prefix}rois"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    for image, detections in enumerate(found):
        expected = recorded.arrays[f"det.{image}.bboxes"].reshape(-1, 5)
        order = expected[:, 4].argsort(descending=True, stable=True)  # theirs go class by class
        expected = expected[order]
        torch.testing.assert_close(detections["boxes"], expected[:, :4], rtol=0, atol=1e-3)
        torch.testing.assert_close(detections["scores"], expected[:, 4], rtol=1e-5, atol=1e-6)
        assert torch.equal(detections["labels"], recorded.arrays[f"det.{image}.labels"].long()[order])


def feature_maps(dim=4, batch=2):
    return [torch.randn(batch, dim, h, w) for h, w in [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]]


def random_boxes(count):
    corner = torch.rand(count, 2) * 30
    return torch.cat([corner, corner + 5 + torch.rand(count, 2) * 40], dim=1)


def random_targets(*counts, classes=5):
    return [{"boxes": random_boxes(n), "labels": torch.randint(classes, (n,))} for n in counts]


@pytest.mark.parametrize("loss", ["brs", "rs", "bap", "balrp", "bndcg", "cross_entropy"])
@pytest.mark.parametrize(("counts", "proposals"), [((0, 0), 9), ((3, 0), 9), ((3, 2), 9), ((2, 0), 0), ((0,), 0)])
def test_every_parameter_has_a_gradient_whatever_the_images_show(loss, counts, proposals):
    changes = {"objective": CE, "box_loss": "l1", "sample": 16} if loss == "cross_entropy" else {}
    head = published(loss, **changes)
    terms, _ = head.losses(
        feature_maps(batch=len(counts)),
        [random_boxes(proposals) for _ in counts],
        SIZES[: len(counts)],
        random_targets(*counts),
    )
    sum(terms.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())
    if not any(counts):
        assert all(float(value.detach()) == 0 for name, value in terms.items() if "cls" not in name)


def test_each_stage_has_its_weight_and_its_deviations():
    torch.manual_seed(0)
    head = published(stage_weights=(1.0, 0.5, 0.25), std_divisors=(1.0, 2.0, 4.0))
    assert [stage.min_iou for stage in head.stages] == [0.5, 0.6, 0.7]
    assert [stage.coder.stds[0] for stage in head.stages] == [0.1, 0.05, 0.025]
    inputs = feature_maps(), [random_boxes(9), random_boxes(9)], SIZES, random_targets(3, 2)
    weighted = head.losses(*inputs).terms
    head.stage_weights = (1.0, 1.0, 1.0)
    plain = head.losses(*inputs).terms
    for name, value in plain.items():
        torch.testing.assert_close(weighted[name], value * (1.0, 0.5, 0.25)[int(name[0])])


def test_a_box_of_the_last_class_is_refined_by_its_own_offsets():
    """With one box per class: the last class, and not softmax's background, decides over a background RoI."""
    head = CascadeHead(4, 2, STRIDES, replace(PUBLISHED, objective=CE, class_agnostic=False))
    asked = []

    def answer(features, rois):
        asked.append(rois)
        deltas = torch.zeros(1, 2, 4)
        deltas[0, 1, 0] = 5.0  # class 1: half a width to the right
        return RoIOutput(torch.tensor([[0.0, 3.0, 9.0]]), deltas)

    for stage in head.stages:
        stage.forward = answer
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    head.losses([], [torch.tensor([[0.0, 0, 20, 20]])], [(50, 50)], nothing)
    assert [rois[0][0, 0].item() for rois in asked] == [0, 10, 20]
    asked.clear()
    head.predict([], [torch.tensor([[0.0, 0, 20, 20]])], [(50, 50)])
    assert [rois[0][0, 0].item() for rois in asked] == [0, 10, 20]


def test_scores_are_of_the_mean_logits_of_all_stages():
    head = published(classes=1)
    for stage, logit in zip(head.stages, (0.0, 1.0, 5.0), strict=True):
        stage.forward = lambda features, rois, logit=logit: RoIOutput(torch.tensor([[logit]]), torch.zeros(1, 1, 4))
    (found,) = head.predict([], [torch.tensor([[0.0, 0, 20, 20]])], [(50, 50)])
    torch.testing.assert_close(found["scores"], torch.tensor([2.0]).sigmoid())


def test_settings_of_another_number_of_stages_are_named():
    config = CascadeConfig(RankingConfig(), stage_weights=(1.0, 0.5))
    assert list(config.problems("model.roi")) == [
        "model.roi.stage_weights has 2 entries for 3 stages of model.roi.min_ious; give as many"
    ]


@pytest.mark.parametrize("loss", ["brs", "cross_entropy"])
def test_each_stage_gets_the_objects_once(loss):
    """The objects of a stage do not come back refined; with a sampler only those that it chose are dropped."""
    changes = {"objective": CE, "sample": 8} if loss == "cross_entropy" else {}
    head, targets = published(loss, **changes), random_targets(4, 0)
    asked = []
    for stage in head.stages:
        stage.register_forward_pre_hook(lambda module, args: asked.append(args[1]))
    head.losses(feature_maps(), [targets[0]["boxes"] + 0.5, random_boxes(4)], SIZES, targets)
    for rois in asked:
        equal = (rois[0][:, None] == targets[0]["boxes"]).all(dim=2).sum(dim=0)
        assert (equal == 1).all() if loss == "brs" else (equal <= 1).all()
    if loss == "brs":
        assert [[len(own) for own in rois] for rois in asked] == [[8, 4]] * 3
