"""Co-DINO's transformer against numbers recorded from the official code that live in `tests/golden`.

From the maps of the neck to the losses of the encoder, the decoder and the denoising queries, with the recorded draws.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
import official

from brs_detr.checkpoints.keys import our_key
from brs_detr.models import build as building

GOLDEN = Path(official.__file__).parent
SIZES, SHAPE = [(80, 149), (67, 160)], (80, 160)


@pytest.fixture(scope="module")
def arrays():
    return load_file(GOLDEN / "co_dino.safetensors")


def renamed(arrays, beginning):
    """The arrays whose names begin so, by our names."""
    layers = official.CO_DINO.decoder_layers
    found = {k.removeprefix(beginning): v for k, v in arrays.items() if k.startswith(beginning)}
    return {our_key(name, layers): value for name, value in found.items()}


@pytest.fixture
def step(arrays, monkeypatch):
    """Our transformer with the official weights, and what it computes in a step; there are no dense heads."""
    backbone = official.NarrowResNet(levels=4)
    monkeypatch.setattr(building, "build_backbone", lambda *args, **kwargs: backbone)
    model = building.build_model(replace(official.CO_DINO, aux_heads=()), official.CLASSES).train()
    weights = renamed(arrays, "weights.")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith(("backbone.", "neck.")) for name in missing)
    official.co_dino_as_released(model, arrays)
    seen = {}
    for name in ("proposals", "denoising", "decoder"):
        getattr(model, name).register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: (inputs, out)}))
    memory = model.encoder([arrays[f"neck.{level}"] for level in range(5)], official.padding(SIZES, SHAPE))
    targets = [{"boxes": arrays[f"gt_bboxes.{b}"], "labels": arrays[f"gt_labels.{b}"]} for b in range(2)]
    return model, seen, model.losses(memory, SIZES, targets)


def test_chosen_tokens(step, arrays):
    _, found = step[1]["proposals"]
    assert torch.equal(found.chosen, arrays["enc_topk_index"])
    official.assert_equal_to(found.predictions.logits, arrays["enc_topk_score"])
    official.assert_equal_to(found.predictions.boxes, arrays["enc_topk_bbox"])


def test_denoising_queries(step, arrays):
    _, rows = step[1]["denoising"]
    size = int(arrays["dn.pad_size"])
    official.assert_equal_to(rows.content, arrays["dn.query_label"])
    official.assert_equal_to(rows.boxes, arrays["dn.query_bbox_logit"].sigmoid())
    hidden = arrays["dn.attn_mask"].bool()
    assert (
        torch.equal(~rows.visible[0], hidden[:size]) and hidden[size:, :size].all() and not hidden[size:, size:].any()
    )
    for b in range(2):
        own = rows.rows // size == b
        assert torch.equal(rows.rows[own] % size, arrays[f"dn.target.img{b}.pos_inds"])
        assert torch.equal(rows.labels[own], arrays[f"dn.target.img{b}.labels"][rows.rows[own] % size])
        official.assert_equal_to(rows.targets[own], arrays[f"dn.target.img{b}.bbox_targets"][rows.rows[own] % size])


def test_predictions_of_every_layer(step, arrays):
    (_, _, _, _, sets), found = step[1]["decoder"]
    main, noised = found.split([one.queries for one in sets])
    official.assert_equal_to(torch.cat([noised.logits, main.logits], dim=2), arrays["all_cls_scores"])
    official.assert_equal_to(torch.cat([noised.boxes, main.boxes], dim=2), arrays["all_bbox_preds"])


def test_losses_and_gradients(step, arrays):
    model, _, losses = step
    recorded = json.loads((GOLDEN / "losses.json").read_text())["co_dino"]
    expected = official.named_terms({key: torch.tensor(value) for key, value in recorded.items() if key != "loss"})
    parts = ("encoder.", "decoder.", "denoising.")
    assert losses.keys() == {name for name in expected if name.startswith(parts)}
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-4), name
    sum(losses.values()).backward()
    gradients = renamed(arrays, "gradient.")
    # what the auxiliary queries do not reach
    assert {name.partition(".")[0] for name in gradients} == {"proposals", "query_content", "denoising"}
    for name, gradient in gradients.items():
        error = (model.get_parameter(name).grad - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"
