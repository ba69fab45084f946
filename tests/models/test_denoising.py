"""Denoising queries: where the noised objects are, what is drawn, who sees whom, and what is learned from them."""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from support import SMALL_BACKBONE
from torchvision.ops import box_convert, box_iou

from brs_detr.config import Config, apply_overrides
from brs_detr.data.coco import CocoDetection
from brs_detr.data.transforms import resize_sample
from brs_detr.models.build import build_model
from brs_detr.models.config import BRSDINOConfig, CoDINOConfig, DenoisingConfig, RoIConfig, RPNConfig
from brs_detr.models.denoising import Denoising, DenoisingLayout, Noise, draw_noise, noised_boxes, noised_labels
from brs_detr.ops.targets import PackedTargets
from brs_detr.run.setup import describe_detector

CLASSES, DIM, QUERIES = 6, 16, 10
SIZES = [(60, 80), (64, 64), (50, 90)]
SIZE = dict(
    backbone=SMALL_BACKBONE,
    levels=4,
    dim=64,
    heads=4,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=32,
    queries=12,
    max_aux_queries=12,
    denoising=DenoisingConfig(queries=8),
)
BRS_DINO = BRSDINOConfig(**SIZE, rpn=RPNConfig(proposals_before_nms=50, proposals=40), roi=RoIConfig(fc_dim=32))
CO_DINO = CoDINOConfig(
    **SIZE,
    rpn=replace(CoDINOConfig.rpn, proposals_before_nms=50, proposals=40, sample=32),
    roi=replace(CoDINOConfig.roi, fc_dim=32, sample=32),
)
RANKED = replace(BRS_DINO, denoising=replace(BRS_DINO.denoising, loss="rank"))
WITHOUT = replace(BRS_DINO, denoising=replace(BRS_DINO.denoising, loss="none"))
SETTINGS = {"co_dino": CO_DINO, "brs_dino": BRS_DINO, "rank": RANKED, "none": WITHOUT}


def targets_of(counts, seed=0):
    generator, targets = torch.Generator().manual_seed(seed), []
    for count, (h, w) in zip(counts, SIZES):
        start = torch.rand(count, 2, generator=generator) * torch.tensor([w, h]) * 0.5
        sides = torch.rand(count, 2, generator=generator) * torch.tensor([w, h]) * 0.3 + 4
        labels = torch.randint(CLASSES, (count,), generator=generator)
        targets.append({"boxes": torch.cat([start, start + sides], dim=1), "labels": labels})
    return targets


def packed(counts, seed=0):
    return PackedTargets.pack(targets_of(counts, seed), SIZES[: len(counts)])


def denoising(**settings):
    return Denoising(DIM, CLASSES, DenoisingConfig(**settings))


@pytest.mark.parametrize("counts", [(3, 1), (2, 2, 2), (0, 4), (5,), (0, 0), (300, 2)])
@pytest.mark.parametrize("queries", [1, 7, 100])
def test_layout_is_that_of_loops(counts, queries):
    layout = DenoisingLayout.of(counts, queries)
    most = max(counts)
    groups = max(queries // most, 1) if most else 1
    assert (layout.num_groups, layout.max_objects) == (groups, most)
    height = 2 * groups * most
    rows = [
        image * height + block * most + j
        for block in range(2 * groups)
        for image, count in enumerate(counts)
        for j in range(count)
    ]
    assert layout.rows.tolist() == rows
    present = [[row % max(most, 1) < count for row in range(height)] for count in counts]
    assert layout.present.tolist() == present
    objects = list(range(sum(counts)))
    positive = sorted(
        (row, obj) for row, obj, block in zip(rows, objects * 2 * groups, _blocks(counts, groups)) if block % 2 == 0
    )
    found = layout.positives()
    assert list(zip(found[0].tolist(), found[1].tolist())) == positive


def _blocks(counts, groups):
    return [block for block in range(2 * groups) for _ in range(sum(counts))]


@pytest.mark.parametrize("ignore_missing", [True, False])
def test_rows_see_their_group_and_the_main_queries(ignore_missing):
    counts = (3, 1)
    layout = DenoisingLayout.of(counts, queries=7)  # two groups of three objects
    visible = layout.visible(QUERIES, torch.device("cpu"), ignore_missing=ignore_missing)
    rows = 2 * 2 * 3
    for image, count in enumerate(counts):
        own = visible[image if ignore_missing else 0]
        for row in range(rows):
            for other in range(rows + QUERIES):
                in_group = other < rows and row // 6 == other // 6
                there = other >= rows or other % 3 < count or not ignore_missing
                assert own[row, other] == ((in_group or other >= rows) and there)


def test_without_noise_the_queries_are_the_objects():
    targets = packed((3, 1))
    found = denoising(queries=7, box_noise=0, label_noise=0)(targets, QUERIES)
    boxes = found.boxes.flatten(0, 1)[found.rows]
    torch.testing.assert_close(boxes, found.targets, rtol=0, atol=1e-3)  # the inverse sigmoid's epsilon
    assert torch.equal(found.labels, found.given)
    images = found.rows // found.boxes.shape[1]
    for image, (start, end) in enumerate(targets.spans):
        own = found.targets[images == image]
        assert torch.equal(own, targets.boxes[start:end].repeat(len(own) // (end - start), 1))
    assert len(found.rows) == 2 * 4


def test_an_image_without_an_object_has_content_zero_and_the_center_half():
    module = denoising(queries=8)
    found = module(packed((2, 0)), QUERIES)
    assert (found.content[1] == 0).all() and (found.boxes[1] == 0.5).all()
    assert (found.content[0] != 0).any(dim=-1).all()
    assert found.valid.view(2, -1).all(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("box_noise", [0.4, 1.0])
def test_positives_move_less_than_negatives(box_noise):
    count = 4000
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.1]]).repeat(count, 1)
    negative = torch.arange(count) % 2
    moved = noised_boxes(boxes, negative, draw_noise(count, CLASSES), box_noise)
    corners = box_convert(moved, "cxcywh", "xyxy") - box_convert(boxes, "cxcywh", "xyxy")
    shares = corners.abs() / (boxes[:, 2:].repeat(1, 2) / 2)
    positive, other = shares[negative == 0], shares[negative == 1]
    assert positive.max() <= box_noise + 1e-4 and positive.mean() == pytest.approx(box_noise / 2, rel=0.05)
    assert other.min() >= box_noise - 1e-4 and other.max() <= 2 * box_noise + 1e-4
    kept = box_convert(moved, "cxcywh", "xyxy")
    iou = box_iou(kept[negative == 0], box_convert(boxes[:1], "cxcywh", "xyxy"))
    # mean IoU and the share of negatives inside out, as counted in the released code
    assert float(iou.mean()) == pytest.approx({0.4: 0.68, 1.0: 0.39}[box_noise], abs=0.03)
    inside_out = (moved[negative == 1][:, 2:] <= 0).any(dim=1).float().mean()
    assert float(inside_out) == pytest.approx({0.4: 0.0, 1.0: 0.438}[box_noise], abs=0.04)


def test_noised_boxes_stay_inside_the_image_and_their_logits_in_bounds():
    """DINO's inverse sigmoid moves numbers within 0.001 of 0 and 1."""
    boxes = torch.tensor([[0.05, 0.05, 0.1, 0.1], [0.9, 0.95, 0.2, 0.1]]).repeat(500, 1)
    corners = box_convert(noised_boxes(boxes, torch.ones(1000), draw_noise(1000, CLASSES), 1.0), "cxcywh", "xyxy")
    assert abs(corners.min()) < 1e-6 and abs(corners.max() - 1) < 1e-6
    h, w = SIZES[0]
    whole = {"boxes": torch.tensor([[0.0, 0, w, h]]), "labels": torch.zeros(1).long()}
    found = denoising(queries=4, box_noise=0)(PackedTargets.pack([whole], SIZES[:1]), QUERIES)
    torch.testing.assert_close(found.boxes[..., 2:], torch.full((1, 8, 2), 0.999), rtol=0, atol=1e-6)


def test_half_of_the_label_noise_is_replaced():
    labels = torch.zeros(8000, dtype=torch.int64)
    noise = draw_noise(8000, CLASSES)
    noised = noised_labels(labels, noise, 0.5)
    # a quarter is drawn again, from all classes
    assert float((noised != 0).float().mean()) == pytest.approx(0.25 * (CLASSES - 1) / CLASSES, abs=0.02)
    assert torch.equal(noised_labels(labels, noise, 0.0), labels)


def test_the_generator_decides_everything():
    first, second = denoising(queries=9), denoising(queries=9)
    second.load_state_dict(first.state_dict())
    found = []
    for module in (first, second):
        module.generator = torch.Generator().manual_seed(5)
        found.append([module(packed((4, 2)), QUERIES) for _ in range(2)])
    for one, other in zip(*found):
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    assert not torch.equal(found[0][0].boxes, found[0][1].boxes)


def recorded(noise):
    return lambda count, classes, generator: Noise(*(part[:count] for part in noise))


def permuted_noise(noise, order, total):
    """The noise of each block in another order of its objects."""
    blocks = len(noise.flip) // total
    index = torch.cat([order + block * total for block in range(blocks)])
    return Noise(*(part[index] for part in noise))


@pytest.mark.parametrize("name", ["co_dino", "brs_dino", "rank"])
def test_the_order_of_objects_does_not_matter(name):
    """With their noise they take their rows along, and no term changes."""
    model, images = model_and_images(SETTINGS[name], 2)
    seen = []
    model.denoising.register_forward_hook(lambda _, __, output: seen.append(output))
    targets = targets_of((4, 2), seed=3)
    total, order = 6, torch.tensor([2, 0, 3, 1, 5, 4])
    noise = draw_noise(2 * 2 * total, CLASSES)
    model.denoising.draw = recorded(noise)
    before = {key: value for key, value in model(images, targets).items() if key.startswith("denoising")}
    shuffled = [{key: value[order[:4]] for key, value in targets[0].items()}]
    shuffled += [{key: value[order[4:] - 4] for key, value in targets[1].items()}]
    model.denoising.draw = recorded(permuted_noise(noise, order, total))
    after = model(images, shuffled)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-5)
    for image, own in enumerate((order[:4], order[4:] - 4)):  # a block has four rows of every image
        rows = torch.arange(4)
        rows[: len(own)] = own
        rows = torch.cat([rows + start for start in range(0, seen[0].boxes.shape[1], 4)])
        for part in ("content", "boxes"):
            assert torch.equal(getattr(seen[1], part)[image], getattr(seen[0], part)[image][rows])


def model_and_images(settings, count, seed=0):
    torch.manual_seed(seed)
    model = build_model(settings, CLASSES).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # so that two passes see the same statistics
    return model, [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in SIZES[:count]]


def test_the_main_queries_do_not_change():
    """Neither their predictions nor their loss terms."""
    model, images = model_and_images(CO_DINO, 2)
    targets, kept = targets_of((3, 1)), []
    decode = model.decode_together

    def keep(*args):
        kept.append(decode(*args))
        return kept[-1]

    model.decode_together = keep
    for module in (model.denoising, None):
        model.denoising = module
        torch.manual_seed(1)  # of the samplers
        model(images, targets)
    assert "denoising" in kept[0] and "denoising" not in kept[1]
    for name in ("logits", "boxes"):
        one, other = (getattr(found["decoder"], name) for found in kept)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def kept(calls, function, *args):
    """Call a function and keep its arguments."""
    calls.append(args)
    return function(*args)


def test_what_the_parts_of_the_detectors_are():
    """Wavelengths of the encoder from 20 on; chosen by all classes, which are learned; settings of each kind of set."""
    for name in ("co_dino", "rank"):
        model, images = model_and_images(SETTINGS[name], 2)
        assert (model.encoder.temperature, model.encoder.offset, model.decoder.eps) == (20, 0, 1e-3)
        sets, matched = [], []
        model.matcher.begin = partial(kept, sets, model.matcher.begin)
        model.denoising_objective.register_forward_pre_hook(lambda _, inputs, into=matched: into.append(inputs[0]))
        model.denoising.draw = lambda *args: draw_noise(*args)._replace(flip=torch.zeros(args[0]))
        model(images, targets_of((3, 2)))
        [((encoder, decoder), packed)] = sets
        assert torch.equal(encoder.labels, packed.labels) and torch.equal(decoder.labels, packed.labels)
        assert encoder.logits.shape == (2, 12, CLASSES)
        [noised] = matched
        present = torch.tensor([[[True] * 3] * 2, [[True, True, False]] * 2])
        for valid in noised.valid:
            assert torch.equal(valid.view(2, -1, 2, 3), present[:, None].expand(2, len(valid) // 12, 2, 3))
        if name == "rank":
            assert noised.ignored.any() and not noised.ignored.flatten(0, 1)[~noised.valid.flatten()].any()
        else:
            assert noised.ignored is None
        # the mean over the positives of the batch
        terms = model.denoising_objective(noised)
        torch.testing.assert_close(terms["l1"], 5 * noised.box_losses["l1"].mean(1))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0), (4,)])
def test_every_parameter_gets_a_finite_gradient_whatever_the_batch_holds(name, counts):
    model, images = model_and_images(SETTINGS[name], len(counts))
    losses = model(images, targets_of(counts))
    assert all(term.ndim == 0 and term.isfinite() for term in losses.values()), losses
    assert any(key.startswith("denoising") for key in losses) == (name != "none")
    assert ("denoising.label_embedding.weight" in model.state_dict()) == (name != "none")
    sum(losses.values()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def test_a_crowded_image_beside_an_empty_one_is_bounded(caplog):
    settings = replace(RANKED, denoising=replace(RANKED.denoising, max_rows=40))
    model, images = model_and_images(settings, 2)
    seen = []
    model.denoising.register_forward_hook(lambda _, __, output: seen.append(output))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            losses = model(images, targets_of((400, 0)))
    assert all(term.isfinite() for term in losses.values())
    assert [found.content.shape[1] for found in seen] == [40, 40]
    assert all(len(found.rows) == 20 for found in seen)
    assert not torch.equal(seen[0].targets, seen[1].targets)  # others in every step
    [message] = [record.getMessage() for record in caplog.records]
    assert "400 objects" in message and "max_rows=40" in message


def test_the_most_crowded_real_image_trains_beside_an_empty_one(shared_data):
    """Nuclei's image of most objects, three steps, with ranked denoising within its bound."""
    folder = shared_data / "nuclei"
    dataset = CocoDetection(folder / "annotations" / "train.json", folder / "images", train=True)
    counts = np.diff(dataset.packed.offsets)
    image, target = dataset[int(counts.argmax())]
    image, target = resize_sample(image, target, (128, 160))
    settings = replace(RANKED, denoising=replace(RANKED.denoising, max_rows=200))
    model, _ = model_and_images(settings, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert len(target["boxes"]) == counts.max() > 300  # more than the bound's half
    for _ in range(3):
        losses = model([image, image], [target, nothing])
        assert all(term.isfinite() for term in losses.values()), losses
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_bounded_objects_keep_their_image_and_class():
    module = denoising(max_rows=8)
    targets = packed((9, 3, 6))
    found = module.bounded(targets)
    assert [end - start for start, end in found.spans] == [4, 3, 4]
    everything = {tuple(box.tolist()): (int(label), int(image)) for box, label, image in rows_of(targets)}
    for box, label, image in rows_of(found):
        assert everything[tuple(box.tolist())] == (int(label), int(image))
    for image, (start, end) in enumerate(found.spans):
        assert (found.images[start:end] == image).all()


def rows_of(targets):
    return zip(targets.boxes, targets.labels, targets.images, strict=True)


def test_what_a_ranking_leaves_out():
    """The class that a positive was given, where it is not its own; negatives have none of their own."""
    module = denoising(queries=6, label_noise=1.0)
    found = module(packed((3, 2)), QUERIES)
    ignored = module.ignored(found, CLASSES)
    expected = torch.zeros_like(ignored)
    for row, label, given in zip(found.rows, found.labels, found.given, strict=True):
        if given != label:
            expected[row, given] = True
    assert torch.equal(ignored, expected) and expected.any()
    assert not ignored[found.rows, found.labels].any()
    module.ignore_given = False
    assert module.ignored(found, CLASSES) is None


def test_missing_rows_change_no_denoising_term():
    """Whatever an image has beside it, its rows learn the same, as long as the groups are as many."""
    model, images = model_and_images(RANKED, 2)
    targets = targets_of((4, 1), seed=2)
    noise = draw_noise(2 * 2 * 5, CLASSES)
    model.denoising.draw = recorded(noise)
    seen = []
    decode = model.decode_together
    model.decode_together = lambda *args: seen.append(decode(*args)) or seen[-1]
    model.train()
    before = model(images, targets)
    embed = model.denoising.forward

    def disturbed(*args):
        found = embed(*args)
        missing = ~found.valid.view(2, -1, 1)
        content = torch.where(missing, torch.randn_like(found.content), found.content)
        return found._replace(content=content, boxes=torch.where(missing, 0.3, found.boxes))

    model.denoising.forward = disturbed
    after = model(images, targets)
    for key in (key for key in before if key.startswith("denoising")):
        torch.testing.assert_close(after[key], before[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["brs", "rs", "bap", "ap", "balrp", "alrp", "bndcg", "ndcg"])
def test_every_ranking_loss_ranks_the_rows_with_fixed_box_weights(loss):
    settings = apply_overrides(Config(model=RANKED), [f"model.loss={loss}", "model.objective.delta=0.7"]).model
    model, images = model_and_images(settings, 2)
    objective, sets = model.denoising_objective, []
    assert (objective.loss, objective.delta) == (loss, 0.7)
    objective.register_forward_hook(lambda _, inputs, terms: sets.append((inputs[0], terms)))
    losses = model(images, targets_of((3, 2)))
    [(found, _)] = sets
    for layer in range(2):
        for name, weight in (("l1", 5), ("giou", 2)):
            expected = weight * found.box_losses[name][layer].mean()
            torch.testing.assert_close(losses[f"denoising.{layer}.{name}"], expected)
        assert f"denoising.{layer}.rank" in losses


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match=r"denoising\.loss=rank takes the ranking loss"):
        apply_overrides(Config(), ["model.name=co_dino", "model.denoising.loss=rank"])
    with pytest.raises(ValueError, match=r"denoising\.max_rows=600 is less than the two rows for each .*queries=301"):
        apply_overrides(Config(), ["model.name=co_dino", "model.denoising.queries=301"])
    with pytest.raises(ValueError, match=r"is not a setting of model\.name=brs_detr"):
        apply_overrides(Config(), ["model.name=brs_detr", "model.denoising.loss=rank"])


def test_queries_are_made_in_training_only():
    model, images = model_and_images(CO_DINO, 1)
    model.denoising.forward = partial(pytest.fail, "denoising queries at test time")
    with torch.no_grad():
        assert len(model.eval()(images)) == 1


@pytest.mark.parametrize("loss", ["rank", "none"])
def test_a_training_says_what_its_denoising_queries_learn_from(loss):
    text = describe_detector(replace(BRS_DINO, denoising=replace(BRS_DINO.denoising, loss=loss)))
    assert text.startswith(f"brs_dino with loss brs, denoising queries by {loss}, ")
