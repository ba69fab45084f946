"""Official Co-DINO weights: every intermediate array, loss term, gradient and detection, with the recorded draws.

Where the official code is at fault ours differs on purpose; `co_dino_as_released` is the one place that switches those
differences back.
"""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
import official
from support import valid_rows

from brs_detr.checkpoints.keys import to_ours
from brs_detr.models.config import HardNMS, NoNMS, SoftNMS
from brs_detr.models.denoising import DenoisingLayout
from brs_detr.models.transformer.attention import sine_of_cells
from brs_detr.models.transformer.encoder import level_masks
from brs_detr.models.transformer.two_stage import token_anchors
from brs_detr.ops.anchors import valid_extents
from brs_detr.ops.images import ImageBatch

FAMILY = "co_dino"
QUERIES = official.CO_DINO.queries
NMS = {
    "detr": (None, NoNMS()),
    "detr_softnms": (None, SoftNMS(iou=0.8)),
    "detr_softnms20": (None, SoftNMS(iou=0.2)),
    "detr_nms20": (None, HardNMS(iou=0.2)),
}
HEADS = {"one-stage": "atss", "two-stage": "roi"}


@pytest.fixture
def model(golden, monkeypatch):
    return official.load_official(golden, FAMILY, monkeypatch).eval()


def pixels_of(golden):
    return load_file(golden / FAMILY / "inputs.safetensors")["img"]


class Step:
    """One recorded batch: what our training step computed on the way, and its losses."""

    def __init__(self, golden, case, monkeypatch):
        self.model = official.load_official(golden, FAMILY, monkeypatch).train()
        official.in_index_order(self.model, monkeypatch)
        self.arrays, self.sizes, targets = official.recorded_case(golden, FAMILY, case)
        official.co_dino_as_released(self.model, self.arrays)
        self.seen, decoder = {}, self.model.decoder
        modules = {name: getattr(self.model, name) for name in ("denoising", "decoder")}
        modules |= {f"{name}.objective": getattr(self.model, name).objective for name in ("rpn", "roi", "atss")}
        modules |= {"sine": decoder.position.first, "position": decoder.position, "states": decoder.norm}
        modules |= {f"layer.{number}": layer for number, layer in enumerate(decoder.layers)}
        for name, module in modules.items():
            module.register_forward_hook(partial(self.keep, name))
        begin = self.model.matcher.begin

        def matcher(*args):
            self.seen["matching"] = begin(*args)
            return self.seen["matching"]

        self.model.matcher.begin = matcher
        pixels = pixels_of(golden)
        memory = self.model.encode(pixels, official.padding(self.sizes, pixels.shape[-2:]))
        self.losses = self.model.losses(memory, self.sizes, targets)

    def keep(self, name, _, inputs, output):
        self.seen.setdefault(name, []).append((inputs, output))

    def in_recorded_order(self, queries):
        """Columns (B, Q, ...) of our pass by the recorded pass: denoising and main queries, each head's queries."""
        (*_, sets), _ = self.seen["decoder"][0]
        main, noised, *aux = queries.split([one.queries for one in sets], dim=1)
        return {"": torch.cat([noised, main], dim=1), **{f"aux{k}.": own for k, own in enumerate(aux)}}


@pytest.fixture(params=official.CASES)
def case(request):
    return request.param


@pytest.fixture
def step(golden, case, monkeypatch):
    return Step(golden, case, monkeypatch)


def test_every_loss_term_equals_the_official_one(golden, step, case):
    summary = json.loads((golden / FAMILY / "summary.json").read_text())[case]["losses"]
    expected = official.named_terms({k: torch.tensor(v) for k, v in summary.items() if k != "loss"})
    expected["rpn.l1"] = expected.pop("rpn.bbox")
    assert expected.keys() == step.losses.keys()
    for term, value in expected.items():
        error = (step.losses[term].detach() - value).abs()
        assert error <= 1e-4 * value.abs() + 1e-6, f"{term}: {float(step.losses[term])} instead of {float(value)}"


def test_every_gradient_equals_the_official_one(golden, step, case):
    sum(step.losses.values()).backward()
    trained = {name: parameter for name, parameter in step.model.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    recorded = json.loads((golden / FAMILY / f"train_{case}_gradnorms.json").read_text())
    norms, unknown = to_ours({name: torch.tensor(value) for name, value in recorded.items()})
    assert not unknown and norms.keys() == trained.keys()
    largest = max(norms.values())
    for name, parameter in trained.items():
        error = (parameter.grad.norm() - norms[name]).abs()
        assert error <= 1e-4 * norms[name] + 1e-7 * largest, f"{name}: relative error {error / norms[name]:.1e}"
    if case == "normal":
        grads, _ = to_ours(load_file(golden / FAMILY / "train_normal_grads.safetensors"))
        assert grads.keys() == trained.keys()
        for name, parameter in trained.items():
            error = (parameter.grad - grads[name]).norm() / grads[name].norm().clamp(min=1e-6)
            assert error < 1e-4, f"{name}: relative error {error:.1e}"


def test_denoising_rows(step):
    arrays, ((packed, queries), rows) = step.arrays, step.seen["denoising"][0]
    layout = DenoisingLayout.of([end - start for start, end in packed.spans], step.model.denoising.config.queries)
    size = int(arrays["dn.pad_size"])
    assert (layout.num_groups, layout.present.shape[1]) == (int(arrays["dn.num_groups"]), size)
    if not size:
        assert rows.content.shape[1] == 0
        return
    official.assert_equal_to(rows.content, arrays["dn.query_label"])
    official.assert_equal_to(rows.boxes, arrays["dn.query_bbox_logit"].sigmoid())
    hidden = torch.zeros(size + queries, size + queries, dtype=torch.bool)
    hidden[:size] = ~rows.visible[0]
    hidden[size:, :size] = True  # the main queries are a set of their own
    assert torch.equal(hidden, arrays["dn.attn_mask"].bool())
    for b, (start, end) in enumerate(packed.spans):
        if start == end:
            continue
        own = rows.rows // size == b
        labels = torch.full((size,), official.CLASSES).index_copy(0, rows.rows[own] % size, rows.labels[own])
        assert torch.equal(labels, arrays[f"dn.target.img{b}.labels"])
        assert torch.equal(rows.rows[own] % size, arrays[f"dn.target.img{b}.pos_inds"])
        expected = arrays[f"dn.target.img{b}.bbox_targets"][rows.rows[own] % size]
        official.assert_equal_to(rows.targets[own], expected)


def assert_matched(matching, arrays, case=None):
    """The queries of each object's match are the recorded ones."""
    encoder, decoder = matching.solve()
    counts = [end - start for start, end in matching.targets.spans]
    rows = {"enc": encoder.rows, "dec0": decoder.rows[0], "dec1": decoder.rows[1]}
    for name, own in rows.items():
        for b, count in enumerate(counts):
            inside = own[own // QUERIES == b] % QUERIES
            assert len(inside) == count
            if count:
                key = f"match.{name}.img{b}.pos_query"
                assert torch.equal(inside, arrays[f"{case}.{key}" if case else key])


def test_matched_queries_and_tokens(step):
    assert_matched(step.seen["matching"], step.arrays)


def test_decoder_with_all_sets(step):
    """Denoising rows, main and auxiliary queries in one pass, against the recorded passes."""
    (contents, position, boxes, _, sets), found = step.seen["decoder"][0]
    arrays, counts = step.arrays, [one.queries for one in sets]
    assert position is None
    main, noised, *aux = zip(contents.split(counts, 1), boxes.split(counts, 1), found.split(counts), strict=True)
    first = counts[1]
    for part, key in ((1, "dec.reference_in"), (0, "dec.query")):
        official.assert_equal_to(torch.cat([noised[part], main[part]], 1), arrays[key])
    for key, name in (("all_cls_scores", "logits"), ("all_bbox_preds", "boxes")):
        both = torch.cat([getattr(noised[2], name), getattr(main[2], name)], dim=2)
        assert both.shape[2] == first + QUERIES
        official.assert_equal_to(both, arrays[key])
    for k, own in enumerate(aux):
        official.assert_equal_to(own[0], arrays[f"aux{k}.dec.query"])
        official.assert_equal_to(own[1], arrays[f"aux{k}.dec.reference_in"])
        official.assert_equal_to(own[2].logits, arrays[f"aux{k}.cls_scores"])
        official.assert_equal_to(own[2].boxes, arrays[f"aux{k}.bbox_preds"])


def test_inside_of_the_decoder(step):
    """Encoded boxes, positions, references and normalized states of each layer, which decoder and samples share."""
    (_, _, _, memory, _), _ = step.seen["decoder"][0]
    ratios = torch.cat([memory.valid_ratios, memory.valid_ratios], -1)[:, :1]  # of the finest level, to the padded one
    encoded = step.in_recorded_order(step.seen["sine"][0][0][0])
    for number in range(len(step.model.decoder.layers)):
        references = step.in_recorded_order(step.seen[f"layer.{number}"][0][0][2][:, :, 0] / ratios)
        positions = step.in_recorded_order(step.seen["position"][number][1])
        states = step.in_recorded_order(step.seen["states"][number][1])
        for key, own in positions.items():
            official.assert_equal_to(own, step.arrays[f"{key}dec.query_pos.{number}"])
            official.assert_equal_to(states[key], step.arrays[f"{key}dec.inter_states"][number])
            official.assert_equal_to(references[key], step.arrays[f"{key}dec.inter_references"][number])
            if number == 0:
                official.assert_equal_to(encoded[key], step.arrays[f"{key}dec.sine_embed.0"])


def test_what_the_dense_heads_learn(step):
    """Labels and targets of the RPN's and ATSS's anchors inside their images, and of the sampled regions."""
    arrays, per_cell = step.arrays, {"rpn": step.model.rpn.anchors.per_cell, "atss": 1}
    shapes = [tuple(arrays[f"rpn.cls.{level}"].shape[-2:]) for level in range(6)]
    extents = [valid_extents(size, shapes, step.model.rpn.strides) for size in step.sizes]
    ((predictions,), _), expected, used = step.seen["rpn.objective"][0], [], []
    for b, extent in enumerate(extents):
        for kind, rows in (("labels", expected), ("label_weights", used)):
            levels = [arrays[f"rpn.target.{kind}.{level}"][b] for level in range(6)]
            grids = [level.reshape(*shape, per_cell["rpn"], 1) for level, shape in zip(levels, shapes)]
            rows.append(valid_rows(grids, extent)[:, 0])
    expected, used = torch.cat(expected).long(), torch.cat(used) > 0
    assert torch.equal(predictions.valid, used) and torch.equal(predictions.labels[used], expected[used])

    ((predictions,), _), expected = step.seen["atss.objective"][0], []
    for b, extent in enumerate(extents):
        counts = [h * w for h, w in shapes]
        levels = arrays[f"atss.target.ori_labels.{b}"].split(counts)
        expected.append(valid_rows([own.reshape(*shape, 1, 1) for own, shape in zip(levels, shapes)], extent)[:, 0])
    assert torch.equal(predictions.labels, torch.cat(expected).long())

    ((predictions,), _) = step.seen["roi.objective"][0]
    assert torch.equal(predictions.labels, arrays["roi.target.labels"].long())
    # equally scored background regions may be in another order
    distances = torch.cdist(predictions.logits.detach(), arrays["roi.cls_score"], p=torch.inf)
    assert max(distances.min(0).values.max(), distances.min(1).values.max()) <= 1e-5 * arrays["roi.cls_score"].max()


def images_of(golden, name):
    """`batch`: both images padded together; `single1`: the second alone; `nomask`: padding is a part of the image."""
    pixels, (sizes, stored) = pixels_of(golden), official.image_sizes(golden / FAMILY)
    if name == "nomask":
        metas, (height, width) = json.loads((golden / FAMILY / "img_metas.json").read_text()), pixels.shape[-2:]
        factors = [meta["scale_factor"] for meta in metas]
        # at the scale of the stored images; the released code does not clip to these
        return ImageBatch(pixels, [(height, width)] * 2, [(height / y, width / x) for x, y, *_ in factors])
    if name == "batch":
        return ImageBatch(pixels, sizes, stored)
    height, width = sizes[1]
    return ImageBatch(pixels[1:, :, :height, :width].contiguous(), sizes[1:], stored[1:])


def encoded(model, images):
    return model.encode(images.pixels, images.padding_mask())


@torch.no_grad()
def test_backbone_neck_and_encoder(golden, model):
    recorded, kept = load_file(golden / FAMILY / "train_normal.safetensors"), []
    images = images_of(golden, "batch")
    for module in (model.backbone, model.neck, model.encoder.layers[0]):
        module.register_forward_hook(lambda _, __, output: kept.append(output))
    memory = encoded(model, images)
    for name, maps in zip(("backbone", "neck"), kept):
        for level, found in enumerate(maps):
            official.assert_equal_to(found, recorded[f"{name}.{level}"])
    for level, mask in enumerate(level_masks(images.padding_mask(), memory.shapes)):
        assert torch.equal(mask, recorded[f"mask.{level}"].bool())
        sine = sine_of_cells(mask, 32, temperature=model.encoder.temperature, offset=model.encoder.offset)
        if level > 0:
            official.assert_equal_to(sine, recorded[f"pos_embed.{level}"], where=~mask[:, None].expand_as(sine))
    official.assert_equal_to(kept[2], recorded["encoder_layer.0"], where=~memory.padding)
    official.assert_equal_to(memory.tokens, recorded["memory"], where=~memory.padding)
    for level, found in enumerate(model.pyramid(memory)):
        official.assert_equal_to(found, recorded[f"X.{level}"])


@torch.no_grad()
def test_proposals(golden, model):
    recorded = load_file(golden / FAMILY / "train_normal.safetensors")
    tokens = []
    model.proposals.norm.register_forward_hook(lambda _, __, output: tokens.append(output))
    memory = encoded(model, images_of(golden, "batch"))
    proposals = model.proposals(memory)
    official.assert_equal_to(tokens[0], recorded["gen_prop.output_memory"])
    official.assert_equal_to(model.proposals.predict(memory)[0].logits, recorded["enc_outputs_class"])
    assert torch.equal(token_anchors(memory)[1], recorded["gen_prop.output_proposals_logit"].isfinite().all(-1))
    assert torch.equal(proposals.chosen, recorded["enc_topk_index"])
    official.assert_equal_to(proposals.predictions.logits, recorded["enc_topk_score"])
    official.assert_equal_to(proposals.predictions.boxes, recorded["enc_topk_bbox"])
    assert not proposals.references.requires_grad


@pytest.mark.parametrize("name", ["batch", "single1", "nomask"])
@torch.no_grad()
def test_decoder_alone_and_in_a_padded_batch(golden, model, name):
    recorded = load_file(golden / FAMILY / "eval.safetensors")
    memory, states = encoded(model, images_of(golden, name)), []
    model.decoder.norm.register_forward_hook(lambda _, __, output: states.append(output))
    proposals = model.proposals(memory)
    found = model.decode(memory, proposals.references)
    assert torch.equal(proposals.chosen, recorded[f"fwd.{name}.enc_topk_index"])
    official.assert_equal_to(proposals.references, recorded[f"fwd.{name}.enc_topk_bbox"])
    official.assert_equal_to(torch.stack(states), recorded[f"fwd.{name}.dec.inter_states"])
    official.assert_equal_to(found.logits, recorded[f"fwd.{name}.all_cls_scores"])
    official.assert_equal_to(found.boxes, recorded[f"fwd.{name}.all_bbox_preds"])


@pytest.mark.parametrize("name", ["batch", "single1"])
@pytest.mark.parametrize("mode", NMS)
@torch.no_grad()
def test_detections_of_the_decoder(golden, model, mode, name):
    """All in output order, in pixels of the stored image."""
    compare_detections(golden, model, mode, name)


@pytest.mark.parametrize("mode", ["detr", "detr_softnms"])
@torch.no_grad()
def test_detections_with_padding_as_a_part_of_the_image(golden, model, mode):
    compare_detections(golden, model, mode, "nomask", key=f"nomask.{mode}.batch")


def compare_detections(golden, model, mode, name, key=None):
    recorded, images = load_file(golden / FAMILY / "eval.safetensors"), images_of(golden, name)
    _, model.nms = NMS[mode]
    for row, found in enumerate(model.detect(encoded(model, images), images)):
        beginning = f"{key or f'{mode}.{name}'}.img{row}"
        expected, labels = recorded[f"{beginning}.bboxes"], recorded[f"{beginning}.labels"]
        assert torch.equal(found["labels"], labels)
        assert (found["boxes"] - expected[:, :4]).abs().max() <= 1e-4
        assert (found["scores"] - expected[:, 4]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["batch", "single1"])
@pytest.mark.parametrize("mode", HEADS)
@torch.no_grad()
def test_detections_of_the_dense_heads(golden, model, mode, name):
    recorded, images = load_file(golden / FAMILY / "eval.safetensors"), images_of(golden, name)
    for row, found in enumerate(model.detect(encoded(model, images), images, HEADS[mode])):
        rows = torch.cat([found["boxes"], found["scores"][:, None]], dim=1)
        for label in range(official.CLASSES):
            expected, ours = recorded[f"{mode}.{name}.img{row}.cls{label}"], rows[found["labels"] == label]
            assert len(ours) == len(expected)
            ordered = [one[one[:, 4].argsort(descending=True, stable=True)] for one in (ours, expected)]
            torch.testing.assert_close(*ordered, rtol=0, atol=1e-4)


class Ranked(torch.nn.Module):
    """An objective that keeps the sets it is given, layer by layer, and their terms."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.sets, self.terms = inner, [], []

    def forward(self, predictions):
        terms = self.inner(predictions)
        layered = predictions.logits.ndim == 3
        self.sets += official.layers_of(predictions) if layered else [predictions]
        names = ("rank", "sort")
        self.terms += zip(*(terms[name].unbind() if layered else [terms[name]] for name in names), strict=True)
        return terms


def ranked_sets(golden, case, monkeypatch):
    """What BRS-DINO ranks with the recorded weights: encoder, decoder layers, denoising, auxiliary queries."""
    model = official.load_brs_dino(golden, monkeypatch).train()
    official.in_index_order(model, monkeypatch)
    arrays, sizes, targets = official.recorded_case(golden, FAMILY, case)
    official.co_dino_as_released(model, arrays)
    official.as_released(model)
    weight = model.objective.ours.weight
    model.objective = Ranked(model.objective)
    model.denoising_objective = Ranked(official.ReleasedObjective(model.denoising_objective))
    begin, matched = model.matcher.begin, []
    model.matcher.begin = lambda *args: matched.append(begin(*args)) or matched[0]
    pixels = pixels_of(golden)
    with torch.no_grad():
        model.losses(model.encode(pixels, official.padding(sizes, pixels.shape[-2:])), sizes, targets)
    own, noised = model.objective, model.denoising_objective
    # in the recorded order; the auxiliary sets are computed before the matching is known
    order = [*zip(own.sets[4:], own.terms[4:]), *zip(noised.sets, noised.terms), *zip(own.sets[:4], own.terms[:4])]
    return matched, [(one, [float(term) / weight for term in terms]) for one, terms in order]


def test_what_brs_dino_ranks_equals_the_released_code(golden, case, monkeypatch):
    recorded = load_file(golden / FAMILY / "brs_ranking.safetensors")
    (matched,), sets = ranked_sets(golden, case, monkeypatch)
    assert_matched(matched, recorded, case)
    numbers = sorted({key.split(".")[2] for key in recorded if key.startswith(f"{case}.rank.")})
    sets = sets[-len(numbers) :]  # without any object only the auxiliary sets are recorded
    for number, (found, (ranking, sorting)) in zip(numbers, sets, strict=True):
        key = f"{case}.rank.{number}"
        official.assert_equal_to(found.logits.flatten(), recorded[f"{key}.logits"])
        targets = torch.zeros_like(found.logits)
        targets[found.rows, found.labels[found.rows]] = found.quality
        official.assert_equal_to(targets.flatten(), recorded[f"{key}.targets"])
        for name, value in (("ranking", ranking), ("sorting", sorting)):
            assert value == pytest.approx(float(recorded[f"{key}.{name}"]), rel=1e-6, abs=1e-6), f"{key}.{name}"
