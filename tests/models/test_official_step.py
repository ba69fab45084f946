"""A training step against numbers recorded from the official code, small enough to live in `tests/golden`.

Gradients of what only the main queries and the encoder proposals reach, from the encoder's inputs on; labels of all
anchors; losses of the RPN and the ATSS head from their recorded outputs, with the gradients of their last biases.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
import official

from brs_detr.checkpoints.keys import to_ours
from brs_detr.models.heads.dense import DenseOutput

GOLDEN = Path(official.__file__).parent
SIZES = [(128, 153), (101, 160)]


@pytest.fixture(scope="module")
def recorded():
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "step.npz").items()}


@pytest.fixture(scope="module")
def arrays():
    return load_file(GOLDEN / "forward.safetensors")


@pytest.fixture(params=official.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family, monkeypatch):
    """Our detector with the official transformer and scales; what else is in it is random and not used."""
    model = official.official_model(family, monkeypatch).train()
    official.in_index_order(model, monkeypatch)
    if family == "brs_detr":
        official.as_released(model)
    parts = (load_file(GOLDEN / f"{part}_weights.safetensors") for part in ("encoder", "decoder"))
    ours, _ = to_ours({name: value for part in parts for name, value in part.items()})
    model.load_state_dict(ours, strict=False)
    return model


def targets_of(arrays):
    return [{"boxes": arrays[f"gt_bboxes.{b}"], "labels": arrays[f"gt_labels.{b}"]} for b in range(2)]


def expected_losses(family):
    losses = json.loads((GOLDEN / "losses.json").read_text())[family]
    return official.named_terms({key: torch.tensor(value) for key, value in losses.items() if key != "loss"})


def gradients(recorded, family, part):
    """Recorded gradients by our names, of parameters whose name begins with `part`."""
    beginning = f"{family}.gradient."
    ours, unknown = to_ours({k.removeprefix(beginning): v for k, v in recorded.items() if k.startswith(beginning)})
    assert not unknown
    return {name: value for name, value in ours.items() if name.startswith(part)}


def test_gradients_of_queries_and_proposals(family, model, arrays, recorded):
    """They tell what is detached: references of every layer and of the proposals, the target of the self-balance."""
    # without dense heads, and so without auxiliary queries
    model.rpn = model.roi = model.atss = None
    model.aux_embeddings.clear()
    memory = model.encoder([arrays[f"neck.{level}"] for level in range(4)], official.padding(SIZES))
    losses = model.losses(memory, SIZES, targets_of(arrays))
    expected = expected_losses(family)
    assert losses.keys() == {name for name in expected if name.startswith(("encoder", "decoder"))}
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-4), name
    sum(losses.values()).backward()
    found = gradients(recorded, family, ("proposals", "query_content", "box_embedding"))
    assert {name.partition(".")[0] for name in found} == {"proposals", "query_content", "box_embedding"}
    for name, gradient in found.items():
        error = (model.get_parameter(name).grad - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


class Spy(torch.nn.Module):
    """An objective that keeps what it is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, predictions):
        self.labels, self.valid = predictions.labels, predictions.valid
        return self.inner(predictions)


def inside(levels, per_cell=1):
    """Entries (2, n) a level, cut to the cells inside each image and joined as the heads join them."""
    rows = []
    for image, (h, w) in enumerate(SIZES):
        for level, values in enumerate(levels):
            stride, shape = 8 * 2**level, [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)][level]
            cells = values[image].view(*shape, per_cell)
            rows.append(cells[: -(-h // stride), : -(-w // stride)].flatten())
    return torch.cat(rows)


def compare(family, head, losses, biases, recorded):
    """Losses and gradients of one dense head with the recorded ones."""
    expected = {k.partition(".")[2]: v for k, v in expected_losses(family).items() if k.startswith(f"{head}.")}
    if head == "rpn":
        expected["giou" if family == "brs_detr" else "l1"] = expected.pop("bbox")
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-4), name
    recorded = gradients(recorded, family, f"{head}.")
    assert biases.keys() == recorded.keys()
    for name, gradient in biases.items():
        torch.testing.assert_close(gradient, recorded[name], rtol=1e-4, atol=1e-5 * recorded[name].abs().max().item())


def test_losses_of_the_rpn(family, model, arrays, recorded):
    logits = [
        recorded[f"rpn.cls.{level}"].permute(0, 2, 3, 1)[..., None].clone().requires_grad_() for level in range(5)
    ]
    deltas = [recorded[f"{family}.rpn.reg.{level}"].clone().requires_grad_() for level in range(5)]
    model.rpn.objective = Spy(model.rpn.objective)
    losses = model.rpn.losses(DenseOutput(logits, deltas), SIZES, targets_of(arrays)).terms
    labels = inside([recorded[f"{family}.rpn.labels.{level}"] for level in range(5)], 9)
    valid = model.rpn.objective.valid
    assert torch.equal(valid, labels >= 0) and torch.equal(model.rpn.objective.labels[valid], labels[valid].long())
    assert int((~valid).sum()) > 0  # some anchors are ignored
    sum(losses.values()).backward()
    biases = {
        "rpn.score.bias": sum(x.grad.sum((0, 1, 2, 4)) for x in logits),
        "rpn.delta.bias": sum(x.grad.sum((0, 1, 2)) for x in deltas).flatten(),
    }
    compare(family, "rpn", losses, biases, recorded)


def test_losses_of_the_atss_head(family, model, arrays, recorded):
    scales = [recorded[f"scale.{level}"] for level in range(5)]
    outputs = {
        kind: [
            recorded[f"atss.{kind}.{level}"].permute(0, 2, 3, 1)[..., None, :].clone().requires_grad_()
            for level in range(5)
        ]
        for kind in ("cls", "reg", "centerness")
    }
    centerness = outputs["centerness"] if family == "co_detr" else None
    output = DenseOutput(outputs["cls"], outputs["reg"], centerness)
    model.atss.objective = Spy(model.atss.objective)
    losses = model.atss.losses(output, SIZES, targets_of(arrays)).terms
    labels = inside([recorded[f"{family}.atss.labels.{level}"] for level in range(5)])
    assert torch.equal(model.atss.objective.labels, labels.long())
    sum(losses.values()).backward()
    biases = {
        "atss.score.bias": sum(x.grad.sum((0, 1, 2, 3)) for x in outputs["cls"]),
        "atss.delta.bias": sum(scale * x.grad.sum((0, 1, 2, 3)) for scale, x in zip(scales, outputs["reg"])),
    }
    for level, (scale, x) in enumerate(zip(scales, outputs["reg"])):
        biases[f"atss.scales.{level}"] = (x.grad * x.detach() / scale).sum()
    if centerness is not None:
        biases["atss.centerness.bias"] = sum(x.grad.sum((0, 1, 2, 3)) for x in centerness)
    compare(family, "atss", losses, biases, recorded)
