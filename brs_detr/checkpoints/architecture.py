"""Which detector an official checkpoint holds, read off the names and shapes of its tensors.

What leaves no trace in the tensors is taken from the released recipes: eight attention heads, GroupNorm with 32 groups,
the Bucketed Rank & Sort loss where the RoI classifier has no background column.

Names and category ids of the classes of an official checkpoint, which stores names at best.

The official code numbers classes in the order of the dataset's json, whatever the order of the names it stores. A
weights file lists ids beside names, so that order is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from brs_detr.checkpoints.keys import decoder_layers
from brs_detr.engine.checkpoint import CheckpointError
from brs_detr.parsing import TwoValuesError, dict_of_pairs
from brs_detr.user_files import UserFileError, read_file

HEADS = 8
RPN_ANCHORS = 9
LARGE_QUERIES = 900

OTHER_VARIANTS: tuple[tuple[str, str], ...] = (
    (r"decoder\.classifiers\.", "a detector of this project already, whose .safetensors eval.py and train.py read"),
    (r"query_head\.(label_embedding|dn_generator)\.", "Co-DINO (it has denoising queries)"),
    (r"query_head\.transformer\.(query_embed|decoder\.ref_point_head)\.", "Co-DINO"),
    (r"query_head\.transformer\.reference_points\.", "a one-stage Co-Deformable-DETR, without encoder proposals"),
    (r"roi_head\.\d+\.mask_head\.", "Co-DETR with a mask head"),
    (r"(roi_head|bbox_head)\.1\.", "Co-DETR with more than two auxiliary heads"),
    (r"backbone\.(blocks\.|pos_embed)", "a detector on a plain ViT"),
    (r"backbone\.stages\.", "a detector on MMDetection's own Swin, whose parameters are ordered otherwise"),
)
"""Names that give another architecture away, and what to call it; the first that fits speaks."""

OTHER_DETECTORS: tuple[tuple[str, str], ...] = (
    (r"bbox_head\.transformer\.", "a DETR of MMDetection (Deformable DETR, DINO, ...)"),
    (r"(transformer|class_embed|decoder|encoder)\.", "a DETR from another code base"),
    (r"roi_head\.", "a two-stage detector"),
    (r"bbox_head\.", "a one-stage detector"),
)
"""The same for files without Co-DETR's query head."""

RESNETS = {6: "resnet50.tv_in1k", 23: "resnet101.tv_in1k"}
"""Bottleneck ResNets by the number of blocks in their third stage."""

SWINS = {
    (96, 6, 7): ("swin_tiny_patch4_window7_224.ms_in1k", 0.2),
    (96, 18, 7): ("swin_small_patch4_window7_224.ms_in1k", 0.2),
    (128, 18, 7): ("swin_base_patch4_window7_224.ms_in22k", 0.2),
    (128, 18, 12): ("swin_base_patch4_window12_384.ms_in22k", 0.2),
    (192, 18, 7): ("swin_large_patch4_window7_224.ms_in22k", 0.3),
    (192, 18, 12): ("swin_large_patch4_window12_384.ms_in22k", 0.3),
}
"""Swins by width, blocks in the third stage, and window: timm's name, and the drop path of the 12-epoch recipe."""


@dataclass(frozen=True)
class Architecture:
    """What the tensors of a Co-Deformable-DETR say about it.

    Attributes:
        backbone: timm's name; drop_path: of its training recipe.
        dim, levels, points, encoder_layers, decoder_layers, ffn_dim, queries: of the transformer.
        num_classes: K.
        softmax: the RoI head has a background column (Co-DETR), else sigmoids (BRS-DETR).
        centerness: the ATSS head has that branch.
        fc_dim: width of the RoI head; stacked_convs: depth of the ATSS towers.
    """

    backbone: str
    drop_path: float
    dim: int
    levels: int
    points: int
    encoder_layers: int
    decoder_layers: int
    ffn_dim: int
    queries: int
    num_classes: int
    softmax: bool
    centerness: bool
    fc_dim: int
    stacked_convs: int

    def __str__(self) -> str:
        family = "Co-Deformable-DETR" if self.softmax else "BRS-DETR"
        return (
            f"{family}, backbone {self.backbone.partition('.')[0]}, {self.encoder_layers} + {self.decoder_layers} "
            f"layers of {self.dim}, {self.queries} queries, {self.num_classes} classes, "
            f"RoI head with {'softmax' if self.softmax else 'sigmoids'}, ATSS head "
            f"{'with' if self.centerness else 'without'} centerness"
        )


def recognize(tensors: Mapping[str, Tensor], source: str) -> Architecture:
    """The architecture of an official state dict.

    Args:
        tensors: official names without a `module.` prefix.
        source: the file, for messages.

    Raises:
        CheckpointError: another architecture, or a Co-Deformable-DETR of which tensors are missing.
    """
    refuse_others(tensors, source)

    def size(name: str, axis: int = 0) -> int:
        if name not in tensors:
            raise CheckpointError(
                f"{source}: the tensor {name} is missing; convert a file that holds the whole detector"
            )
        return tensors[name].shape[axis]

    transformer, roi = "query_head.transformer.", "roi_head.0.bbox_head."
    backbone, drop_path = backbone_of(tensors, source)
    levels, layers = size(transformer + "level_embeds"), decoder_layers(tensors)
    classes, columns = size("query_head.cls_branches.0.weight"), size(roi + "fc_cls.weight")
    softmax, centerness = columns == classes + 1, "bbox_head.0.atss_centerness.weight" in tensors
    if columns not in (classes, classes + 1) or (centerness and not softmax):
        raise CheckpointError(
            f"{source}: a RoI head of {columns} columns {'with' if centerness else 'without'} centerness beside "
            f"{classes} classes is neither Co-DETR's nor BRS-DETR's"
        )
    points, rest = divmod(size(transformer + "encoder.layers.0.attentions.0.attention_weights.bias"), HEADS * levels)
    if rest or size("rpn_head.rpn_cls.bias") != RPN_ANCHORS:
        raise CheckpointError(f"{source}: its attention or its anchors are not those of the released models")
    return Architecture(
        backbone=backbone,
        drop_path=drop_path,
        dim=size(transformer + "level_embeds", 1),
        levels=levels,
        points=points,
        encoder_layers=_count(r"query_head\.transformer\.encoder\.layers\.(\d+)\.", tensors),
        decoder_layers=layers,
        ffn_dim=size(transformer + "encoder.layers.0.ffns.0.layers.0.0.bias"),
        queries=size("query_head.query_embedding.weight"),
        num_classes=classes,
        softmax=softmax,
        centerness=centerness,
        fc_dim=size(roi + "shared_fcs.0.bias"),
        stacked_convs=_count(r"bbox_head\.0\.cls_convs\.(\d+)\.", tensors),
    )


def refuse_others(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise a `CheckpointError` that names the architecture, unless this is a Co-Deformable-DETR."""
    ours = any(name.startswith("query_head.transformer.") for name in tensors)
    for pattern, meaning in OTHER_VARIANTS if ours else OTHER_VARIANTS + OTHER_DETECTORS:
        if any(re.match(pattern, name) for name in tensors):
            raise CheckpointError(f"{source}: this is {meaning}; only Co-Deformable-DETR and BRS-DETR can be converted")
    if not ours:
        some = ", ".join(list(tensors)[:3])
        raise CheckpointError(
            f"{source}: no Co-Deformable-DETR or BRS-DETR (its {len(tensors)} tensors are called {some}, ...)"
        )


def backbone_of(tensors: Mapping[str, Tensor], source: str) -> tuple[str, float]:
    """timm's name of the backbone and its drop path.

    Raises:
        CheckpointError: neither a ResNet nor a Swin of the released models.
    """
    if "backbone.patch_embed.proj.weight" in tensors:
        table = tensors.get("backbone.layers.0.blocks.0.attn.relative_position_bias_table")
        window = 0 if table is None else (round(table.shape[0] ** 0.5) + 1) // 2
        blocks = _count(r"backbone\.layers\.2\.blocks\.(\d+)\.", tensors)
        kind = (tensors["backbone.patch_embed.proj.weight"].shape[0], blocks, window)
        if kind in SWINS:
            return SWINS[kind]
        what = f"a Swin of width {kind[0]} with {kind[1]} blocks in its third stage and windows of {kind[2]}"
    else:
        blocks = _count(r"backbone\.layer3\.(\d+)\.conv3\.weight", tensors)
        if blocks in RESNETS:
            return RESNETS[blocks], 0.0
        names = [name for name in tensors if name.startswith("backbone.")]
        what = f"one of {len(names)} tensors ({', '.join(names[:2]) or 'none'}, ...)"
    raise CheckpointError(
        f"{source}: the backbone is {what}; known are ResNet-50 and 101 and Swin-T, S, B and L as released"
    )


def settings_of(found: Architecture) -> dict[str, Any]:
    """The recipe of an architecture, as `config.from_dict` reads it: what differs from the R50 BRS-DETR defaults."""
    swin = found.backbone.startswith("swin")
    model = {name: getattr(found, name) for name in ("dim", "levels", "points", "encoder_layers", "decoder_layers")}
    model |= {
        "ffn_dim": found.ffn_dim,
        "queries": found.queries,
        "heads": HEADS,
        "detections_per_image": 300 if found.queries >= LARGE_QUERIES else 100,
        "backbone": {
            "name": found.backbone,
            "drop_path": found.drop_path,
            "frozen_stages": 0 if swin else 1,
        },
        "roi": {"fc_dim": found.fc_dim},
        "atss": {"centerness": found.centerness, "stacked_convs": found.stacked_convs},
    }
    train = {}
    if found.softmax:
        model |= {"name": "co_detr", "loss": "focal", "matcher": {"cls": 2.0}}
        model["rpn"] = {"sample": 256, "proposals": 1000}
        model["roi"] |= {"sample": 512, "add_ground_truth": True}
        train = {"lr_steps": [11], "lr_gamma": 0.1}
    # the released weights saw images that were shrunk without a low-pass filter
    return {
        "data": {"antialias": False},
        "model": model,
        "optim": {"weight_decay": 0.05 if swin else 1e-4},
        "train": train,
    }


def _count(pattern: str, names: Iterable[str]) -> int:
    """How many different numbers the group of `pattern` takes."""
    return len({found.group(1) for name in names if (found := re.match(pattern, name))})


COCO_NAMES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)
_NEVER_USED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = tuple(number for number in range(1, 91) if number not in _NEVER_USED)


@dataclass(frozen=True)
class Classes:
    """The classes of a checkpoint.

    Attributes:
        names: of label 0, 1, ...
        ids: category id of label 0, 1, ...
        remark: where the names and ids come from.
    """

    names: list[str]
    ids: list[int]
    remark: str


def name_classes(count: int, meta: Mapping[str, Any], json_path: Path | None, source: str) -> Classes:
    """Names and ids for `count` classes: from a json, else the checkpoint's notes, else COCO's for 80.

    Args:
        count: K of the checkpoint.
        meta: MMCV's notes.
        json_path: annotations in COCO's format whose `categories` the checkpoint was trained on.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: the classes cannot be named, or the json names another number of them.
    """
    stored = stored_names(meta)
    if json_path is not None:
        return _from_json(count, stored, json_path, source)
    if stored and len(stored) != count:
        raise CheckpointError(
            f"{source}: has {count} classes but names {len(stored)}; give the json that it was trained on with "
            "--num-classes-from FILE"
        )
    if tuple(stored) == COCO_NAMES or (not stored and count == len(COCO_NAMES)):
        remark = "COCO's names and category ids" + ("" if stored else ", assumed since there are 80 classes")
        return Classes(list(COCO_NAMES), list(COCO_IDS), remark)
    if stored:
        ids = list(range(1, count + 1))
        remark = "names from the checkpoint, category ids 1, 2, ... assumed (--num-classes-from FILE states them)"
        return Classes(list(stored), ids, remark)
    raise CheckpointError(
        f"{source}: has {count} classes without names; give the json in COCO's format that it was trained on with "
        "--num-classes-from FILE"
    )


def stored_names(meta: Mapping[str, Any]) -> list[str]:
    """Class names in MMCV's or MMEngine's notes; empty where there are none."""
    notes = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), Mapping) else meta
    names = next((notes[key] for key in ("CLASSES", "classes") if notes.get(key)), ())
    return [names] if isinstance(names, str) else [str(name) for name in names]


def _from_json(count: int, stored: Sequence[str], path: Path, source: str) -> Classes:
    try:
        content = read_file(path).decode("utf-8-sig")
        categories = json.loads(content, object_pairs_hook=dict_of_pairs)["categories"]
        pairs = [(int(entry["id"]), str(entry["name"])) for entry in categories]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (UserFileError, TwoValuesError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(f"{path}: no json in COCO's format with `categories` of id and name") from None
    if stored and {name for _, name in pairs} > set(stored):
        pairs = [pair for pair in pairs if pair[1] in stored]
    if len(pairs) != count:
        raise CheckpointError(f"{source}: has {count} classes, but {path} names {len(pairs)}; give the json it knows")
    ids, names = (list(column) for column in zip(*pairs))
    return Classes(names, ids, f"names and category ids from {path}")
