"""Objective settings of a head, and checks of inconsistent combinations.

A head of section `model.rpn` has them in `model.rpn.objective`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from brs_detr.config_fields import Fraction, OnlyWith, Range, Unused

_WITH_ALRP = OnlyWith("loss", "alrp", "balrp")


@dataclass(frozen=True)
class RankingConfig:
    """A ranking loss over all logits of a head; the box terms follow it through self-balancing."""

    # Rank & Sort, AP, aLRP, NDCG; b...: bucketed
    loss: Literal["brs", "rs", "bap", "ap", "balrp", "alrp", "bndcg", "ndcg"] = "brs"
    weight: float = 1.0  # of ranking and sorting
    delta: float | None = None  # half width of the ranking's step; null: the loss's own (Rank & Sort 0.5, others 1)
    score_weighted: bool = False  # box losses weighted by the scores of their boxes
    box_weight: float = 2.0  # of box terms that are not balanced: with ap and bap, and with aLRP where balance is none
    tau: Annotated[float, Range(below=1), _WITH_ALRP] = 0.5  # with aLRP: minimum IoU of a positive
    # with aLRP: follow the values of each step, or as published their means over an epoch, or nothing
    balance: Annotated[Literal["value", "epoch", "none"], _WITH_ALRP] = "value"
    scope: Literal["process", "global"] = "process"  # rank each process's batch, or that of all processes

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which settings are not read under the others; `name` is that of the section."""
        if self.loss in ("alrp", "balrp") and self.balance != "none":
            yield Unused(f"{name}.box_weight", f"{name}.balance={self.balance}", f"set {name}.balance=none")
        if self.loss not in ("alrp", "balrp", "ap", "bap"):
            action = f"set {name}.loss to ap or bap"
            yield Unused(f"{name}.box_weight", f"{name}.loss={self.loss}", action)


# As published in CNN detectors. Following each step instead starves aLRP's boxes as soon as the ranking is perfect.
CNN_RANKING = RankingConfig(score_weighted=True, balance="epoch")


@dataclass(frozen=True)
class TermWeights:
    """Fixed weights of one head's terms."""

    cls: float = 1.0
    l1: float = 0.0
    smooth_l1: float = 0.0
    giou: float = 0.0
    iou: float = 0.0
    centerness: float = 0.0
    mask: float = 1.0


@dataclass(frozen=True)
class ScoreConfig:
    """A score-based classification loss with fixed weights."""

    loss: Literal["focal", "quality_focal", "binary_cross_entropy", "cross_entropy"] = "focal"
    weights: TermWeights = TermWeights()
    normalizer: Literal["positives", "rows"] = "positives"  # what the classification loss is divided by the number of
    alpha: Annotated[Fraction, OnlyWith("loss", "focal")] = 0.25
    gamma: Annotated[float, OnlyWith("loss", "focal", "quality_focal")] = 2.0

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        if 0 < self.gamma < 1:
            yield f"{name}.gamma={self.gamma:g}: its loss has no gradient at easy logits; set it to 0, or at least 1"


ObjectiveConfig = RankingConfig | ScoreConfig
FOCAL_ATSS = ScoreConfig(weights=TermWeights(cls=12.0, giou=24.0, centerness=12.0))
# In the proportion of ATSS. Co-DETR's 120 stands beside a softmax over all regions, of which few are positive; divided
# by the positives alone it leaves the classifier untrained on small data (docs/study.md).
FOCAL_ROI = ScoreConfig(weights=TermWeights(cls=12.0, giou=24.0))
FOCAL_RPN = ScoreConfig(weights=TermWeights(cls=12.0, l1=12.0, giou=24.0))
# Faster R-CNN's: losses of sampled anchors and regions, divided by their number
BINARY_RPN = ScoreConfig("binary_cross_entropy", TermWeights(cls=12.0, l1=12.0), normalizer="rows")
SOFTMAX_ROI = ScoreConfig("cross_entropy", TermWeights(cls=12.0, giou=120.0), normalizer="rows")


def needs_trained_boxes(objective: ObjectiveConfig, box_loss: str, name: str) -> Iterator[str]:
    """Yield what is wrong between the objective and the box loss of a head whose section is `name`."""
    if isinstance(objective, ScoreConfig) and getattr(objective.weights, box_loss) == 0:
        yield (
            f"{name}.objective.weights.{box_loss}=0 leaves the boxes untrained; set it above 0, or "
            f"{name}.box_loss to another one"
        )
    if objective.loss in ("alrp", "balrp") and box_loss not in ("giou", "iou"):
        yield f"{name}.objective.loss={objective.loss} ranks boxes by their GIoU; set {name}.box_loss=giou"


def needs_weights(objective: ObjectiveConfig, terms: Iterable[str], name: str) -> Iterator[str]:
    """Yield which of these terms of section `name`, each the only one of its part of the head, have weight 0."""
    for term in terms:
        if isinstance(objective, ScoreConfig) and getattr(objective.weights, term) == 0:
            yield f"{name}.objective.weights.{term}=0 leaves a part of the head untrained; set it above 0"


def needs_positives(objective: ObjectiveConfig, name: str) -> Iterator[str]:
    """Yield what is wrong with the normalizer of section `name`, whose terms are divided by the positives."""
    if isinstance(objective, ScoreConfig) and objective.normalizer != "positives":
        yield f"{name}.objective.normalizer={objective.normalizer} is of sampled heads; set it to positives"


def unused_weights(objective: ObjectiveConfig, terms: Sequence[str], name: str) -> Iterator[Unused]:
    """Yield the fixed weights of section `name` that are of no term of the head, whose other terms are `terms`.

    A weight of 0 is accepted: it leaves out what there is not.
    """
    if isinstance(objective, ScoreConfig):
        shown = f"{', '.join(['cls', *terms[:-1]])} and {terms[-1]}"
        given = [field.name for field in fields(objective.weights) if getattr(objective.weights, field.name) != 0]
        for term in given:
            if term not in ("cls", *terms):
                weight = f"{name}.objective.weights.{term}"
                yield Unused(weight, f"{name}, whose terms are {shown}", "give the weight of one of them")


def unused_scales(anchors: str, heads: Iterable[str], name: str) -> Iterator[Unused]:
    """Yield the anchor scales of these heads of section `name`, if `anchors=auto` chooses them."""
    if anchors == "auto":
        for head in heads:
            yield Unused(f"{name}.{head}.anchor_scale", f"{name}.anchors=auto", f"set {name}.anchors=fixed")


def needs_no_background(objective: ObjectiveConfig, name: str) -> Iterator[str]:
    """Yield what is wrong with the objective of section `name`, a head of sigmoids."""
    if objective.loss == "cross_entropy":
        yield (
            f"{name}.objective.loss=cross_entropy needs a background class, which only the RoI head has; "
            "choose binary_cross_entropy or focal"
        )


def needs_scores(objective: ObjectiveConfig, section: str, name: str, ranked: str) -> Iterator[str]:
    """Yield what is wrong with the objective of a detector `name` that is called `ranked` with a ranking loss."""
    if isinstance(objective, RankingConfig):
        yield (
            f"{section}.name={name} is the detector with score-based losses; {section}.objective.loss="
            f"{objective.loss} makes it {ranked}"
        )
