"""Official weights in training: who is matched with whom, which samples become queries, and what the decoder says to
them, for batches with and without objects."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
import official
from support import valid_rows

from brs_detr.assign.hungarian import Match
from brs_detr.models import brs_detr as detector
from brs_detr.ops.anchors import valid_extents
from brs_detr.ops.targets import PackedTargets


class Spy(torch.nn.Module):
    """Runs something and keeps each call's arguments and result."""

    def __init__(self, inner):
        super().__init__()
        self.calls = []
        self.inner = inner

    def forward(self, *args, **kwargs):
        result = self.inner(*args, **kwargs)
        self.calls.append((args, kwargs, result))
        return result


@pytest.fixture(
    scope="module", params=[(family, case) for family in official.FAMILIES for case in official.CASES], ids="-".join
)
def seen(golden, request):
    """Recorded arrays, and what our training step did on the same batch."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return observe(golden, *request.param, monkeypatch)


def observe(golden, family, case, monkeypatch):
    """Run one recorded batch with spies at every choice."""
    model = official.load_official(golden, family, monkeypatch).train()
    official.in_index_order(model, monkeypatch)
    if family == "brs_detr":
        official.as_released(model)
    arrays, sizes, targets = official.recorded_case(golden, family, case)
    spies = {
        "matcher": Spy(lambda *args: begin(*args).solve()),
        "queries": Spy(detector.select_queries),
        "sample": Spy(model.roi.assign),
    }
    begin = model.matcher.begin
    model.matcher.begin = lambda *args: SimpleNamespace(solve=lambda: spies["matcher"](*args))
    model.roi.assign = lambda *args: spies["sample"](*args)
    monkeypatch.setattr(detector, "select_queries", spies["queries"])
    for head in ("rpn", "roi", "atss"):
        spies[head] = getattr(model, head).objective = Spy(getattr(model, head).objective)
    decoded = []
    model.decoder.register_forward_hook(lambda _, inputs, output: decoded.append((inputs, output)))
    pixels = load_file(golden / family / "inputs.safetensors")["img"]
    with torch.no_grad():
        model.losses(model.encode(pixels, official.padding(sizes)), sizes, targets)
    calls = {name: spy.calls[0] for name, spy in spies.items()}
    counts = [len(target["labels"]) for target in targets]
    return {"arrays": arrays, "sizes": sizes, "counts": counts, "decoded": decoded, **calls}


def test_matched_queries_and_tokens(seen):
    (sets, packed), _, (encoder, decoder) = seen["matcher"]
    assert isinstance(packed, PackedTargets)
    tokens, queries = (one.logits.shape[-2] for one in sets)
    layers = [Match(*pair) for pair in zip(*decoder, strict=True)]
    for name, count_of_rows, match in zip(
        ("enc", "dec0", "dec1"), (tokens, queries, queries), (encoder, *layers), strict=True
    ):
        image, query = match.rows // count_of_rows, match.rows % count_of_rows
        for b, count in enumerate(seen["counts"]):
            assert int((image == b).sum()) == count
            if count:
                beginning = f"match.{name}.img{b}"
                assert torch.equal(query[image == b], seen["arrays"][f"{beginning}.pos_query"])
                boxes = packed.boxes[match.objects[image == b]]
                official.assert_equal_to(boxes, seen["arrays"][f"{beginning}.bbox_targets"])


@pytest.mark.parametrize("head", ["rpn", "atss"])
def test_labels_of_all_anchors(seen, head):
    (predictions,), _, _ = seen[head]
    per_cell, strides = {"rpn": 9, "atss": 1}[head], (8, 16, 32, 64, 128)
    shapes = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]
    expected, used = [], []
    for b, size in enumerate(seen["sizes"]):
        extents = valid_extents(size, shapes, strides)
        for kind, rows in (("labels", expected), ("label_weights", used)):
            levels = [seen["arrays"][f"{head}.target.{kind}.{level}"][b] for level in range(5)]
            grids = [level.reshape(*shape, per_cell, 1) for level, shape in zip(levels, shapes)]
            rows.append(valid_rows(grids, extents)[:, 0])
    expected, used = torch.cat(expected), torch.cat(used) > 0
    if predictions.valid is not None:
        assert torch.equal(predictions.valid, used)
    assert torch.equal(predictions.labels[used], expected[used])


def test_sampled_regions(seen):
    (rois, assigned, *_), _, _ = seen["sample"]
    recorded = seen["arrays"]["roi.rois"]
    for b, own in enumerate(rois):
        expected, positives = recorded[recorded[:, 0] == b, 1:], int((assigned[b] >= 0).sum())
        assert len(own) == len(expected)
        official.assert_equal_to(own[:positives], expected[:positives])
        # two background proposals are recorded with the very same score, so that their order is left to rounding
        distances = torch.cdist(own, expected, p=torch.inf)
        assert max(distances.min(0).values.max(), distances.min(1).values.max()) <= 1e-5 * expected.max()
    (predictions,), _, _ = seen["roi"]
    assert torch.equal(predictions.labels, seen["arrays"]["roi.target.labels"])
    for b, (own, count) in enumerate(zip(assigned, seen["counts"])):
        if count:
            assert torch.equal(own[own >= 0], seen["arrays"][f"roi.sample.img{b}.pos_gt_inds"])


def test_auxiliary_queries_and_their_predictions(seen):
    _, _, chosen = seen["queries"]
    arrays = seen["arrays"]
    ((*inputs, _, sets), found) = seen["decoded"][0]  # the main queries, and then those of the heads
    counts = [one.queries for one in sets]
    inputs = list(zip(*(part.split(counts, dim=1) for part in inputs), strict=True))
    for k, queries in enumerate(chosen):
        labels = arrays[f"aux{k}.labels"].flatten()
        rows = (labels < official.CLASSES).nonzero()[:, 0]
        official.assert_equal_to(queries.boxes, arrays[f"aux{k}.coords"])
        official.assert_equal_to(queries.features, arrays[f"aux{k}.feats"])
        assert torch.equal(queries.rows, rows)
        assert torch.equal(queries.labels, labels[rows])
        official.assert_equal_to(queries.targets, arrays[f"aux{k}.targets"].flatten(0, 1)[rows])
        content, position, references = inputs[1 + k]
        own = found.split(counts)[1 + k]
        official.assert_equal_to(content, arrays[f"aux{k}.dec.query"])
        official.assert_equal_to(position, arrays[f"aux{k}.dec.query_pos"])
        official.assert_equal_to(references, arrays[f"aux{k}.dec.reference_in"])
        official.assert_equal_to(own.logits, arrays[f"aux{k}.cls_scores"])
        official.assert_equal_to(own.boxes, arrays[f"aux{k}.bbox_preds"])
