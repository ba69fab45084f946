"""Infer the architecture and the classes of an official checkpoint from the names and shapes of its tensors.

An official checkpoint stores the names of its classes at best. The official code numbers classes in the order of the
dataset's json, whatever the order of the names it stores. A weights file lists ids with the names, so that order is
kept.
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
from brs_detr.exit_codes import CheckpointError
from brs_detr.parsing import TwoValuesError, dict_of_pairs
from brs_detr.user_files import UserFileError, read_file

HEADS = 8
RPN_ANCHORS = 9

DINO_PARTS = ("query_head.transformer.query_embed.", "query_head.transformer.decoder.ref_point_head.")
"""Beginnings of names that only Co-DINO has."""

LABEL_TABLES = ("query_head.label_embedding.weight", "query_head.dn_generator.label_embedding.weight")
"""The table of the denoising queries' classes; in files that MMDetection 3 has trained it is the second."""

PLAIN_VIT = "a detector on a plain ViT"
EVA_PART = "backbone.blocks.0.mlp.ffn_ln.weight"
"""A tensor that EVA-02 has, and no plain ViT."""

OTHER_VARIANTS: tuple[tuple[str, str], ...] = (
    (r"decoder\.classifiers\.", "a detector of this project already, whose .safetensors eval.py and train.py read"),
    (r"query_head\.transformer\.reference_points\.", "a one-stage Co-Deformable-DETR, without encoder proposals"),
    (r"mask_iou_head\.", "Co-DINO on a ViT with instance masks"),
    (r"roi_head\.\d+\.mask_head\.", "Co-DETR with a mask head"),
    (r"(roi_head|bbox_head)\.1\.", "Co-DETR with more than two auxiliary heads"),
    (r"backbone\.(blocks\.|pos_embed)", PLAIN_VIT),
)
"""Patterns of tensor names that identify another architecture, and its description; the first match counts."""

OTHER_DETECTORS: tuple[tuple[str, str], ...] = (
    (r"bbox_head\.transformer\.", "a DETR of MMDetection (Deformable DETR, DINO, ...)"),
    (r"(transformer|class_embed|decoder|encoder)\.", "a DETR from another code base"),
    (r"roi_head\.", "a two-stage detector"),
    (r"bbox_head\.", "a one-stage detector"),
)
"""The same for checkpoints without Co-DETR's query head."""

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

EVAS = {(1024, 24, 1025): ("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", 0.4)}
"""EVA-02s by width, blocks, and learned positions: the same."""

FAMILIES = {
    (False, False): "BRS-DETR",
    (False, True): "Co-Deformable-DETR",
    (True, False): "BRS-DINO",
    (True, True): "Co-DINO",
}
"""Names by whether it is DINO's decoder, and whether the RoI head has a softmax."""


@dataclass(frozen=True)
class Architecture:
    """Architecture of a Co-Deformable-DETR or a Co-DINO.

    Attributes:
        backbone: timm's name.
        drop_path: drop path rate of the 12-epoch training config.
        dim, levels, points, encoder_layers, decoder_layers, ffn_dim, queries: of the transformer.
        num_classes: K.
        softmax: True if the RoI head has a background column (Co-DETR), False for sigmoids (BRS-DETR).
        centerness: True if the ATSS head has a centerness branch.
        fc_dim: width of the RoI head.
        stacked_convs: depth of the ATSS towers.
        dino: True for Co-DINO.
        denoising: True if it is Co-DINO trained with denoising queries.
        windows: of an EVA-02, cells a side, and of how many blocks the last one has none; None for other backbones.
        roi_convs: convolutions of the RoI head.
        class_agnostic: True if the RoI head has one box for all classes.
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
    dino: bool
    denoising: bool
    windows: tuple[int, int] | None = None
    roi_convs: int = 0
    class_agnostic: bool = False

    @property
    def family(self) -> str:
        """Return the name of the detector."""
        return FAMILIES[self.dino, self.softmax]

    def __str__(self) -> str:
        without = " without denoising" if self.dino and not self.denoising else ""
        return (
            f"{self.family}{without}, backbone {self.backbone.partition('.')[0]}, "
            f"{self.encoder_layers} + {self.decoder_layers} layers of {self.dim}, "
            f"{self.queries} queries, {self.num_classes} classes, "
            f"RoI head with {'softmax' if self.softmax else 'sigmoids'}, ATSS head "
            f"{'with' if self.centerness else 'without'} centerness"
        )


def recognize(tensors: Mapping[str, Tensor], source: str) -> Architecture:
    """Infer the architecture of an official state dict.

    Args:
        tensors: tensors by official name without a `module.` prefix.
        source: path of the file, for messages.

    Raises:
        CheckpointError: the architecture is another one, or tensors are missing.
    """
    refuse_others(tensors, source)

    def size(name: str, axis: int = 0) -> int:
        if name not in tensors:
            raise CheckpointError(
                f"{source}: the tensor {name} is missing. Convert a file that contains the complete detector."
            )
        return tensors[name].shape[axis]

    transformer, roi = "query_head.transformer.", "roi_head.0.bbox_head."
    dino = any(name.startswith(DINO_PARTS) for name in tensors)
    backbone, drop_path = backbone_of(tensors, source)
    levels, layers = size(transformer + "level_embeds"), decoder_layers(tensors)
    classes, columns = size("query_head.cls_branches.0.weight"), size(roi + "fc_cls.weight")
    # softmax has a background column; of the two models only Co-DETR's, with softmax, has a centerness branch
    softmax, centerness = columns == classes + 1, "bbox_head.0.atss_centerness.weight" in tensors
    if columns not in (classes, classes + 1) or (centerness and not softmax):
        raise CheckpointError(
            f"{source}: a RoI head of {columns} columns {'with' if centerness else 'without'} centerness beside "
            f"{classes} classes is neither Co-DETR's nor BRS-DETR's"
        )
    points, rest = divmod(size(transformer + "encoder.layers.0.attentions.0.attention_weights.bias"), HEADS * levels)
    if rest or size("rpn_head.rpn_cls.bias") != RPN_ANCHORS:
        raise CheckpointError(f"{source}: its attention or its anchors differ from those of the released models")
    return Architecture(
        backbone=backbone,
        drop_path=drop_path,
        dim=size(transformer + "level_embeds", 1),
        levels=levels,
        points=points,
        encoder_layers=_count(r"query_head\.transformer\.encoder\.layers\.(\d+)\.", tensors),
        decoder_layers=layers,
        ffn_dim=size(transformer + "encoder.layers.0.ffns.0.layers.0.0.bias"),
        queries=size(transformer + "query_embed.weight" if dino else "query_head.query_embedding.weight"),
        num_classes=classes,
        softmax=softmax,
        centerness=centerness,
        fc_dim=size(roi + "shared_fcs.0.bias"),
        stacked_convs=_count(r"bbox_head\.0\.cls_convs\.(\d+)\.", tensors),
        dino=dino,
        denoising=dino and any(name in tensors for name in LABEL_TABLES),
        windows=windows_of(tensors) if EVA_PART in tensors else None,
        roi_convs=_count(r"roi_head\.0\.bbox_head\.shared_convs\.(\d+)\.", tensors),
        class_agnostic=classes > 1 and size(roi + "fc_reg.weight") == 4,
    )


def refuse_others(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse other architectures than Co-Deformable-DETR and Co-DINO.

    Raises:
        CheckpointError: the message names the architecture.
    """
    ours = any(name.startswith("query_head.transformer.") for name in tensors)
    for pattern, meaning in OTHER_VARIANTS if ours else OTHER_VARIANTS + OTHER_DETECTORS:
        if meaning == PLAIN_VIT and EVA_PART in tensors:
            continue
        if any(re.match(pattern, name) for name in tensors):
            raise CheckpointError(
                f"{source}: this is {meaning}; only Co-Deformable-DETR, Co-DINO and BRS-DETR, on a ResNet, Swin or "
                "EVA-02 and without masks, can be converted"
            )
    if not ours:
        some = ", ".join(list(tensors)[:3])
        raise CheckpointError(
            f"{source}: not a Co-Deformable-DETR, Co-DINO or BRS-DETR (its {len(tensors)} tensors are named {some}, "
            "...)"
        )


def backbone_of(tensors: Mapping[str, Tensor], source: str) -> tuple[str, float]:
    """Return timm's name of the backbone and its drop path rate.

    Raises:
        CheckpointError: the backbone is not one of the released models.
    """
    if EVA_PART in tensors and "backbone.pos_embed" in tensors:
        count, width = tensors["backbone.pos_embed"].shape[-2:]
        blocks = _count(r"backbone\.blocks\.(\d+)\.", tensors)
        if (width, blocks, count) in EVAS:
            return EVAS[width, blocks, count]
        what = f"an EVA-02 of width {width} with {blocks} blocks and {count} positions"
    elif "backbone.patch_embed.proj.weight" in tensors:
        table = tensors.get("backbone.layers.0.blocks.0.attn.relative_position_bias_table")
        window = 0 if table is None else (round(table.shape[0] ** 0.5) + 1) // 2  # the table has (2 w - 1)^2 rows
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
        what = f"one of {len(names)} tensors ({', '.join(names[:2])}, ...)" if names else "missing"
    raise CheckpointError(
        f"{source}: the backbone is {what}. Supported are the released ResNet-50 and 101, Swin-T, S, B and L, and "
        "ViT-L."
    )


def windows_of(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the side of an EVA-02's windows in cells, and of how many blocks the last one has none.

    Both follow from the tables of the blocks' rotations, which have a row for each cell of a window. A block without a
    window has a larger table, or none. Files without any table are taken for that of COCO.
    """
    tables = {name: value.shape[0] for name, value in tensors.items() if name.endswith(".attn.rope.freqs_cos")}
    rows = tables.get("backbone.blocks.0.attn.rope.freqs_cos")
    if rows is None:
        return 24, 4
    every = 1
    while tables.get(f"backbone.blocks.{every - 1}.attn.rope.freqs_cos") == rows:
        every += 1
    return round(rows**0.5), every


def _count(pattern: str, names: Iterable[str]) -> int:
    """Count the distinct numbers matched by the group of `pattern`."""
    return len({match.group(1) for name in names if (match := re.match(pattern, name))})


COCO_NAMES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)
_UNUSED_COCO_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # categories of COCO's paper without annotations
COCO_IDS = tuple(number for number in range(1, 91) if number not in _UNUSED_COCO_IDS)


@dataclass(frozen=True)
class Classes:
    """The classes of a checkpoint.

    Attributes:
        names: of label 0, 1, ...
        ids: category id of label 0, 1, ...
        remark: source of the names and ids.
    """

    names: list[str]
    ids: list[int]
    remark: str


def name_classes(
    count: int, meta: Mapping[str, Any], json_path: Path | None, source: str, *, required: bool = True
) -> Classes:
    """Return names and ids of `count` classes: from a json, else from the checkpoint's metadata, else COCO's for 80.

    Args:
        count: number of classes of the checkpoint.
        meta: metadata of MMCV.
        json_path: annotations in COCO's format with the `categories` that the checkpoint was trained on.
        source: path of the checkpoint, for messages.
        required: refuse classes without names; False: give them names that no others have.

    Raises:
        CheckpointError: the names are unknown, or the json has another number of classes.
    """
    stored = stored_names(meta)
    if json_path is not None:
        return _from_json(count, stored, json_path, source)
    if stored and len(stored) != count:
        raise CheckpointError(
            f"{source}: has {count} classes but names {len(stored)}. Give the json that it was trained on with "
            "--num-classes-from FILE."
        )
    if tuple(stored) == COCO_NAMES or (not stored and count == len(COCO_NAMES)):
        remark = "COCO's names and category ids" + ("" if stored else ", assumed since there are 80 classes")
        return Classes(list(COCO_NAMES), list(COCO_IDS), remark)
    if stored:
        ids = list(range(1, count + 1))
        remark = "names from the checkpoint, category ids 1, 2, ... assumed (--num-classes-from FILE states them)"
        return Classes(list(stored), ids, remark)
    if not required:
        return Classes([f"{source}: {label}" for label in range(count)], list(range(1, count + 1)), "without names")
    raise CheckpointError(
        f"{source}: has {count} classes without names. Give the json in COCO's format that it was trained on with "
        "`brs-detr convert --num-classes-from FILE`."
    )


def stored_names(meta: Mapping[str, Any]) -> list[str]:
    """Return the class names in MMCV's or MMEngine's metadata; [] if it has no names."""
    dataset_meta = meta.get("dataset_meta")
    meta = dataset_meta if isinstance(dataset_meta, Mapping) else meta
    names = next((meta[key] for key in ("CLASSES", "classes") if meta.get(key)), ())
    return [names] if isinstance(names, str) else [str(name) for name in names]


def _from_json(count: int, stored: Sequence[str], path: Path, source: str) -> Classes:
    """Read names and ids from a json, in its order; categories that the checkpoint does not name are ignored."""
    try:
        content = read_file(path).decode("utf-8-sig")
        categories = json.loads(content, object_pairs_hook=dict_of_pairs)["categories"]
        pairs = [(int(entry["id"]), str(entry["name"])) for entry in categories]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (UserFileError, TwoValuesError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(f"{path}: not a json in COCO's format with `categories` of id and name.") from None
    if stored and {name for _, name in pairs} > set(stored):
        pairs = [pair for pair in pairs if pair[1] in stored]
    if len(pairs) != count:
        raise CheckpointError(
            f"{source}: has {count} classes, but {path} names {len(pairs)}. Give the json that it was trained on."
        )
    ids, names = [key for key, _ in pairs], [name for _, name in pairs]
    return Classes(names, ids, f"names and category ids from {path}")
