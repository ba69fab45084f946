"""RoI head, against arrays of the official implementations and against what must hold anyway."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support import region_losses
from torchvision.ops import MultiScaleRoIAlign

from brs_detr.assign.max_iou import RandomSampler
from brs_detr.models.config import BRSDETRConfig, CoDETRConfig, RPNConfig
from brs_detr.models.heads.roi import RoIHead, RoIOutput
from brs_detr.models.heads.rpn import RPNHead
from brs_detr.models.heads.step import RegionStep, read_counts
from brs_detr.models.transformer.collaborative import aux_samples
from brs_detr.ops.boxes import Regions

STRIDES = (8, 16, 32, 64)
SIZES = [(128, 153), (101, 160)]
NAMES = {"shared_fcs.0": "fc1", "shared_fcs.1": "fc2", "fc_cls": "score", "fc_reg": "delta"}
PREFIX = "roi_head.0.bbox_head."


def first_by_index(count, device):
    return torch.arange(count, device=device)


def build(family, dim=64, classes=5, **changes):
    config = (CoDETRConfig if family == "co_detr" else BRSDETRConfig).roi
    head = RoIHead(dim, classes, STRIDES, replace(config, fc_dim=64, **changes))
    if family == "co_detr":
        head.sampler = RandomSampler(512, 0.25, first_by_index)
    return head


def load(golden, family, scenario="normal"):
    """Official arrays, the head with the official weights, feature maps, proposals and targets."""
    data = load_file(golden / family / "train_normal.safetensors")
    data |= load_file(golden / family / f"train_{scenario}.safetensors")
    head = build(family)
    state = load_file(golden / family / "state_dict.safetensors")
    weights = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    head.load_state_dict({f"{NAMES[k.rsplit('.', 1)[0]]}.{k.rsplit('.', 1)[1]}": v for k, v in weights.items()})
    targets = [{"boxes": data[f"gt_bboxes.{b}"], "labels": data[f"gt_labels.{b}"]} for b in range(2)]
    proposals = [data[f"rpn.proposals.{b}"][:, :4] for b in range(2)]
    return data, head, [data[f"X.{level}"] for level in range(4)], proposals, targets


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
def test_official_samples_outputs_and_queries(golden, family):
    data, head, features, proposals, targets = load(golden, family)
    rois, _ = head.sample(proposals, SIZES, targets)
    torch.testing.assert_close(torch.cat(rois), data["roi.rois"][:, 1:])
    output = head(features, rois)
    torch.testing.assert_close(output.logits, data["roi.cls_score"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.deltas.flatten(1), data["roi.bbox_pred"], rtol=1e-5, atol=1e-5)
    pooled = head.pool_rois(features, rois).features()
    torch.testing.assert_close(pooled, data["roi.feats_pooled"], rtol=1e-5, atol=1e-5)
    assignment = region_losses(head, features, proposals, SIZES, targets)[1]
    samples = aux_samples(assignment, assignment.per_image(pooled))
    start = 0
    for image, roi in enumerate(rois):
        rows = slice(start, start + len(roi))
        start += len(roi)
        assert torch.equal(samples.boxes[image], data["roi.rois"][rows, 1:])
        assert torch.equal(samples.labels[image], data["roi.target.labels"][rows])
        positive = samples.labels[image] < 5
        assert torch.equal(samples.targets[image][positive], data["roi.target.bbox_targets"][rows][positive])
        assert not samples.targets[image][~positive].any()
        torch.testing.assert_close(samples.features[image], data["roi.feats_pooled"][rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scenario", ["normal", "empty1", "empty_both"])
@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
def test_official_losses_and_gradients(golden, family, scenario):
    if (family, scenario) == ("brs_detr", "empty_both"):
        pytest.skip("the official head returns a constant without gradient here")
    data, head, features, proposals, targets = load(golden, family, scenario)
    losses = region_losses(head, features, proposals, SIZES, targets)[0]
    pairs = {"cls": "loss_cls0", "giou": "loss_bbox0"}
    if family == "brs_detr":
        pairs = {"rank": "loss_roi_rank0", "sort": "loss_roi_sort0", "giou": "loss_roi_bbox0"}
    for ours, official in pairs.items():
        expected = data[f"loss.{official}"].reshape(())
        torch.testing.assert_close(losses[ours], expected, rtol=1e-5, atol=1e-6)
    if scenario == "normal":
        sum(losses.values()).backward()
        grads = load_file(golden / family / "train_normal_grads.safetensors")
        for name, ours in NAMES.items():
            expected = grads[f"{PREFIX}{name}.weight"]
            error = (getattr(head, ours).weight.grad - expected).norm() / expected.norm()
            assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
def test_official_detections(golden, family):
    data, head, features, _, _ = load(golden, family)
    rpn = RPNHead(64, (*STRIDES, 128), RPNConfig()).eval()
    names = {"rpn_conv": "conv", "rpn_cls": "score", "rpn_reg": "delta"}
    state = load_file(golden / family / "state_dict.safetensors")
    state = {k.split(".", 1)[1]: v for k, v in state.items() if k.startswith("rpn_head.")}
    rpn.load_state_dict({f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in state.items()})
    output = rpn([data[f"X.{level}"] for level in range(5)])
    found = head.predict(features, rpn.proposals(output, SIZES), SIZES)
    official = load_file(golden / family / "eval.safetensors")
    meta = json.loads((golden / family / "img_metas.json").read_text())
    for image, detections in enumerate(found):
        factor = torch.tensor(meta[image]["scale_factor"])
        for label in range(5):
            own = detections["labels"] == label
            ours = torch.cat([detections["boxes"][own] / factor, detections["scores"][own, None]], dim=1)
            expected = official[f"two-stage.batch.img{image}.cls{label}"].reshape(-1, 5)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def random_features(batch=2, dim=4):
    return [torch.randn(batch, dim, h, w) for h, w in [(16, 20), (8, 10), (4, 5), (2, 3)]]


def random_boxes(count):
    corner = torch.rand(count, 2) * 60
    return torch.cat([corner, corner + 5 + torch.rand(count, 2) * 80], dim=1)


def random_targets(*counts, classes=5):
    return [{"boxes": random_boxes(n), "labels": torch.randint(classes, (n,))} for n in counts]


def test_rows_keep_their_order_across_levels():
    """Each RoI alone gives the row it gives among others."""
    head, features = build("brs_detr", dim=4), random_features(1)
    boxes = torch.cat([torch.tensor([[0.0, 0, 500, 500], [3, 3, 9, 12], [0, 0, 300, 300]]), random_boxes(9)])
    together, pooled = head(features, [boxes]), head.pool_rois(features, [boxes]).features()
    for row in range(len(boxes)):
        one = [boxes[row : row + 1]]
        torch.testing.assert_close(head(features, one).logits[0], together.logits[row], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(head.pool_rois(features, one).features()[0], pooled[row], rtol=1e-5, atol=1e-6)


def test_level_by_size_as_in_the_feature_pyramid_paper():
    """torchvision's multi-scale pooling follows the same equation (with its own alignment, off by half a cell)."""
    head = build("brs_detr", dim=4)
    features = [torch.full((1, 4, h, w), float(i)) for i, (h, w) in enumerate([(64, 64), (32, 32), (16, 16), (8, 8)])]
    sides = torch.tensor([10.0, 111, 223, 225, 440, 460, 500])
    boxes = torch.stack([torch.zeros(7), torch.zeros(7), sides, sides], dim=1)
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=112, canonical_level=3)
    expected = theirs({str(i): x for i, x in enumerate(features)}, [boxes], [(512, 512)]).mean(dim=(2, 3))
    torch.testing.assert_close(head.pool_rois(features, [boxes]).features().round(), expected.round())


def test_pooling_by_hand():
    """Seven bins a side, ceil(9 / 7) = 2 samples a bin and axis; the center of cell 0 lies half a cell inside."""
    head, (level, *others) = build("brs_detr", dim=4), random_features(1)
    x1, y1, x2, y2 = 13.0, 22.0, 85.0, 94.0  # 72 pixels are 9 cells of stride 8
    steps = (torch.arange(14) + 0.5) / 14
    x, y = (x1 + steps * (x2 - x1)) / 8 - 0.5, (y1 + steps * (y2 - y1)) / 8 - 0.5
    grid = torch.stack(torch.meshgrid(2 * x / 19 - 1, 2 * y / 15 - 1, indexing="xy"), dim=-1)
    samples = torch.nn.functional.grid_sample(level, grid[None], align_corners=True)
    pooled = head.pool_rois([level, *others], [torch.tensor([[x1, y1, x2, y2]])])
    torch.testing.assert_close(pooled.windows, torch.nn.functional.avg_pool2d(samples, 2), rtol=1e-5, atol=1e-5)


def fixed_output(head, logits, deltas=None):
    """Let the head say the same of every image; deltas (n, C, 4)."""
    logits = torch.tensor(logits)
    deltas = torch.zeros(len(logits), head.num_classes, 4) if deltas is None else deltas
    head.pool_rois = lambda *_: None
    head.classify_pooled = lambda _: RoIOutput(logits, deltas)
    return head


def test_detections_by_hand():
    """A softmax over two classes and the background; a box of each class, clipped, suppressed class by class."""
    deltas = torch.zeros(2, 2, 4)
    deltas[0, 1, 0] = -5.0  # by half a width to the left
    head = build("co_detr", classes=2, score_threshold=0.2, nms_iou=0.5)
    chances = torch.tensor([[0.25, 0.7, 0.05], [0.6, 0.1, 0.3]])
    head = fixed_output(head, chances.log().tolist(), deltas)
    rois = [torch.tensor([[0.0, 10, 20, 30], [1.0, 10, 21, 30]])]
    (found,) = head.predict([], rois, [(25, 40)])
    assert found["labels"].tolist() == [1, 0]
    torch.testing.assert_close(found["scores"], torch.tensor([0.7, 0.6]))
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 10, 10, 25], [1, 10, 21, 25]]))


def test_equal_boxes_of_two_classes_are_both_found():
    head = fixed_output(build("brs_detr", classes=2), [[1.0, 2.0]])
    (found,) = head.predict([], [torch.tensor([[0.0, 10, 20, 30]])], [(50, 50)])
    assert found["labels"].tolist() == [1, 0]


def test_a_region_learns_the_box_of_its_class_from_an_iou_of_one_half():
    """Three regions: equal to the object of class 1, overlapping it by exactly one half, and by less."""
    deltas = torch.zeros(3, 2, 4, requires_grad=True)
    head = build("brs_detr", classes=2)
    head = fixed_output(head, [[0.0, 1.0], [0.5, -1.0], [0.0, 0.0]], deltas)
    rois = [torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 10], [0, 0, 20, 9]])]
    target = [{"boxes": torch.tensor([[0.0, 0, 20, 20]]), "labels": torch.tensor([1])}]
    losses, assignment = region_losses(head, [], rois, [(40, 40)], target)
    assert assignment.labels.tolist() == [1, 1, 2]
    losses["giou"].backward()
    assert deltas.grad[1, 1].any() and not deltas.grad[:, 0].any() and not deltas.grad[2].any()


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
@pytest.mark.parametrize(("counts", "proposals"), [((0, 0), 20), ((3, 0), 20), ((2,), 1), ((4, 4), 0), ((0,), 0)])
@pytest.mark.parametrize("classes", [1, 5])
def test_every_parameter_is_in_the_graph(family, counts, proposals, classes):
    head = build(family, dim=4, classes=classes)
    rois = [random_boxes(proposals) for _ in counts]
    losses, assignment = region_losses(
        head, random_features(len(counts)), rois, SIZES[: len(counts)], random_targets(*counts, classes=classes)
    )
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())
    assert all(len(boxes) >= 1 for boxes in assignment.references)


def published_tower_head(windows, head):
    """Co-DETR's "4conv1fc" on one pooled window (dim, 7, 7): convolution, GroupNorm, ReLU; one hidden layer."""
    x = windows
    for conv, norm, _ in head.tower:
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        x = torch.stack([(padded[:, i : i + 7, j : j + 7, None] * conv.weight[:, :, i, j].T[:, None, None]).sum(0)
                         for i in range(3) for j in range(3)]).sum(0).permute(2, 0, 1)  # fmt: skip
        groups = x.unflatten(0, (norm.num_groups, -1))
        mean, variance = groups.mean((1, 2, 3), True), groups.var((1, 2, 3), unbiased=False, keepdim=True)
        x = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(0, 1)
        x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    hidden = head.fc1(x.flatten()).clamp(min=0)
    return head.score(hidden), head.delta(hidden).unflatten(0, (-1, 4))


def test_convolutions_take_the_place_of_a_fully_connected_layer():
    head = build("co_detr", dim=64, stacked_convs=4, class_agnostic=True).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    windows = torch.randn(3, 64, 7, 7, dtype=torch.float64)
    logits, deltas = head.classify(windows)
    for row, window in enumerate(windows):
        expected = published_tower_head(window, head)
        torch.testing.assert_close(logits[row], expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(deltas[row], expected[1], rtol=1e-9, atol=1e-9)
    assert deltas.shape == (3, 1, 4) and head.tower[0][1].num_groups == 32
    assert {name.split(".")[0] for name in head.state_dict()} == {"tower", "fc1", "score", "delta"}


@pytest.mark.parametrize("family", ["brs_detr", "co_detr"])
@pytest.mark.parametrize("counts", [(2, 0), (0, 0)])
def test_convolutions_get_finite_gradients_whatever_the_batch_holds(family, counts):
    head = build(family, dim=4, stacked_convs=2, class_agnostic=True)
    losses, _ = region_losses(
        head, random_features(), [random_boxes(20), random_boxes(3)], SIZES, random_targets(*counts)
    )
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())


def test_a_head_without_convolutions_has_the_parameters_it_always_had():
    names = list(build("brs_detr", dim=4).state_dict())
    assert names == [f"{part}.{kind}" for part in ("fc1", "fc2", "score", "delta") for kind in ("weight", "bias")]


def test_objects_join_the_proposals_only_when_asked():
    far, target = [torch.tensor([[100.0, 100, 120, 120]])], [{"boxes": torch.tensor([[0.0, 0, 30, 30]])}]
    target[0]["labels"] = torch.tensor([2])
    features = random_features(1)
    _, without = region_losses(build("brs_detr", dim=4), features, far, SIZES[:1], target)
    assert without.labels.tolist() == [5]
    _, joined = region_losses(build("brs_detr", dim=4, add_ground_truth=True), features, far, SIZES[:1], target)
    assert joined.labels.tolist() == [2, 5]
    assert joined.references[0][0].equal(target[0]["boxes"][0]) and joined.targets.equal(target[0]["boxes"])


def test_cap_on_rois_keeps_the_best():
    boxes = [random_boxes(12), random_boxes(3)]
    head = build("brs_detr", dim=4, max_rois=5)
    _, assignment = region_losses(head, random_features(), boxes, SIZES, random_targets(0, 0))
    assert [len(b) for b in assignment.references] == [5, 3]
    assert assignment.references[0].equal(boxes[0][:5])


def test_query_features_carry_gradient_and_boxes_do_not():
    features = [x.requires_grad_() for x in random_features(1)]
    regions = Regions(random_boxes(6)[None], torch.ones(1, 6, dtype=torch.bool))
    step = RegionStep(build("brs_detr", dim=4), features, regions, SIZES[:1], random_targets(2))
    read_counts([step])
    assert not step.assignment.references[0].requires_grad
    step.features(features)[0].sum().backward()
    assert any(x.grad is not None and x.grad.any() for x in features)


def test_bfloat16_autocast_gives_float32_losses():
    head = build("brs_detr", dim=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = [torch.nn.functional.conv2d(x, torch.eye(4)[..., None, None]) for x in random_features()]
        losses, _ = region_losses(head, features, [random_boxes(8), random_boxes(8)], SIZES, random_targets(3, 2))
    assert features[0].dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())
