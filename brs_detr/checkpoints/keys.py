"""Map the official Co-DETR / Co-DINO / BRS-DETR parameter names to ours, and back, by one table.

Each rule is a pattern of the official name and our name; `{k}` stands for a number, `{next}` for that number plus 1,
and `{aux}` for the dense head of an auxiliary index. Names of ResNets and all other names of a Swin are equal on both
sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from brs_detr.models.backbones.vit import BLOCK_NAMES
from brs_detr.models.config import BackboneConfig

AUX = ("roi", "atss")

# of ViT-L, which is EVA-02 with a neck that is a part of the backbone here
VIT_RULES: tuple[tuple[str, str], ...] = (
    *((f"backbone.blocks.{{k}}.{theirs}", f"backbone.blocks.{{k}}.{ours}") for theirs, ours in BLOCK_NAMES.items()),
    ("neck.p{k}.", "backbone.pyramid.p{k}."),
    ("roi_head.0.bbox_head.shared_convs.{k}.conv.", "roi.tower.{k}.0."),
    ("roi_head.0.bbox_head.shared_convs.{k}.gn.", "roi.tower.{k}.1."),
)

# the first matching rule applies in both directions, so special cases come before general ones
RULES: tuple[tuple[str, str], ...] = (
    *VIT_RULES,
    # the original Swin merges patches at the end of a stage, timm's at the start of the next
    ("backbone.layers.{k}.downsample.", "backbone.layers.{next}.downsample."),
    ("backbone.", "backbone."),
    ("neck.convs.{k}.conv.", "neck.projections.{k}.conv."),
    ("neck.convs.{k}.gn.", "neck.projections.{k}.norm."),
    ("neck.extra_convs.{k}.conv.", "neck.extra.{k}.conv."),
    ("neck.extra_convs.{k}.gn.", "neck.extra.{k}.norm."),
    ("query_head.transformer.level_embeds", "encoder.level_embed"),
    ("query_head.transformer.encoder.layers.{k}.attentions.0.", "encoder.layers.{k}.attention."),
    ("query_head.transformer.encoder.layers.{k}.norms.0.", "encoder.layers.{k}.attention_norm."),
    ("query_head.transformer.encoder.layers.{k}.norms.1.", "encoder.layers.{k}.ffn_norm."),
    ("query_head.transformer.decoder.layers.{k}.attentions.0.attn.", "decoder.layers.{k}.self_attention."),
    ("query_head.transformer.decoder.layers.{k}.attentions.1.", "decoder.layers.{k}.cross_attention."),
    ("query_head.transformer.decoder.layers.{k}.norms.0.", "decoder.layers.{k}.self_norm."),
    ("query_head.transformer.decoder.layers.{k}.norms.1.", "decoder.layers.{k}.cross_norm."),
    ("query_head.transformer.decoder.layers.{k}.norms.2.", "decoder.layers.{k}.ffn_norm."),
    ("query_head.transformer.encoder.layers.{k}.ffns.0.layers.0.0.", "encoder.layers.{k}.ffn.expand."),
    ("query_head.transformer.encoder.layers.{k}.ffns.0.layers.1.", "encoder.layers.{k}.ffn.contract."),
    ("query_head.transformer.decoder.layers.{k}.ffns.0.layers.0.0.", "decoder.layers.{k}.ffn.expand."),
    ("query_head.transformer.decoder.layers.{k}.ffns.0.layers.1.", "decoder.layers.{k}.ffn.contract."),
    ("query_head.transformer.enc_output.", "proposals.projection."),
    ("query_head.transformer.enc_output_norm.", "proposals.norm."),
    ("query_head.transformer.pos_trans.", "box_embedding.projection."),
    ("query_head.transformer.pos_trans_norm.", "box_embedding.norm."),
    ("query_head.transformer.aux_pos_trans.{k}.", "aux_embeddings.{aux}.box_embedding.projection."),
    ("query_head.transformer.aux_pos_trans_norm.{k}.", "aux_embeddings.{aux}.box_embedding.norm."),
    ("query_head.transformer.pos_feats_trans.{k}.", "aux_embeddings.{aux}.feature_projection."),
    ("query_head.transformer.pos_feats_norm.{k}.", "aux_embeddings.{aux}.feature_norm."),
    ("query_head.downsample.{k}.", "coarsest.{k}."),
    # the branch after the last one of the decoder belongs to the encoder proposals: see ENCODER_BRANCHES
    ("query_head.cls_branches.{k}.", "decoder.classifiers.{k}."),
    ("query_head.reg_branches.{k}.", "decoder.regressors.{k}."),
    ("query_head.query_embedding.", "query_content."),
    ("rpn_head.rpn_conv.", "rpn.conv."),
    ("rpn_head.rpn_cls.", "rpn.score."),
    ("rpn_head.rpn_reg.", "rpn.delta."),
    ("roi_head.0.bbox_head.shared_fcs.0.", "roi.fc1."),
    ("roi_head.0.bbox_head.shared_fcs.1.", "roi.fc2."),
    ("roi_head.0.bbox_head.fc_cls.", "roi.score."),
    ("roi_head.0.bbox_head.fc_reg.", "roi.delta."),
    ("bbox_head.0.cls_convs.{k}.conv.", "atss.class_tower.{k}.0."),
    ("bbox_head.0.cls_convs.{k}.gn.", "atss.class_tower.{k}.1."),
    ("bbox_head.0.reg_convs.{k}.conv.", "atss.box_tower.{k}.0."),
    ("bbox_head.0.reg_convs.{k}.gn.", "atss.box_tower.{k}.1."),
    ("bbox_head.0.atss_cls.", "atss.score."),
    ("bbox_head.0.atss_reg.", "atss.delta."),
    ("bbox_head.0.atss_centerness.", "atss.centerness."),
    ("bbox_head.0.scales.{k}.scale", "atss.scales.{k}"),
)

# those of Co-DINO, which come before the others in both directions
DINO_RULES: tuple[tuple[str, str], ...] = (
    ("query_head.transformer.query_embed.", "query_content."),
    ("query_head.transformer.decoder.ref_point_head.0.", "decoder.position.first."),
    ("query_head.transformer.decoder.ref_point_head.2.", "decoder.position.second."),
    ("query_head.transformer.decoder.norm.", "decoder.norm."),
    ("query_head.label_embedding.", "denoising.label_embedding."),
    # of MMDetection 3; the way back writes the name before, which both code bases can read
    ("query_head.dn_generator.label_embedding.", "denoising.label_embedding."),
)

ENCODER_BRANCHES = {"decoder.classifiers": "proposals.classifier", "decoder.regressors": "proposals.regressor"}

HEAD_OFFSETS = "query_head.transformer.head_pos_embed.weight"
"""One (2, 1) table in the official files, one scalar per auxiliary embedding in ours."""

DROPPED: tuple[tuple[str, str], ...] = (
    (r"\.num_batches_tracked$", "a count of batches that frozen normalization does not use"),
    (r"^backbone\.layers\..*\.relative_position_index$", "follows from the window size"),
    (r"\.loss_cls\.fed_loss_weight$", "how frequent LVIS's classes are, for a loss in training"),
    (r"^ema_", "a moving average of the weights; the weights themselves are converted"),
    (r"^backbone\..*\brope(_win|_glb)?\.freqs_", "follows from the sizes of windows and maps"),
)
"""Patterns of official tensors without a counterpart here, and why they are dropped."""


def _pattern(rule: str) -> re.Pattern[str]:
    """Compile a rule to a regular expression with one group at most."""
    escaped = re.escape(rule)
    for name in ("{k}", "{next}"):
        escaped = escaped.replace(re.escape(name), r"(\d+)")
    return re.compile(escaped.replace(re.escape("{aux}"), f"({'|'.join(AUX)})"))


MMDETECTION_SWIN: tuple[tuple[str, str], ...] = (
    ("backbone.patch_embed.projection.", "backbone.patch_embed.proj."),
    ("backbone.stages.", "backbone.layers."),
    (".attn.w_msa.", ".attn."),
    (".ffn.layers.0.0.", ".mlp.fc1."),
    (".ffn.layers.1.", ".mlp.fc2."),
)
"""Parts of names in MMDetection's own Swin, and what the original Swin calls them."""

_FROM_OFFICIAL = tuple((_pattern(official), ours) for official, ours in DINO_RULES + RULES)
_FROM_OURS = tuple((_pattern(ours), ours, official) for official, ours in RULES)
_FROM_OUR_DINO = tuple((_pattern(ours), ours, official) for official, ours in DINO_RULES) + _FROM_OURS


def our_key(official: str, decoder_layers: int) -> str | None:
    """Return our name of an official parameter, None if no rule matches.

    Args:
        official: name without a `module.` prefix.
        decoder_layers: D; branch D of the official list belongs to the encoder proposals.
    """
    for pattern, ours in _FROM_OFFICIAL:
        match = pattern.match(official)
        if match is None:
            continue
        number = int(match.group(1)) if match.groups() else 0
        if "{aux}" in ours and number >= len(AUX):
            return None
        if number == decoder_layers:
            for branch, encoder_branch in ENCODER_BRANCHES.items():
                ours = ours.replace(branch + ".{k}", encoder_branch)
        name = ours.format(k=number, next=number + 1, aux=AUX[number] if "{aux}" in ours else "")
        return name + official[match.end() :]
    return None


def official_key(ours: str, decoder_layers: int, dino: bool = False) -> str | None:
    """Return the official name of one of our parameters, of Co-DINO if `dino`; the inverse of `our_key`."""
    for branch, encoder_branch in ENCODER_BRANCHES.items():
        if ours.startswith(encoder_branch + "."):
            ours = f"{branch}.{decoder_layers}." + ours.removeprefix(encoder_branch + ".")
    for pattern, template, official in _FROM_OUR_DINO if dino else _FROM_OURS:
        match = pattern.match(ours)
        if match is None:
            continue
        number = 0
        if match.groups():
            number = AUX.index(match.group(1)) if "{aux}" in template else int(match.group(1))
        number -= "{next}" in template
        return official.format(k=number) + ours[match.end() :]
    return None


def decoder_layers(keys: Iterable[str]) -> int:
    """Count the decoder layers in an official state dict's keys."""
    return 1 + max(_numbers(r"query_head\.transformer\.decoder\.layers\.(\d+)\.", keys), default=-1)


def _numbers(pattern: str, keys: Iterable[str]) -> list[int]:
    return [int(match.group(1)) for key in keys if (match := re.match(pattern, key))]


def original_swin(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the names and orders of the original Swin, if it is of MMDetection's own.

    There the four cells that a patch merging joins lie beside each other for each channel, row by row
    (`torch.nn.Unfold`). In the original the channels of one cell lie beside each other, column by column.
    """
    if not any(name.startswith("backbone.stages.") for name in tensors):
        return dict(tensors)
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith("backbone."):
            for theirs, original in MMDETECTION_SWIN:
                name = name.replace(theirs, original)
            if re.search(r"\.downsample\.(norm\.(weight|bias)|reduction\.weight)$", name) and value.shape[-1] % 4 == 0:
                value = value.unflatten(-1, (-1, 2, 2)).movedim(-3, -1).transpose(-3, -2).flatten(-3)
        renamed[name] = value
    return renamed


def why_dropped(official: str) -> str | None:
    """Return why an official tensor is dropped, None if it is converted."""
    return next((why for pattern, why in DROPPED if re.search(pattern, official)), None)


def to_ours(official: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename an official state dict.

    Args:
        official: tensors by official name without a `module.` prefix.

    Returns:
        the renamed tensors, and the official names without a matching rule.
    """
    layers = decoder_layers(official)
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in official.items():
        if key == HEAD_OFFSETS:
            renamed |= {f"aux_embeddings.{head}.offset": row for head, row in zip(AUX, value, strict=True)}
        elif (ours := our_key(key, layers)) is None:
            unknown.append(key)
        else:
            renamed[ours] = value
    return renamed, unknown


def rotation_tables(official: Mapping[str, Tensor], backbone: BackboneConfig, canvas: int | None) -> dict[str, Tensor]:
    """Rebuild the tables of rotations that an official EVA-02 stores; {} for other backbones.

    Args:
        official: the other tensors.
        backbone: windows and blocks without.
        canvas: side in pixels of the square that every image is laid on; without one, blocks without a window have no
            table.
    """
    heads = 16  # of ViT-L
    depth = 1 + max(_numbers(r"backbone\.blocks\.(\d+)\.mlp\.ffn_ln\.", official), default=-1)
    if depth == 0:
        return {}
    half = official["backbone.pos_embed"].shape[-1] // heads // 2
    frequencies = 1 / 10000 ** (torch.arange(0, half, 2).float() / half)

    def tables(side: int) -> dict[str, Tensor]:
        angles = (torch.arange(side) / side * 16)[:, None] * frequencies
        angles = angles.repeat_interleave(2, dim=1)
        both = torch.cat(torch.broadcast_tensors(angles[:, None], angles[None]), dim=-1).flatten(0, 1)
        return {"freqs_cos": both.cos(), "freqs_sin": both.sin()}

    windowed = tables(backbone.window_size)
    whole = {} if canvas is None else tables(canvas // 16)
    found = {f"backbone.rope_win.{name}": value for name, value in windowed.items()}
    found |= {f"backbone.rope_glb.{name}": value for name, value in whole.items()}
    for block in range(depth):
        own = whole if (block + 1) % backbone.global_every == 0 else windowed
        found |= {f"backbone.blocks.{block}.attn.rope.{name}": value for name, value in own.items()}
    return found


def to_official(ours: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename one of our state dicts, and rebuild the tensors that only the official models store.

    Args:
        ours: state dict of a detector.

    Returns:
        the renamed tensors (batch counts are zero), and our names without an official one.
    """
    layers = 1 + max(_numbers(r"decoder\.layers\.(\d+)\.", ours), default=-1)
    dino = "decoder.position.first.weight" in ours
    offsets = [f"aux_embeddings.{head}.offset" for head in AUX]
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in ours.items():
        if key in offsets:
            continue
        if (official := official_key(key, layers, dino)) is None:
            unknown.append(key)
            continue
        renamed[official] = value
        if official.endswith(".running_var"):
            counter = official.replace("running_var", "num_batches_tracked")
            renamed[counter] = ours.get(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))
        elif official.endswith(".relative_position_bias_table"):
            window = (round(value.shape[0] ** 0.5) + 1) // 2  # the table has (2 w - 1)^2 rows
            index = get_relative_position_index(window, window)
            renamed[official.replace("bias_table", "index")] = index
    if all(name in ours for name in offsets):
        renamed[HEAD_OFFSETS] = torch.stack([ours[name] for name in offsets])
    return renamed, unknown
