"""Settings of the one-stage CNN detectors, alternatives of section `model`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from brs_detr.config_fields import Count, Counts, Fraction, NotEmpty, OnlyWith, Positive, Unused, one_of
from brs_detr.models.config import Anchors, ATSSHeadConfig, BackboneConfig, Beta, DenseHeadConfig, too_few_levels
from brs_detr.models.objective_config import (
    CNN_RANKING,
    ObjectiveConfig,
    ScoreConfig,
    TermWeights,
    needs_no_background,
    needs_positives,
    needs_trained_boxes,
    needs_weights,
    unused_scales,
    unused_weights,
)


def _ordered(positive_iou: float, negative_iou: float, name: str) -> Iterator[str]:
    """Yield what is wrong with the IoU thresholds of section `name`."""
    if negative_iou > positive_iou:
        yield (
            f"{name}.negative_iou={negative_iou:g} is above {name}.positive_iou={positive_iou:g}; "
            "lower it to at most that"
        )


def _no_gap(object_sizes: tuple[float, float], name: str) -> Iterator[str]:
    """Yield what is wrong with the object sizes of section `name`, on maps of which each has twice the stride."""
    smallest, largest = object_sizes
    if not 0 < 2 * smallest <= largest:
        yield (
            f"{name}.object_sizes={list(object_sizes)} leaves objects between two maps to none; make the second at "
            "least twice the first, which must be above 0"
        )


_MaxIoU = Annotated[Fraction, OnlyWith("assigner", "max_iou")]


@dataclass(frozen=True)
class RetinaNetHeadConfig(DenseHeadConfig):
    """RetinaNet's head: anchors are assigned by fixed IoU thresholds, or as in ATSS."""

    scales_per_octave: Count = 2
    anchor_ratios: Annotated[tuple[Positive, ...], NotEmpty()] = (0.5, 1.0, 2.0)
    nms_iou: Fraction = 0.5
    assigner: Literal["max_iou", "atss"] = "max_iou"
    positive_iou: _MaxIoU = 0.5  # minimum IoU of a positive anchor
    negative_iou: _MaxIoU = 0.4  # below, an anchor is background; between, it is ignored
    topk: Annotated[Count, OnlyWith("assigner", "atss")] = 9  # candidates per level and object
    box_loss: Literal["giou", "iou", "l1", "smooth_l1"] = "giou"  # of decoded boxes, or on offsets: the sum, the mean
    beta: Beta = 1.0  # of smooth_l1: the error at which it turns from quadratic to linear

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from super().problems(name)
        yield from needs_trained_boxes(self.objective, self.box_loss, name)
        if self.assigner == "max_iou":
            yield from _ordered(self.positive_iou, self.negative_iou, name)

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which weights are of no term; `name` is that of the section."""
        yield from unused_weights(self.objective, (self.box_loss,), name)


@dataclass(frozen=True)
class PAAHeadConfig(DenseHeadConfig):
    """PAA's head: anchors are assigned by what they cost at present."""

    objective: ObjectiveConfig = one_of(CNN_RANKING, ScoreConfig(weights=TermWeights(giou=1.3)))
    topk: Count = 9  # cheapest candidates of each level that an object's mixture is fitted to
    box_cost: float = 1.0  # factor of the GIoU loss in the cost; focal PAA uses its weight, 1.3
    iou_branch: bool = False  # predict each box's IoU and weigh its score with it, as focal PAA does
    iou_weight: Annotated[float, OnlyWith("iou_branch", True)] = 0.5  # of the branch's loss

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from super().problems(name)
        yield from needs_weights(self.objective, ("giou",), name)
        yield from needs_positives(self.objective, name)
        if self.iou_branch and self.iou_weight == 0:
            yield f"{name}.iou_weight=0 leaves the IoU branch untrained; set it above 0"

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which weights are of no term; `name` is that of the section."""
        yield from unused_weights(self.objective, ("giou",), name)


# The paper's; it sums smooth L1 over the four distances, of which ours is the mean.
_FOCAL_FOVEA = ScoreConfig(weights=TermWeights(smooth_l1=4.0, giou=2.0), gamma=1.5, alpha=0.4)


@dataclass(frozen=True)
class FoveaHeadConfig:
    """FoveaBox's head: one point per cell, positive near the center of an object."""

    objective: ObjectiveConfig = one_of(CNN_RANKING, _FOCAL_FOVEA)
    stacked_convs: int = 4
    # square roots of objects' areas on a map, in strides; the finest map takes smaller ones too, the coarsest larger
    object_sizes: tuple[float, float] = (2.0, 8.0)
    sigma: Fraction = 0.4  # sides of the region of positive cells, as a fraction of the object's
    base_scale: Positive = 2.0  # what distances are divided by, in strides
    box_loss: Literal["giou", "l1", "smooth_l1"] = "giou"  # of decoded boxes, or on distances: the sum, the mean
    beta: Beta = 0.11  # of smooth_l1: the error at which it turns from quadratic to linear
    before_nms: Count = 1000
    score_threshold: float = 0.0
    nms_iou: Fraction = 0.5
    max_detections: Count = 100

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from needs_no_background(self.objective, name)
        yield from needs_trained_boxes(self.objective, self.box_loss, name)
        yield from _no_gap(self.object_sizes, name)

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which weights are of no term; `name` is that of the section."""
        yield from unused_weights(self.objective, (self.box_loss,), name)


@dataclass(frozen=True)
class YOLACTHeadConfig:
    """YOLACT's head: anchors as RetinaNet's, and masks as sums of prototypes."""

    objective: ObjectiveConfig = one_of(CNN_RANKING, ScoreConfig(weights=TermWeights(giou=2.0, mask=2.0)))
    # quality that positives are sorted by: of boxes, masks, or both; binary: none, all positives are equal
    label: Annotated[
        Literal["iou", "dice", "mean", "binary"], OnlyWith("objective.loss", "brs", "rs", "quality_focal")
    ] = "iou"
    prototypes: Count = 32
    anchor_scale: Positive = 3.0  # in strides
    anchor_ratios: Annotated[tuple[Positive, ...], NotEmpty()] = (0.5, 1.0, 2.0)  # height / width
    positive_iou: Fraction = 0.5  # minimum IoU of a positive anchor
    negative_iou: Fraction = 0.4  # below, an anchor is background; between, it is ignored
    before_nms: Count = 200  # best boxes of each class that enter suppression
    score_threshold: float = 0.0
    nms_iou: Fraction = 0.5
    max_detections: Count = 100

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from needs_no_background(self.objective, name)
        yield from needs_weights(self.objective, ("giou", "mask"), name)
        yield from _ordered(self.positive_iou, self.negative_iou, name)

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which weights are of no term; `name` is that of the section."""
        yield from unused_weights(self.objective, ("giou", "mask"), name)


@dataclass(frozen=True)
class SOLOv2HeadConfig:
    """SOLOv2's head: an object's class and the kernel of its mask at the grid cells of its center."""

    objective: ObjectiveConfig = one_of(CNN_RANKING, ScoreConfig(weights=TermWeights(mask=3.0)))
    stacked_convs: Count = 4  # of the class branch and of the kernel branch
    conv_dim: Count = 512  # channels of these branches
    norm_groups: Count = 32  # of every GroupNorm; must divide conv_dim, mask_hidden and mask_dim
    mask_hidden: Count = 128  # channels of the mask branch
    mask_dim: Count = 256  # of its result, and weights of a kernel
    grids: Counts = (40, 36, 24, 16, 12)  # cells along each side, one number per level
    # square roots of objects' areas on a level, in strides; the finest takes smaller ones too, the coarsest larger
    object_sizes: tuple[float, float] = (6.0, 24.0)
    sigma: Fraction = 0.2  # sides of the region of positive cells, as a fraction of the object's
    before_nms: Count = 500  # best (cell, class) pairs that enter suppression
    # Class scores at or below are no detections; neither are scores at or below the second one, after suppression has
    # lowered them. The paper has 0.2 and 0.05, after a long schedule; see `DenseHeadConfig`.
    score_threshold: float = 0.0
    final_threshold: float = 0.0
    # cells that a mask has more of, in strides of its level: 8 to 32 cells for 1, which no object of 12 pixels has
    min_area: float = 1.0
    nms_sigma: Positive = 2.0  # of matrix NMS: scores fall with exp(-sigma IoU^2)
    max_detections: Count = 100

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from needs_no_background(self.objective, name)
        yield from needs_weights(self.objective, ("mask",), name)
        yield from _no_gap(self.object_sizes, name)
        for setting in ("conv_dim", "mask_hidden", "mask_dim"):
            if getattr(self, setting) % self.norm_groups != 0:
                yield (
                    f"{name}.{setting}={getattr(self, setting)} must be a multiple of "
                    f"{name}.norm_groups={self.norm_groups}"
                )

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which weights are of no term; `name` is that of the section."""
        yield from unused_weights(self.objective, ("mask",), name)


@dataclass(frozen=True)
class OneStageConfig:
    """What the one-stage detectors share: a backbone, a feature pyramid, a head."""

    SHARED_SECTION: ClassVar[str] = "objective"  # model.loss=rs stands for model.head.objective.loss=rs

    name: str = ""
    backbone: BackboneConfig = BackboneConfig()
    dim: Count = 256
    levels: Count = 5  # maps of the feature pyramid; each beyond the backbone's has twice the stride of the one before
    head: DenseHeadConfig | FoveaHeadConfig | YOLACTHeadConfig | SOLOv2HeadConfig = DenseHeadConfig()

    has_masks: ClassVar[bool] = False  # whether instance masks are learned and predicted

    @property
    def detection_limits(self) -> dict[str, tuple[str, int]]:
        """Return by head the setting that limits the detections of an image, and its value."""
        return {"head": ("model.head.max_detections", self.head.max_detections)}

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from too_few_levels(self.levels, self.backbone, name)
        groups = getattr(self, "norm_groups", 1)
        if self.dim % groups != 0 or self.dim == groups:
            yield f"{name}.dim={self.dim} must be a multiple of {name}.norm_groups={groups}, and larger"

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which settings are not read under the others; `name` is that of the section."""
        yield from unused_scales(getattr(self, "anchors", "fixed"), ("head",), name)


@dataclass(frozen=True)
class RetinaNetConfig(OneStageConfig):
    """RetinaNet."""

    name: Literal["retinanet"] = "retinanet"  # type: ignore[assignment]
    anchors: Anchors = "fixed"
    head: RetinaNetHeadConfig = RetinaNetHeadConfig()


@dataclass(frozen=True)
class FoveaBoxConfig(OneStageConfig):
    """FoveaBox."""

    name: Literal["foveabox"] = "foveabox"  # type: ignore[assignment]
    head: FoveaHeadConfig = FoveaHeadConfig()


@dataclass(frozen=True)
class ATSSConfig(OneStageConfig):
    """ATSS."""

    name: Literal["atss"] = "atss"  # type: ignore[assignment]
    anchors: Anchors = "fixed"
    norm_groups: Count = 32  # of the towers; must divide dim
    head: ATSSHeadConfig = ATSSHeadConfig()


@dataclass(frozen=True)
class PAAConfig(OneStageConfig):
    """PAA."""

    name: Literal["paa"] = "paa"  # type: ignore[assignment]
    anchors: Anchors = "fixed"
    norm_groups: Count = 32  # of the towers; must divide dim
    head: PAAHeadConfig = PAAHeadConfig()


@dataclass(frozen=True)
class YOLACTConfig(OneStageConfig):
    """YOLACT."""

    name: Literal["yolact"] = "yolact"  # type: ignore[assignment]
    anchors: Anchors = "fixed"
    head: YOLACTHeadConfig = YOLACTHeadConfig()

    has_masks: ClassVar[bool] = True


@dataclass(frozen=True)
class SOLOv2Config(OneStageConfig):
    """SOLOv2."""

    name: Literal["solov2"] = "solov2"  # type: ignore[assignment]
    backbone: BackboneConfig = BackboneConfig(levels=(4, 8, 16, 32))
    head: SOLOv2HeadConfig = SOLOv2HeadConfig()

    has_masks: ClassVar[bool] = True

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from super().problems(name)
        if len(self.head.grids) != self.levels:
            grids = list(self.head.grids)
            yield f"{name}.head.grids={grids} must have one number per level, {name}.levels={self.levels}"
