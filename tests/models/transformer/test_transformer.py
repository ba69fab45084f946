"""Neck, encoder, proposals, decoder, auxiliary query embedding: recorded official arrays, and what padding may do."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from brs_detr.checkpoints.keys import our_key
from brs_detr.models import build
from brs_detr.models.build import choose_sampling, sampling_here
from brs_detr.models.neck import ChannelMapper
from brs_detr.models.transformer.attention import inverse_sigmoid, sine_of_cells, use_sampling
from brs_detr.models.transformer.collaborative import AuxQueryEmbedding
from brs_detr.models.transformer.decoder import QueryDecoder, QuerySet, SelfAttention
from brs_detr.models.transformer.encoder import DeformableEncoder, Memory, level_masks
from brs_detr.models.transformer.two_stage import BoxEmbedding, TwoStageHead
from brs_detr.ops.deform_attn import deformable_attention
from brs_detr.ops.deform_attn_op import automatic_attention, fused_attention
from brs_detr.ops.images import ImageBatch

DIM, CLASSES, QUERIES = 64, 5, 20


class Transformer(nn.Module):
    """The parts under test under their names in the detector."""

    def __init__(self):
        super().__init__()
        self.neck = ChannelMapper([32, 64, 128], DIM, 4)
        self.encoder = DeformableEncoder(DIM, layers=2, hidden=128)
        self.proposals = TwoStageHead(DIM, CLASSES, QUERIES)
        self.decoder = QueryDecoder(DIM, CLASSES, layers=2, hidden=128)
        self.query_content = nn.Embedding(QUERIES, DIM)
        self.box_embedding = BoxEmbedding(DIM)
        self.coarsest = nn.Sequential(nn.Conv2d(DIM, DIM, 3, 2, 1), nn.GroupNorm(32, DIM))
        self.aux_embeddings = nn.ModuleDict({head: AuxQueryEmbedding(DIM) for head in ("roi", "atss")})


@pytest.fixture(scope="module")
def official(golden):
    safetensors = pytest.importorskip("safetensors.torch")
    folder = golden / "brs_detr"
    model, state = Transformer(), {}
    for key, value in safetensors.load_file(folder / "state_dict.safetensors").items():
        if key.endswith("head_pos_embed.weight"):
            state["aux_embeddings.roi.offset"], state["aux_embeddings.atss.offset"] = value[0], value[1]
        elif key.startswith(("neck", "query_head")):
            state[our_key(key, decoder_layers=2)] = value
    model.load_state_dict(state)
    sizes = [tuple(meta["img_shape"][:2]) for meta in json.loads((folder / "img_metas.json").read_text())]
    padding = ImageBatch(torch.zeros(2, 3, 128, 160), sizes, sizes).padding_mask()
    arrays = safetensors.load_file(folder / "train_normal.safetensors")
    with torch.no_grad():
        memory = model.encoder(model.neck([arrays[f"backbone.{i}"] for i in range(3)]), padding)
    return model, arrays, memory


def close(ours, recorded, where=None):
    if where is not None:
        ours, recorded = ours[where], recorded[where]
    torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=1e-5)


def test_memory_equals_the_official_encoder_outside_the_padding(official):
    _, arrays, memory = official
    close(memory.tokens, arrays["memory"], ~memory.padding)


def test_level_masks_equal_the_official_ones(official):
    _, arrays, memory = official
    padding = ImageBatch(torch.zeros(2, 3, 128, 160), [(128, 153), (101, 160)], []).padding_mask()
    for level, mask in enumerate(level_masks(padding, memory.shapes)):
        assert torch.equal(mask, arrays[f"mask.{level}"].bool())
        close(sine_of_cells(mask, DIM // 2).movedim(1, -1), arrays[f"pos_embed.{level}"].movedim(1, -1), ~mask)


def test_level_masks_read_the_pixels_of_nearest_neighbor_interpolation():
    """At every level of a backbone that halves and rounds up, as all those of the recipes do."""
    for side in range(9, 400, 3):
        padding, cells = torch.rand(1, side, side + 1) < 0.5, [(side, side + 1)]
        while cells[-1] != (1, 1):
            cells.append(tuple((n + 1) // 2 for n in cells[-1]))
        for shape, mask in zip(cells[1:], level_masks(padding, cells[1:]), strict=True):
            assert torch.equal(mask, F.interpolate(padding[:, None].float(), size=shape)[:, 0].bool())


def test_proposals_equal_the_official_ones(official):
    model, arrays, memory = official
    with torch.no_grad():
        found = model.proposals(memory)
        close(found.predictions.logits, arrays["enc_outputs_class"])
        close(found.predictions.boxes, arrays["enc_bbox_preds"])
        assert torch.equal(found.chosen, arrays["enc_topk_index"])
        close(model.box_embedding(found.references)[0], arrays["dec.query_pos"])


def test_decoder_equals_the_official_one_for_main_and_auxiliary_queries(official):
    model, arrays, memory = official
    with torch.no_grad():
        references = model.proposals(memory).references
        content = model.query_content.weight.expand(2, -1, -1)
        layers = model.decoder(content, model.box_embedding(references)[0], references, memory)
        close(layers.logits, arrays["all_cls_scores"])
        close(layers.boxes, arrays["all_bbox_preds"])
        for k, head in enumerate(("roi", "atss")):
            boxes = arrays[f"aux{k}.coords"]
            position, content = model.aux_embeddings[head](boxes, arrays[f"aux{k}.feats"])
            close(position, arrays[f"aux{k}.dec.query_pos"])
            close(content, arrays[f"aux{k}.dec.query"])
            layers = model.decoder(content, position, boxes, memory)
            close(layers.logits, arrays[f"aux{k}.cls_scores"])
            close(layers.boxes, arrays[f"aux{k}.bbox_preds"])


def run(model, maps, padding):
    with torch.no_grad():
        memory = model.encoder(maps, padding)
        references = model.proposals(memory).references
        content = model.query_content.weight[: references.shape[1]].expand(len(references), -1, -1)
        return model.decoder(content, model.box_embedding(references)[0], references, memory)


def test_padding_maps_to_the_right_changes_no_prediction():
    # padded by full cells of every level, so that nothing but masks and valid ratios is at work
    model = Transformer().eval()
    for head in (*model.decoder.regressors, model.proposals.regressor):
        nn.init.normal_(head[-1].weight, std=0.1)
    nn.init.normal_(model.proposals.classifier.weight, std=1.0)
    sides = [(16, 16), (8, 8), (4, 4), (2, 2)]
    maps = [torch.randn(1, DIM, h, w) for h, w in sides]
    alone = run(model, maps, torch.zeros(1, 128, 128, dtype=torch.bool))
    padding = torch.zeros(1, 128, 192, dtype=torch.bool)
    padding[:, :, 128:] = True
    wide = [torch.cat([m, torch.randn(1, DIM, m.shape[2], m.shape[3] // 2)], 3) for m in maps]
    padded = run(model, wide, padding)
    torch.testing.assert_close(padded.boxes, alone.boxes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.logits, alone.logits, rtol=1e-4, atol=1e-4)


def test_padding_and_border_tokens_are_never_chosen_however_high_they_score():
    """They share the score of an empty token, 0 here, and every other token scores less."""
    head = TwoStageHead(8, CLASSES, queries=4)
    nn.init.eye_(head.projection.weight)
    nn.init.zeros_(head.projection.bias)
    token = torch.tensor([1.0, -1.0] * 4)
    with torch.no_grad():
        head.classifier.weight.copy_(-token.expand(CLASSES, -1))
        head.classifier.bias.zero_()
    padding = torch.zeros(1, 16, dtype=torch.bool)
    padding[0, [2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]] = True  # the image: two rows and columns of four
    memory = Memory(token.expand(1, 16, 8), padding, [(4, 4)], torch.tensor([[[2.0, 2.0]]]), torch.full((1, 1, 2), 0.5))
    found = head(memory)
    assert found.predictions.logits[0, 15, 0] == 0 > found.predictions.logits[0, 0, 0]
    assert sorted(found.chosen[0].tolist()) == [0, 1, 4, 5]


def test_a_memory_with_fewer_tokens_than_queries_gives_fewer_queries():
    model = Transformer()
    maps = [torch.randn(1, DIM, h, w) for h, w in [(3, 3), (2, 2), (1, 1), (1, 1)]]
    layers = run(model, maps, torch.zeros(1, 24, 24, dtype=torch.bool))
    assert layers.boxes.shape == (2, 1, 15, 4) and layers.boxes.isfinite().all()


def test_look_forward_twice_sends_a_layers_box_gradient_one_layer_back():
    model = Transformer()
    for head in model.decoder.regressors:
        nn.init.normal_(head[-1].weight, std=0.1)
    maps = [torch.randn(1, DIM, h, w) for h, w in [(8, 8), (4, 4), (2, 2), (1, 1)]]
    memory = model.encoder(maps, torch.zeros(1, 64, 64, dtype=torch.bool))
    references = model.proposals(memory).references
    content = model.query_content.weight[None].detach()
    layers = model.decoder(content, model.box_embedding(references)[0].detach(), references, memory)
    layers.boxes[1].sum().backward()
    assert all(regressor[-1].bias.grad.abs().sum() > 0 for regressor in model.decoder.regressors)


def test_inverse_sigmoid_undoes_the_sigmoid_and_is_finite_at_the_ends():
    x = torch.linspace(-8, 8, 33, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x.sigmoid()), x)
    assert inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0])).isfinite().all()


def test_every_deformable_attention_samples_as_chosen():
    encoder = DeformableEncoder(8, layers=2, heads=2, levels=1, points=1, hidden=8)
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return deformable_attention(*arguments)

    maps, padding = [torch.randn(1, 8, 3, 4)], torch.zeros(1, 24, 32, dtype=torch.bool)
    before = encoder(maps, padding).tokens
    use_sampling(encoder, counted)
    assert torch.equal(encoder(maps, padding).tokens, before)
    assert len(calls) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are taken")
@pytest.mark.parametrize("name", ["auto", "torch", "triton"])
def test_fused_kernels_are_left_out_without_a_gpu(name):
    assert sampling_here(name) == "torch"
    assert choose_sampling(name) is deformable_attention


@pytest.mark.parametrize(
    ("name", "triton", "chosen"),
    [
        ("auto", True, automatic_attention),
        ("auto", False, deformable_attention),
        ("triton", True, fused_attention),
        ("torch", True, deformable_attention),
    ],
)
def test_with_a_gpu_the_kernels_are_taken_by_themselves(name, triton, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build, "find_spec", lambda _: triton or None)
    assert choose_sampling(name) is chosen


def test_kernels_that_are_asked_for_need_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"model\.deformable_attention=triton: Triton is not installed"):
        choose_sampling("triton")


def random_sets(counts):
    """Content, position and boxes of sets of queries of two images."""
    return [(torch.randn(2, n, DIM), torch.randn(2, n, DIM), torch.rand(2, n, 4) * 0.6 + 0.2) for n in counts]


def random_memory():
    shapes = [(6, 8), (3, 4), (2, 2), (1, 1)]
    tokens = torch.randn(2, sum(h * w for h, w in shapes), DIM, requires_grad=True)
    sizes = torch.tensor([[float(w), h] for h, w in shapes]).expand(2, 4, 2)
    return Memory(tokens, torch.rand(tokens.shape[:2]) < 0.1, shapes, sizes, torch.rand(2, 4, 2) * 0.5 + 0.5)


@pytest.mark.parametrize("counts", [(20, 9, 13), (7,), (5, 5)])
def test_sets_of_queries_together_are_refined_as_each_alone(counts):
    """The passes of each set are the readable form: predictions and gradients are equal."""
    decoder, memory, sets = QueryDecoder(DIM, CLASSES, layers=2, hidden=128), random_memory(), random_sets(counts)
    for regressor in decoder.regressors:
        nn.init.normal_(regressor[-1].weight, std=0.1)
    alone = [decoder(*one, memory) for one in sets]
    together = decoder(
        *(torch.cat(column, dim=1) for column in zip(*sets)), memory, [QuerySet(n) for n in counts]
    ).split(counts)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-5, atol=1e-6)
    inputs = [memory.tokens, *decoder.parameters()]
    expected, found = (
        torch.autograd.grad(sum((one.logits**2).mean() + (one.boxes**2).mean() for one in sets), inputs)
        for sets in (alone, together)
    )
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_self_attention_of_one_set_is_torchs_multi_head_attention():
    ours = SelfAttention(DIM, 8)
    theirs = nn.MultiheadAttention(DIM, 8, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, value = torch.randn(2, 11, DIM), torch.randn(2, 11, DIM)
    expected, _ = theirs(query, query, value, need_weights=False)
    torch.testing.assert_close(ours(query, value), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(query, value, [QuerySet(11)]), expected, rtol=1e-5, atol=1e-6)
