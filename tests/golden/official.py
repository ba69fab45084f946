"""The tiny official model that the recorded arrays come from, built of our parts.

`official_model` is a detector of ours for one of the families; `load_official` fills it through the converter.
Where the official code is at fault ours differs on purpose: `as_released` is the one place that switches those
differences back. `in_index_order` replaces random choices by the first ones, as the recording did.
"""

import json
from dataclasses import replace

import torch
from safetensors.torch import load_file
from torch import nn

from brs_detr.checkpoints.keys import to_ours
from brs_detr.losses.boxes import paired_giou_loss, paired_iou
from brs_detr.models import brs_detr as detector
from brs_detr.models import build as building
from brs_detr.models.backbones.norms import FrozenBatchNorm
from brs_detr.models.config import (
    BRSDETRConfig,
    BRSDINOConfig,
    CoDETRConfig,
    CoDINOConfig,
    DenoisingConfig,
    RoIConfig,
    RPNConfig,
)
from brs_detr.models.denoising import Noise, draw_noise
from brs_detr.ops.boxes import BoxCoder

CLASSES = 5
SIZE = dict(
    dim=64,
    encoder_layers=2,
    decoder_layers=2,
    ffn_dim=128,
    queries=20,
    detections_per_image=30,
)
BRS = BRSDETRConfig(**SIZE, rpn=RPNConfig(proposals_before_nms=4000, proposals=4000), roi=RoIConfig(fc_dim=64))
FOCAL = CoDETRConfig(**SIZE, roi=replace(CoDETRConfig.roi, fc_dim=64))
CO_DINO = CoDINOConfig(
    **SIZE,
    roi=replace(CoDINOConfig.roi, fc_dim=64),
    denoising=DenoisingConfig(queries=13, label_noise=0.5, box_noise=1.0),
)
BRS_DINO = BRSDINOConfig(
    **SIZE,
    rpn=BRS.rpn,
    roi=BRS.roi,
    denoising=replace(CO_DINO.denoising, loss="rank"),
)
FAMILIES = {"brs_detr": BRS, "co_detr": FOCAL}
SETTINGS = FAMILIES | {"co_dino": CO_DINO, "brs_dino": BRS_DINO}
CASES = {"normal": (1, 1), "empty1": (1, 0), "empty_both": (0, 0)}


class Block(nn.Module):
    """Basic residual block with frozen statistics."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = FrozenBatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = FrozenBatchNorm(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), FrozenBatchNorm(outputs))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return (shortcut + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class NarrowResNet(nn.Module):
    """ResNet-18 with 16 channels at the start, stem and first stage frozen: the recorded models' backbone.

    Args:
        levels: number of its last stages whose maps are returned.
    """

    def __init__(self, levels=3):
        super().__init__()
        self.channels, self.strides = (16, 32, 64, 128)[-levels:], (4, 8, 16, 32)[-levels:]
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), FrozenBatchNorm(16)
        widths = (16, 16, 32, 64, 128)
        for stage in range(1, 5):
            inputs, outputs = widths[stage - 1], widths[stage]
            blocks = Block(inputs, outputs, 1 if stage == 1 else 2), Block(outputs, outputs, 1)
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        for part in (self.conv1, self.layer1):
            part.requires_grad_(False)

    def forward(self, x):
        x = torch.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps[-len(self.strides) :]


def official_model(family, monkeypatch):
    """Our detector in the recorded model's size, random weights."""
    settings = SETTINGS[family]
    backbone = NarrowResNet(len(settings.backbone.levels))
    monkeypatch.setattr(building, "build_backbone", lambda *args, **kwargs: backbone)
    return building.build_model(settings, CLASSES)


def load_official(folder, family, monkeypatch):
    """Our detector with the official weights, every tensor of them used."""
    model = official_model(family, monkeypatch)
    ours, unknown = to_ours(load_file(folder / family / "state_dict.safetensors"))
    assert not unknown
    model.load_state_dict(ours)
    return model


def load_brs_dino(folder, monkeypatch):
    """BRS-DINO with Co-DINO's weights, but for the background column and the centerness that it does not have."""
    model = official_model("brs_dino", monkeypatch)
    ours, _ = to_ours(load_file(folder / "co_dino" / "state_dict.safetensors"))
    for name in ("roi.score.weight", "roi.score.bias"):
        ours[name] = ours[name][:CLASSES]
    model.load_state_dict({name: value for name, value in ours.items() if not name.startswith("atss.centerness")})
    return model


def layers_of(found):
    """The prediction sets of the layers that are given as one."""
    return [
        found._replace(
            logits=found.logits[i],
            labels=found.labels[i],
            quality=found.quality[i],
            box_losses={name: loss[i] for name, loss in found.box_losses.items()},
            rows=found.rows[i],
        )
        for i in range(len(found.logits))
    ]


class ReleasedObjective(nn.Module):
    """Our objective with the released code's fault that a positive of quality 0 counts as background in the ranking."""

    def __init__(self, ours):
        super().__init__()
        self.ours = ours

    def forward(self, predictions):
        if predictions.logits.ndim == 2:
            return self.one(predictions)
        terms = [self.one(own) for own in layers_of(predictions)]
        return {name: torch.stack([own[name] for own in terms]) for name in terms[0]}

    def one(self, predictions):
        """Layers differ in how many of their positives have a quality, so each is a call of its own."""
        rows, kept = predictions.rows, predictions.quality > 0
        labels = predictions.labels.index_fill(0, rows[~kept], predictions.logits.shape[1])
        ones = {name: value.mean().expand(int(kept.sum())) for name, value in predictions.box_losses.items()}
        quality = predictions.quality[kept]
        return self.ours(predictions._replace(labels=labels, quality=quality, box_losses=ones, rows=rows[kept]))


def as_released(model):
    """Switch our deliberate differences back to what the released rank-based code does."""
    for head in (model, model.rpn, model.roi, model.atss):
        head.objective = ReleasedObjective(head.objective)

    def around_a_unit_box(anchors, deltas, objects):
        # decoded with deviations that the coder does not have, around a box of side 1
        coder, unit = BoxCoder((0.1, 0.1, 0.2, 0.2)), torch.zeros_like(anchors)
        unit[:, 2:] = 1.0
        boxes = coder.decode(unit, deltas)
        targets = coder.decode(unit, model.rpn.coder.encode(anchors, objects))
        return paired_iou(boxes.detach(), targets), {"giou": paired_giou_loss(boxes, targets)}

    model.rpn.box_losses = around_a_unit_box
    model.rpn.drop_empty = False


def co_dino_as_released(model, arrays):
    """Switch our deliberate differences back to what the released Co-DINO does, and feed its denoising draws."""
    model.proposals.refuse_invalid = False
    model.denoising.ignore_missing = model.denoising.ignore_given = False
    model.denoising.draw = lambda count, num_classes, generator: recorded_noise(arrays, count)


def recorded_noise(arrays, count):
    """The recorded draws; only the replaced labels had one of their own."""
    if not count:
        return draw_noise(0, CLASSES)
    flip, labels = arrays["dn.rand_label_p"], torch.zeros(count, dtype=torch.int64)
    labels[flip < 0.5 * CO_DINO.denoising.label_noise] = arrays["dn.rand_new_label"].long()
    return Noise(flip, labels, arrays["dn.rand_sign"].float() * 2 - 1, arrays["dn.rand_part"])


def in_index_order(model, monkeypatch):
    """The recorded runs replaced every random permutation by index order."""

    def in_order(sampler):
        return sampler and replace(sampler, permute=lambda count, device: torch.arange(count, device=device))

    model.roi.sampler = in_order(model.roi.sampler)
    model.rpn.assigner = replace(model.rpn.assigner, sampler=in_order(model.rpn.assigner.sampler))
    ordered = detector.select_queries

    def select(*args, **kwargs):
        return ordered(*args, **kwargs, priority=lambda n: torch.linspace(0, 0.99, n, dtype=torch.float64))

    monkeypatch.setattr(detector, "select_queries", select)


def recorded_case(folder, family, case):
    """Arrays of one training batch, the images' sizes and our targets."""
    arrays = load_file(folder / family / "train_normal.safetensors")
    if case != "normal":
        arrays |= load_file(folder / family / f"train_{case}.safetensors")
    targets = [
        {
            "boxes": arrays[f"gt_bboxes.{b}"] if present else torch.zeros(0, 4),
            "labels": arrays[f"gt_labels.{b}"].long() if present else torch.zeros(0, dtype=torch.int64),
        }
        for b, present in enumerate(CASES[case])
    ]
    return arrays, image_sizes(folder / family)[0], targets


def image_sizes(folder):
    """(h, w) of the recorded images as resized and as stored."""
    metas = json.loads((folder / "img_metas.json").read_text())
    return tuple([tuple(meta[key][:2]) for meta in metas] for key in ("img_shape", "ori_shape"))


def padding(sizes, shape=(128, 160)):
    """(B, H, W) mask of a padded batch."""
    mask = torch.ones(len(sizes), *shape, dtype=torch.bool)
    for row, (h, w) in zip(mask, sizes):
        row[:h, :w] = False
    return mask


OUR_NAMES = {"bbox": "l1", "iou": "giou", "cls": "cls", "rank": "rank", "sort": "sort", "centerness": "centerness"}


def named_terms(losses, layers=2):
    """Official loss dict -> our names, per-level lists summed."""
    terms = {}
    for name, value in losses.items():
        parts = name.removeprefix("loss.").split(".")
        layer = int(parts.pop(0)[1:]) if parts[0].startswith("d") and parts[0][1:].isdigit() else layers - 1
        key = parts[0]
        if key.startswith("acc"):
            continue
        if key.startswith("dn_loss_"):
            ours = f"denoising.{layer}.{OUR_NAMES[key.removeprefix('dn_loss_')]}"
        elif key.startswith("enc_loss_"):
            ours = "encoder." + OUR_NAMES[key.removeprefix("enc_loss_")]
        elif key.startswith("loss_rpn_"):
            ours = "rpn." + key.removeprefix("loss_rpn_")
        elif key.startswith("loss_roi_"):
            ours = "roi." + key.removeprefix("loss_roi_")[:-1].replace("bbox", "giou")
        elif "_aux" in key:
            term, head = key.removeprefix("loss_").split("_aux")
            ours = f"aux_{('roi', 'atss')[int(head)]}.{layer}.{OUR_NAMES[term]}"
        elif key[-1] in "01":
            ours = f"{('roi', 'atss')[int(key[-1])]}." + key.removeprefix("loss_")[:-1].replace("bbox", "giou")
        else:
            ours = f"decoder.{layer}.{OUR_NAMES[key.removeprefix('loss_')]}"
        terms[ours] = terms.get(ours, 0) + value.sum()
    return terms


def assert_equal_to(ours, recorded, tolerance=1e-5, where=None):
    """Largest difference within `tolerance` of the largest recorded number, optionally only `where` a mask is true."""
    ours, recorded = ours.detach(), recorded.to(ours.dtype)
    assert ours.shape == recorded.shape
    if where is not None:
        ours, recorded = ours[where], recorded[where]
    if ours.numel():
        error = float((ours - recorded).abs().max() / recorded.abs().max().clamp(min=1e-12))
        assert error <= tolerance, f"relative difference {error:.1e}"
