"""The detector at a small size: both loss families, awkward batches, and what it returns."""

from dataclasses import replace

import pytest
import torch
from support import SMALL_BACKBONE
from torchvision.ops import box_iou, clip_boxes_to_image

from brs_detr.config import Config, apply_overrides
from brs_detr.models.brs_detr import detections_from
from brs_detr.models.build import build_model
from brs_detr.models.config import BRSDETRConfig, CoDETRConfig, HardNMS, NoNMS, RoIConfig, RPNConfig, SoftNMS
from brs_detr.models.detector import without_overlaps
from brs_detr.models.ensemble import Ensemble
from brs_detr.models.transformer.decoder import Predictions
from brs_detr.ops.images import ImageBatch
from brs_detr.ops.soft_nms import soft_nms

SIZE = dict(
    backbone=SMALL_BACKBONE,
    dim=64,
    heads=4,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=32,
    queries=12,
    max_aux_queries=12,
)
SMALL = BRSDETRConfig(**SIZE, rpn=RPNConfig(proposals_before_nms=50, proposals=40), roi=RoIConfig(fc_dim=32))
FOCAL = CoDETRConfig(
    **SIZE,
    rpn=replace(CoDETRConfig.rpn, proposals_before_nms=50, proposals=40, sample=32),
    roi=replace(CoDETRConfig.roi, fc_dim=32, sample=32),
)


def with_loss(model, loss):
    return apply_overrides(Config(model=model), [f"model.loss={loss}"]).model


EXACT = replace(with_loss(SMALL, "rs"), encoder_ranking="first")


def image(height=64, width=80):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def target(count, classes=3, height=64, width=80):
    center = torch.rand(count, 2) * torch.tensor([width, height]) * 0.6 + torch.tensor([width, height]) * 0.2
    half = torch.rand(count, 2) * 8 + 4
    return {
        "boxes": torch.cat([center - half, center + half], -1),
        "labels": torch.randint(0, classes, (count,)),
        "image_id": 1,
    }


def train_step(settings, images, targets, classes=3):
    model = build_model(settings, classes).train()
    losses = model(images, targets)
    assert all(term.ndim == 0 and term.isfinite() for term in losses.values()), losses
    sum(losses.values()).backward()
    return model, losses


@pytest.mark.parametrize("settings", [SMALL, FOCAL, EXACT])
@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0), (4,), (0,)])
def test_every_parameter_gets_a_finite_gradient_whatever_the_batch_holds(settings, counts):
    images = [image(64 - 7 * i) for i in range(len(counts))]
    model, _ = train_step(settings, images, [target(n, height=64 - 7 * i) for i, n in enumerate(counts)])
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("settings", [SMALL, FOCAL])
@pytest.mark.parametrize("counts", [(3, 1), (5, 0)])
def test_several_anchors_a_cell_are_auxiliary_queries_too(settings, counts):
    settings = replace(settings, atss=replace(settings.atss, scales_per_octave=3, anchor_ratios=(0.5, 1.0)))
    images = [image(64 - 7 * i) for i in range(len(counts))]
    _, losses = train_step(settings, images, [target(n, height=64 - 7 * i) for i, n in enumerate(counts)])
    assert losses["aux_atss.0.l1"] > 0


@pytest.mark.parametrize("loss", ["rs", "bap", "ap", "balrp", "alrp", "bndcg", "ndcg", "quality_focal"])
def test_every_loss_trains_every_head(loss):
    settings = with_loss(FOCAL if loss == "quality_focal" else SMALL, loss)
    _, losses = train_step(settings, [image(), image()], [target(3), target(0)])
    assert sum(losses.values()) > 0


@pytest.mark.parametrize("settings", [SMALL, FOCAL])
def test_one_class_trains(settings):
    train_step(settings, [image()], [target(3, classes=1)], classes=1)


def test_each_query_set_and_dense_head_has_its_terms_and_boxes_weigh_what_the_ranking_weighs():
    _, losses = train_step(SMALL, [image()], [target(3)])
    sets = ["encoder", *(f"{s}.{layer}" for s in ("decoder", "aux_roi", "aux_atss") for layer in range(2))]
    expected = {f"{s}.{t}" for s in sets for t in ("rank", "sort", "l1", "giou")}
    expected |= {f"{h}.{t}" for h in ("rpn", "roi", "atss") for t in ("rank", "sort", "giou")}
    assert set(losses) == expected
    for s in [*sets, "atss"]:  # value-based self-balancing: each box term is worth rank + sort
        torch.testing.assert_close(losses[f"{s}.giou"], losses[f"{s}.rank"] + losses[f"{s}.sort"])


def test_co_detr_has_the_original_terms():
    _, losses = train_step(FOCAL, [image()], [target(3)])
    assert {"rpn.cls", "rpn.l1", "roi.cls", "roi.giou", "atss.cls", "atss.giou", "atss.centerness"} <= set(losses)
    assert "decoder.0.rank" not in losses


@pytest.mark.parametrize("head", ["decoder", "roi", "atss"])
@pytest.mark.parametrize("settings", [SMALL, FOCAL])
def test_detections_lie_inside_the_stored_image_best_first(settings, head):
    model = build_model(settings, 3).eval()
    model.predict_with = head
    images = ImageBatch.from_list([image(), image(50, 70)], original_sizes=[(128, 160), (500, 700)])
    with torch.no_grad():
        found = model(images)
    for one, (h, w) in zip(found, images.original_sizes):
        assert len(one["boxes"]) == len(one["scores"]) == len(one["labels"]) > 0
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= torch.tensor([w, h, w, h]) + 1e-3).all()
        assert (one["scores"].diff() <= 0).all() and ((one["labels"] >= 0) & (one["labels"] < 3)).all()


def suppressed_slowly(found, iou):
    """Greedy suppression as it is defined: best first, each against all that were kept."""
    kept = []
    for row in range(len(found["scores"])):
        same = [other for other in kept if found["labels"][other] == found["labels"][row]]
        boxes = found["boxes"][same], found["boxes"][row, None]
        if not same or box_iou(*boxes).max() <= iou:
            kept.append(row)
    return {name: column[kept] for name, column in found.items()}


def overlapping_detections():
    """A detector whose decoder finds boxes that overlap, and images for it."""
    model = build_model(replace(SMALL, detections_per_image=36), 3).eval()
    with torch.no_grad():
        for layer in model.decoder.regressors:
            layer[-1].bias[2:] += 3
    return model, ImageBatch.from_list([image(), image(50, 70)], original_sizes=[(128, 160), (500, 700)])


def test_the_decoders_detections_are_suppressed_where_that_is_wanted():
    model, images = overlapping_detections()
    with torch.no_grad():
        plain, roi = model.detect_with_all_heads(images)["decoder"], model.detect_with_all_heads(images)["roi"]
        model.nms = HardNMS(iou=0.4)
        by_head = model.detect_with_all_heads(images)
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(model(images), by_head["decoder"]))
    for one, every in zip(by_head["decoder"], plain):
        expected = suppressed_slowly(every, 0.4)
        assert 0 < len(expected["scores"]) < len(every["scores"]) == 36
        assert all(torch.equal(one[name], expected[name]) for name in expected)
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(by_head["roi"], roi))  # has its own nms_iou


def test_the_decoders_detections_keep_a_part_of_their_scores_where_that_is_wanted():
    model, images = overlapping_detections()
    with torch.no_grad():
        plain, roi = model.detect_with_all_heads(images)["decoder"], model.detect_with_all_heads(images)["roi"]
        model.nms = SoftNMS(iou=0.4, min_score=0.002)
        by_head = model.detect_with_all_heads(images)
        assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(model(images), by_head["decoder"]))
    for one, every, size in zip(by_head["decoder"], plain, images.original_sizes):
        clipped = clip_boxes_to_image(every["boxes"], size)
        kept, scores = soft_nms(clipped, every["scores"], every["labels"], iou=0.4, min_score=0.002)
        assert torch.equal(one["boxes"], clipped[kept]) and torch.equal(one["labels"], every["labels"][kept])
        torch.testing.assert_close(one["scores"], scores)
        assert 0 < len(scores) < 36 and not torch.equal(scores, every["scores"][: len(scores)])
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(by_head["roi"], roi))  # has its own nms_iou


def test_of_one_image_at_most_so_many_are_kept():
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 9], [20, 20, 30, 30]])
    found = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.zeros(3, dtype=torch.long)}]
    for nms, expected in ((NoNMS(), [0.9, 0.8]), (HardNMS(), [0.9, 0.7]), (SoftNMS(), [0.9, 0.7])):
        [limited] = without_overlaps(found, [(40, 40)], nms, max_detections=2)
        assert limited["scores"].tolist() == pytest.approx(expected)
        [every] = without_overlaps(found, [(40, 40)], nms)
        assert len(every["scores"]) == (2 if nms == HardNMS() else 3)


def test_an_ensemble_has_detections_of_all_heads():
    model = build_model(SMALL, 3).eval()
    images = ImageBatch.from_list([image(), image(50, 70)], original_sizes=[(128, 160), (500, 700)])
    with torch.no_grad():
        by_head = model.detect_with_all_heads(images)
        scores = {head: torch.cat([one["scores"] for one in found]) for head, found in by_head.items()}
        model.ensemble = Ensemble.learn(scores, {"decoder": 0.2, "roi": 0.4, "atss": 0.3}, num_objects=5)
        model.predict_with = "ensemble"
        found = model(images)
    for row, one in enumerate(found):
        own = {head: detections[row] for head, detections in by_head.items()}
        expected = model.ensemble.join(own, 0.6)
        assert all(torch.equal(one[name], expected[name]) for name in expected)
        for detections in own.values():
            assert (one["boxes"][:, None] == detections["boxes"]).all(-1).any()


def test_pixels_are_normalized_in_the_order_of_rgb_and_the_padding_is_zero():
    """(255 - 123.675) / 58.395, (0 - 116.28) / 57.12, (128 - 103.53) / 57.375: ImageNet's means and deviations."""
    one, two = torch.zeros(3, 2, 3, dtype=torch.uint8), torch.zeros(3, 4, 5, dtype=torch.uint8)
    one[0], one[2] = 255, 128
    images = ImageBatch.from_list([one, two])
    x = build_model(SMALL, 3).normalize(images.pixels, images.padding_mask())
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([2.248908, -2.035714, 0.426492]), rtol=0, atol=1e-5)
    torch.testing.assert_close(x[1, :, 3, 4], torch.tensor([-2.117904, -2.035714, -1.804444]), rtol=0, atol=1e-5)
    assert not x[0, :, 2:].any() and not x[0, :, :, 3:].any()


@pytest.mark.parametrize("head", ["roi", "atss"])
def test_boxes_of_the_dense_heads_are_scaled_to_the_stored_image(head, monkeypatch):
    """From 50 x 70 to 100 x 210: twice as high, three times as wide."""
    model = build_model(SMALL, 3).eval()
    model.predict_with = head
    found = {"boxes": torch.tensor([[10.0, 20, 30, 40]]), "scores": torch.ones(1), "labels": torch.zeros(1).long()}
    monkeypatch.setattr(getattr(model, head), "predict", lambda *_: [found])
    (one,) = model(ImageBatch.from_list([image(50, 70)], original_sizes=[(100, 210)]))
    assert one["boxes"].tolist() == [[30.0, 40, 90, 80]]


def test_boxes_of_the_decoder_are_clipped_and_scaled_to_the_stored_image():
    predictions = Predictions(torch.tensor([[[1.0, 3.0], [2.0, 0.0]]]), torch.tensor([[[0.5, 0.5, 0.2, 0.4]] * 2]))
    predictions.boxes[0, 1] = torch.tensor([0.9, 0.1, 0.4, 0.4])
    (one,) = detections_from(predictions, [(100, 200)], 3)
    torch.testing.assert_close(one["boxes"], torch.tensor([[80.0, 30, 120, 70], [140, 0, 200, 30], [80, 30, 120, 70]]))
    assert one["labels"].tolist() == [1, 0, 0]
    torch.testing.assert_close(one["scores"], torch.tensor([3.0, 2.0, 1.0]).sigmoid())


@pytest.mark.parametrize("loss", ["brs", "alrp"])
def test_each_head_has_the_weights_and_thresholds_of_its_own(loss):
    """The recipe of the BRS paper: 2 for the queries, 1 for the RPN, 5 for both other heads; aLRP's tau: 0.7 there."""
    model = build_model(with_loss(SMALL, loss), 3)
    heads = {"decoder": model, "rpn": model.rpn, "roi": model.roi, "atss": model.atss}
    assert {name: head.objective.weight for name, head in heads.items()} == {
        "decoder": 2.0,
        "rpn": 1.0,
        "roi": 5.0,
        "atss": 5.0,
    }
    assert {name: head.objective.tau for name, head in heads.items()} == {
        "decoder": 0.5,
        "rpn": 0.7,
        "roi": 0.5,
        "atss": 0.5,
    }


def test_regions_up_to_112_pixels_are_pooled_from_the_finest_map_of_stride_8():
    """As in the released models, of which each level serves twice the side of the one before."""
    assert build_model(SMALL, 3).roi.finest_scale == 112


def test_detections_do_not_depend_on_equally_sized_neighbors():
    model = build_model(SMALL, 3).eval()
    one, other = image(), image()
    with torch.no_grad():
        alone, together = model([one]), model([other, one])
    torch.testing.assert_close(together[1]["boxes"], alone[0]["boxes"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(together[1]["scores"], alone[0]["scores"], rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_trains_with_float32_losses():
    model = build_model(SMALL, 3).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([image(), image()], [target(3), target(0)])
    assert all(term.dtype == torch.float32 and term.isfinite() for term in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_training_without_targets_is_refused():
    with pytest.raises(ValueError, match="targets"):
        build_model(SMALL, 3).train()([image()])


@pytest.mark.parametrize("settings", [SMALL, FOCAL])
def test_targets_that_cannot_be_learned_are_refused(settings):
    model = build_model(settings, 3).train()
    for spoil in (
        {"labels": torch.tensor([0, 3])},
        {"boxes": torch.tensor([[9.0, 9.0, 30.0, 30.0], [40.0, 9.0, 20.0, 30.0]])},
    ):
        with pytest.raises(ValueError, match="of image 1: "):
            model([image()], [{**target(2), **spoil}])
