"""Settings of weights files and states that were written before each head had an objective of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_REPLACED = ("loss", "ranking_weights", "score_weights")  # a stored config has them all, a recipe may have one
_HEADS = ("decoder", "rpn", "roi", "atss")
_SCORE_BASED = ("focal", "quality_focal")
# what `loss: focal` stood for: sampled anchors and regions with the cross entropies of Faster R-CNN
_SCORE_LOSS = {"rpn": "binary_cross_entropy", "roi": "cross_entropy"}


def migrate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a stored config in today's names; those of today's configs are returned unchanged.

    Args:
        values: nested plain values, as `to_dict` writes them.
    """
    migrated: dict[str, Any] = copy.deepcopy(dict(values))
    model = migrated.get("model")
    if not isinstance(model, dict) or not set(_REPLACED) <= set(model):
        return migrated
    loss, weights, fixed = (model.pop(key) for key in _REPLACED)
    common = {"delta": model.pop("ranking_delta", None), "scope": model.pop("ranking_scope", "process")}
    common["score_weighted"] = model.pop("score_weighted", False)
    for head in _HEADS:
        if loss in _SCORE_BASED:
            own = _SCORE_LOSS.get(head, loss)
            normalizer = "rows" if head in _SCORE_LOSS else "positives"
            objective = {"loss": own, "weights": fixed[head], "normalizer": normalizer}
        else:
            objective = {"loss": loss, "weight": weights[head], **common}
        section = model if head == "decoder" else model.setdefault(head, {})
        section["objective"] = objective
    if loss in _SCORE_BASED:
        model["rpn"]["box_loss"] = "l1"
    return migrated
