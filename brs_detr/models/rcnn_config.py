"""Settings of the two-stage CNN detectors, alternatives of section `model`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar, Literal

from brs_detr.config_fields import Count, Fraction, NotEmpty, Positive, Unused, one_of
from brs_detr.models.config import (
    Anchors,
    BackboneConfig,
    RegionConfig,
    RoIConfig,
    RPNConfig,
    Stds,
    too_few_levels,
)
from brs_detr.models.objective_config import (
    CNN_RANKING,
    ObjectiveConfig,
    RankingConfig,
    ScoreConfig,
    TermWeights,
    unused_scales,
)

# Faster R-CNN's: cross entropies and L1 on offsets, over the number of sampled anchors and regions
_BINARY_RPN = ScoreConfig("binary_cross_entropy", TermWeights(l1=1.0, giou=10.0), normalizer="rows")
_SOFTMAX_ROI = ScoreConfig("cross_entropy", TermWeights(l1=1.0, giou=10.0), normalizer="rows")
_SOFTMAX_CASCADE = ScoreConfig("cross_entropy", TermWeights(l1=1.0, giou=10.0), normalizer="rows")


@dataclass(frozen=True)
class CascadeConfig(RegionConfig):
    """Cascade R-CNN's heads on pooled regions, one behind the other; a list has one entry per stage."""

    objective: ObjectiveConfig = one_of(CNN_RANKING, _SOFTMAX_CASCADE, ScoreConfig(weights=TermWeights(giou=2.0)))
    class_agnostic: bool = True
    add_ground_truth: bool = True
    min_ious: Annotated[tuple[Fraction, ...], NotEmpty()] = (0.5, 0.6, 0.7)  # of the positives
    # With a ranking loss all stages weigh the same, and have the same deviations; Cascade R-CNN has (1, 0.5, 0.25) and
    # (1, 2, 3).
    stage_weights: Annotated[tuple[float, ...], NotEmpty()] = (1.0, 1.0, 1.0)
    std_divisors: Annotated[tuple[Positive, ...], NotEmpty()] = (1.0, 1.0, 1.0)  # of coder_stds

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from super().problems(name)
        for setting in ("stage_weights", "std_divisors"):
            if len(getattr(self, setting)) != len(self.min_ious):
                yield (
                    f"{name}.{setting} has {len(getattr(self, setting))} entries for {len(self.min_ious)} stages of "
                    f"{name}.min_ious; give as many"
                )

    def stages(self) -> list[RoIConfig]:
        """Return the settings of each stage's head."""
        shared = {field.name: getattr(self, field.name) for field in fields(RegionConfig)}
        return [
            RoIConfig(**{**shared, "coder_stds": tuple(std / divisor for std in self.coder_stds)}, min_iou=min_iou)
            for min_iou, divisor in zip(self.min_ious, self.std_divisors, strict=True)
        ]


@dataclass(frozen=True)
class MaskConfig:
    """Mask R-CNN's branch of the RoI head."""

    # auto: dice where the RoI head's objective is a ranking loss, binary_cross_entropy where it is score-based
    loss: Literal["auto", "dice", "binary_cross_entropy"] = "auto"
    stacked_convs: int = 4
    pool_size: Count = 14  # cells a side of the pooled window; masks have twice as many
    max_masks: Count = 200  # masks a step is trained on, chosen at random, to bound memory

    def resolved(self, objective: ObjectiveConfig) -> MaskConfig:
        """Return these settings with `loss` decided by the objective of the RoI head, if it is auto."""
        if self.loss != "auto":
            return self
        return replace(self, loss="dice" if isinstance(objective, RankingConfig) else "binary_cross_entropy")


@dataclass(frozen=True)
class ProposalConfig(RPNConfig):
    """The region proposal network of the two-stage detectors."""

    # weight 0.2: Rank & Sort's, since its RPN loss is much larger than that of cross entropy
    objective: ObjectiveConfig = one_of(
        replace(CNN_RANKING, weight=0.2, tau=0.7), _BINARY_RPN, ScoreConfig(weights=TermWeights(giou=2.0))
    )
    anchor_scale: Positive = 8.0
    scales_per_octave: Count = 1
    coder_stds: Stds = (0.1, 0.1, 0.2, 0.2)
    proposals_before_nms: Count = 2000
    proposals: Count = 1000


@dataclass(frozen=True)
class RegionHeadConfig(RoIConfig):
    """The head of Faster R-CNN."""

    objective: ObjectiveConfig = one_of(CNN_RANKING, _SOFTMAX_ROI, ScoreConfig(weights=TermWeights(giou=2.0)))
    add_ground_truth: bool = True


@dataclass(frozen=True)
class TwoStageConfig:
    """What the two-stage detectors share: a backbone, a feature pyramid, region proposals."""

    SHARED_SECTION: ClassVar[str] = "objective"  # model.loss=rs stands for objective.loss=rs of all heads

    name: str = ""
    backbone: BackboneConfig = BackboneConfig(levels=(4, 8, 16, 32))
    anchors: Anchors = "fixed"
    dim: Count = 256
    levels: Count = 5  # maps of the feature pyramid; regions are pooled from those of the backbone
    rpn: ProposalConfig = ProposalConfig()
    roi: RegionHeadConfig | CascadeConfig = RegionHeadConfig()

    has_masks: ClassVar[bool] = False  # whether instance masks are learned and predicted

    @property
    def detection_limits(self) -> dict[str, tuple[str, int]]:
        """Return by head the setting that limits the detections of an image, and its value."""
        return {"roi": ("model.roi.max_detections", self.roi.max_detections)}

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from too_few_levels(self.levels, self.backbone, name)

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which settings are not read under the others; `name` is that of the section."""
        yield from unused_scales(self.anchors, ("rpn",), name)


@dataclass(frozen=True)
class FasterRCNNConfig(TwoStageConfig):
    """Faster R-CNN."""

    name: Literal["faster_rcnn"] = "faster_rcnn"  # type: ignore[assignment]


@dataclass(frozen=True)
class CascadeRCNNConfig(TwoStageConfig):
    """Cascade R-CNN."""

    name: Literal["cascade_rcnn"] = "cascade_rcnn"  # type: ignore[assignment]
    rpn: ProposalConfig = ProposalConfig(allowed_border=0.0)  # as published
    roi: CascadeConfig = CascadeConfig()


@dataclass(frozen=True)
class MaskRCNNConfig(TwoStageConfig):
    """Mask R-CNN."""

    has_masks: ClassVar[bool] = True

    name: Literal["mask_rcnn"] = "mask_rcnn"  # type: ignore[assignment]
    roi: RegionHeadConfig = RegionHeadConfig(low_quality=True)  # as published
    mask: MaskConfig = MaskConfig()
