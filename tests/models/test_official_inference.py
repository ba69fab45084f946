"""Official weights in evaluation: every intermediate array and the final boxes, from the image on.

Arrays of the training batch serve for the intermediates: without dropout and batch statistics both modes agree there.
"""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
import official

from brs_detr.models.transformer.attention import sine_of_cells
from brs_detr.models.transformer.encoder import level_masks
from brs_detr.models.transformer.two_stage import token_anchors
from brs_detr.ops.images import ImageBatch

MODES = {"detr": "decoder", "one-stage": "atss", "two-stage": "roi"}


@pytest.fixture(params=official.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(golden, family, monkeypatch):
    return official.load_official(golden, family, monkeypatch).eval()


def batch_of(golden, family, name):
    """`batch`: both images padded together; `single1`: the second one alone, without padding."""
    pixels = load_file(golden / family / "inputs.safetensors")["img"]
    sizes, stored = official.image_sizes(golden / family)
    if name == "batch":
        return ImageBatch(pixels, sizes, stored)
    height, width = sizes[1]
    return ImageBatch(pixels[1:, :, :height, :width].contiguous(), sizes[1:], stored[1:])


def encoded(model, images):
    return model.encode(images.pixels, images.padding_mask())


def outputs_of(modules):
    """Lists that fill with the outputs of modules as they run."""
    kept = [[] for _ in modules]
    for module, outputs in zip(modules, kept):
        module.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
    return kept


@torch.no_grad()
def test_backbone_neck_and_encoder(golden, family, model):
    recorded = load_file(golden / family / "train_normal.safetensors")
    images = batch_of(golden, family, "batch")
    backbone, neck, *layers = outputs_of([model.backbone, model.neck, *model.encoder.layers])
    memory = encoded(model, images)
    for name, maps in (("backbone", backbone[0]), ("neck", neck[0])):
        for level, found in enumerate(maps):
            official.assert_equal_to(found, recorded[f"{name}.{level}"])
    masks = level_masks(images.padding_mask(), memory.shapes)
    for level, mask in enumerate(masks):
        assert torch.equal(mask, recorded[f"mask.{level}"].bool())
        sine = sine_of_cells(mask, 32)
        official.assert_equal_to(sine, recorded[f"pos_embed.{level}"], where=~mask[:, None].expand_as(sine))
    for number, found in enumerate(layers):
        official.assert_equal_to(found[0], recorded[f"encoder_layer.{number}"], where=~memory.padding)
    official.assert_equal_to(memory.tokens, recorded["memory"], where=~memory.padding)


@torch.no_grad()
def test_proposals_and_decoder(golden, family, model):
    recorded = load_file(golden / family / "train_normal.safetensors")
    memory = encoded(model, batch_of(golden, family, "batch"))
    normalized, *layers = outputs_of([model.proposals.norm, *model.decoder.layers])
    proposals = model.proposals(memory)
    official.assert_equal_to(normalized[0], recorded["gen_prop.output_memory"])
    official.assert_equal_to(proposals.predictions.logits, recorded["enc_outputs_class"])
    official.assert_equal_to(proposals.predictions.boxes, recorded["enc_bbox_preds"])
    assert torch.equal(token_anchors(memory)[1], recorded["gen_prop.output_proposals_logit"].isfinite().all(-1))
    assert torch.equal(proposals.chosen, recorded["enc_topk_index"])
    official.assert_equal_to(proposals.references, recorded["dec.init_reference"])
    position, _ = model.box_embedding(proposals.references)
    official.assert_equal_to(position, recorded["dec.query_pos"])
    official.assert_equal_to(model.query_content.weight.expand(2, -1, -1), recorded["dec.query"])
    predictions = model.decode(memory, proposals.references)
    official.assert_equal_to(torch.stack([found[0] for found in layers]), recorded["dec.inter_states"])
    official.assert_equal_to(predictions.logits, recorded["all_cls_scores"])
    official.assert_equal_to(predictions.boxes, recorded["all_bbox_preds"])


@pytest.mark.parametrize("family", [*official.FAMILIES, "co_dino"], indirect=True)
@torch.no_grad()
def test_dense_heads(golden, family, model):
    recorded = load_file(golden / family / "train_normal.safetensors")
    images = batch_of(golden, family, "batch")
    maps = model.pyramid(encoded(model, images))
    rpn, atss = model.rpn(maps), model.atss(maps)
    grids = model.rpn.anchors(rpn.shapes), model.atss.anchors(atss.shapes)
    for level, found in enumerate(maps):
        official.assert_equal_to(found, recorded[f"X.{level}"])
        official.assert_equal_to(rpn.logits[level].flatten(3).permute(0, 3, 1, 2), recorded[f"rpn.cls.{level}"])
        official.assert_equal_to(rpn.deltas[level].flatten(3).permute(0, 3, 1, 2), recorded[f"rpn.reg.{level}"])
        official.assert_equal_to(atss.logits[level].flatten(3).permute(0, 3, 1, 2), recorded[f"atss.cls.{level}"])
        official.assert_equal_to(atss.deltas[level].flatten(3).permute(0, 3, 1, 2), recorded[f"atss.reg.{level}"])
        for name, grid in zip(("rpn", "atss"), grids):
            official.assert_equal_to(grid[level].flatten(0, 2), recorded[f"{name}.anchors.{level}"])
        if atss.centerness is not None:
            found = atss.centerness[level].flatten(3).permute(0, 3, 1, 2)
            official.assert_equal_to(found, recorded[f"atss.centerness.{level}"])
    assert (atss.centerness is None) == (family == "brs_detr")
    rois = recorded["roi.rois"]
    pooled = model.roi.pool_rois(maps[: len(model.strides)], [rois[rois[:, 0] == b, 1:] for b in range(2)])
    regions = model.roi.classify_pooled(pooled)
    if family == "co_dino":
        official.assert_equal_to(pooled.windows[pooled.back][:4], recorded["roi.feats_first4"])
    else:
        official.assert_equal_to(pooled.features(), recorded["roi.feats_pooled"])
    official.assert_equal_to(regions.logits, recorded["roi.cls_score"])
    official.assert_equal_to(regions.deltas.flatten(1), recorded["roi.bbox_pred"])


@pytest.mark.parametrize("name", ["batch", "single1"])
@torch.no_grad()
def test_decoder_alone_and_in_a_padded_batch(golden, family, model, name):
    recorded = load_file(golden / family / "eval.safetensors")
    memory = encoded(model, batch_of(golden, family, name))
    proposals = model.proposals(memory)
    predictions = model.decode(memory, proposals.references)
    official.assert_equal_to(memory.tokens, recorded[f"fwd.{name}.memory"], where=~memory.padding)
    official.assert_equal_to(proposals.predictions.logits, recorded[f"fwd.{name}.enc_outputs_class"])
    official.assert_equal_to(proposals.references, recorded[f"fwd.{name}.dec.init_reference"])
    official.assert_equal_to(predictions.logits, recorded[f"fwd.{name}.all_cls_scores"])
    official.assert_equal_to(predictions.boxes, recorded[f"fwd.{name}.all_bbox_preds"])


@pytest.mark.parametrize("name", ["batch", "single1"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_final_boxes(golden, family, model, mode, name):
    """The detections of every class, in pixels of the stored image, with scores."""
    recorded = load_file(golden / family / "eval.safetensors")
    images = batch_of(golden, family, name)
    model.predict_with = MODES[mode]
    for row, found in enumerate(model.detect(encoded(model, images), images)):
        rows = torch.cat([found["boxes"], found["scores"][:, None]], dim=1)
        for label in range(official.CLASSES):
            expected = recorded[f"{mode}.{name}.img{row}.cls{label}"]
            ours = rows[found["labels"] == label]
            assert len(ours) == len(expected)
            order = [column.argsort(descending=True, stable=True) for column in (ours[:, 4], expected[:, 4])]
            official.assert_equal_to(ours[order[0]][:, :4], expected[order[1]][:, :4])
            official.assert_equal_to(ours[order[0]][:, 4], expected[order[1]][:, 4])
        if mode == "detr":
            assert torch.equal(found["labels"], recorded[f"detr_sorted.{name}.img{row}.labels"])
            official.assert_equal_to(rows, recorded[f"detr_sorted.{name}.img{row}.bboxes"])
