"""One table from the official Co-DETR / BRS-DETR parameter names to ours.

Each rule is a pattern of the official name and our name; `{k}` stands for a number, and AUX names the dense head that
an auxiliary index means. Backbone names of ResNets are the same on both sides (torchvision's).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

AUX = ("roi", "atss")

RULES: tuple[tuple[str, str], ...] = (
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


def _pattern(rule: str) -> re.Pattern[str]:
    return re.compile(re.escape(rule).replace(re.escape("{k}"), r"(\d+)"))


HEAD_OFFSETS = "query_head.transformer.head_pos_embed.weight"
"""One (2, 1) table in the official files, one scalar per auxiliary embedding in ours."""

_COMPILED = tuple((_pattern(official), ours) for official, ours in RULES)


def our_key(official: str, decoder_layers: int) -> str | None:
    """Our name of an official parameter, or None where no rule knows it.

    Args:
        official: name without a `module.` prefix.
        decoder_layers: D; branch D of the official list belongs to the encoder proposals.
    """
    if official.startswith("backbone."):
        return official
    for pattern, ours in _COMPILED:
        found = pattern.match(official)
        if found is None:
            continue
        number = int(found.group(1)) if found.groups() else 0
        if number == decoder_layers and ours.startswith(("decoder.classifiers", "decoder.regressors")):
            ours = "proposals." + ours.split(".")[1].rstrip("s") + "."
        aux = AUX[number] if "{aux}" in ours else ""
        return ours.format(k=number, aux=aux) + official[found.end() :]
    return None


def decoder_layers(keys: Iterable[str]) -> int:
    """Number of decoder layers in an official state dict's keys."""
    found = [re.match(r"query_head\.transformer\.decoder\.layers\.(\d+)\.", key) for key in keys]
    return max((int(m.group(1)) for m in found if m), default=-1) + 1


def to_ours(official: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename an official state dict.

    Args:
        official: names without a `module.` prefix.

    Returns:
        The renamed tensors, and the official names that no rule knows.
    """
    layers, renamed, unknown = decoder_layers(official), {}, []
    for key, value in official.items():
        if key == HEAD_OFFSETS:
            renamed |= {f"aux_embeddings.{head}.offset": row for head, row in zip(AUX, value, strict=True)}
        elif (ours := our_key(key, layers)) is None:
            unknown.append(key)
        else:
            renamed[ours] = value
    return renamed, unknown
