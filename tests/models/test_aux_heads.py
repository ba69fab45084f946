"""`model.aux_heads`: the detector with any of its auxiliary heads left out."""

import pytest
import torch
from support import DEMO, SMALL_DETECTOR

from brs_detr.config import ConfigError, apply_overrides, load_config
from brs_detr.export.graphs import DetectorGraph
from brs_detr.models.build import build_model
from brs_detr.ops.images import ImageBatch
from brs_detr.run.anchors import layouts

IMAGES = ImageBatch.from_list([torch.randint(0, 255, (3, 64, 80)), torch.randint(0, 255, (3, 72, 48))])
TARGETS = [
    {"boxes": torch.tensor([[5.0, 5, 30, 40], [20, 8, 50, 30]]), "labels": torch.tensor([1, 0])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
]
CHOICES = [("roi", "atss"), ("roi",), ("atss",), ()]


def settings(heads, query_boxes="encoder"):
    chosen = [f"model.aux_heads=[{','.join(heads)}]", f"model.query_boxes={query_boxes}"]
    # in two steps: on one command line, settings of a head that is left out are refused
    return apply_overrides(load_config(DEMO, SMALL_DETECTOR), chosen).model


@pytest.mark.parametrize("query_boxes", ["encoder", "rpn"])
@pytest.mark.parametrize("heads", CHOICES, ids="+".join)
def test_every_parameter_learns_and_every_head_that_is_there_has_terms(heads, query_boxes):
    model = build_model(settings(heads, query_boxes), 3).train()
    losses = model(IMAGES, TARGETS)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    rpn = {"rpn"} if "roi" in heads or query_boxes == "rpn" else set()
    expected = {"encoder", "decoder", *heads, *(f"aux_{head}" for head in heads)} | rpn
    assert {name.partition(".")[0] for name in losses} == expected
    absent = {"rpn", "roi", "atss"} - {*heads, *rpn}
    assert not [name for name in model.state_dict() if name.partition(".")[0] in absent]


@pytest.mark.parametrize("query_boxes", ["encoder", "rpn"])
@pytest.mark.parametrize("heads", CHOICES, ids="+".join)
def test_heads_that_are_there_predict_and_others_are_refused(heads, query_boxes):
    model = build_model(settings(heads, query_boxes), 3).eval()
    with torch.no_grad():
        found = model.detect_with_all_heads(IMAGES)
        assert model.heads == ("decoder", *heads) == tuple(found)
    for head in {"roi", "atss"} - set(heads):
        with pytest.raises(ValueError, match=f"eval.predict_with={head}: this detector has decoder"):
            model.predict_with = head
    if not heads:
        with pytest.raises(ValueError, match=r"eval\.predict_with=ensemble"):
            model.predict_with = "ensemble"


@pytest.mark.parametrize("heads", CHOICES, ids="+".join)
def test_the_decoders_graph_needs_no_other_head(heads):
    model = build_model(settings(heads), 3).eval()
    one = ImageBatch.from_list([IMAGES.pixels[0][:, :64, :80]])
    with torch.no_grad():
        boxes, scores, *_ = DetectorGraph(model)(one.pixels, torch.tensor(one.sizes))
        (expected,) = model(one)
    torch.testing.assert_close(scores[0], expected["scores"])
    torch.testing.assert_close(boxes[0], expected["boxes"], rtol=1e-4, atol=1e-3)


def test_first_weights_of_the_decoder_do_not_depend_on_the_order_of_the_list():
    models = []
    for heads in (("roi", "atss"), ("atss", "roi")):
        torch.manual_seed(0)
        models.append(build_model(settings(heads), 3))
    one, other = (model.state_dict() for model in models)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert models[0].heads == models[1].heads


@pytest.mark.parametrize(
    ("value", "complaint"), [("[roi,roi]", "names a head twice"), ("[rio]", "did you mean roi"), ("roi", "a list")]
)
def test_other_values_are_refused(value, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_config(DEMO, [f"model.aux_heads={value}"])


def test_anchors_are_those_of_the_heads_that_are_there():
    assert list(layouts(settings(("roi", "atss")))) == ["rpn", "atss"]
    assert list(layouts(settings(("atss",)))) == ["atss"]
    assert list(layouts(settings((), "rpn"))) == ["rpn"]
