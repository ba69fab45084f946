"""Settings of section `model`: one dataclass per detector, chosen by `model.name`, and those of their parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from brs_detr.config_fields import (
    Count,
    Counts,
    FilePath,
    Fraction,
    NotEmpty,
    Null,
    OnlyWith,
    Positive,
    Range,
    Unused,
    as_word,
    one_of,
)
from brs_detr.models.objective_config import (
    BINARY_RPN,
    CNN_RANKING,
    FOCAL_ATSS,
    FOCAL_ROI,
    FOCAL_RPN,
    SOFTMAX_ROI,
    ObjectiveConfig,
    RankingConfig,
    ScoreConfig,
    TermWeights,
    needs_no_background,
    needs_positives,
    needs_scores,
    needs_trained_boxes,
    needs_weights,
    unused_scales,
    unused_weights,
)

Stds = tuple[Positive, Positive, Positive, Positive]
Beta = Annotated[float, Range(above=0), OnlyWith("box_loss", "smooth_l1")]
AuxHeads = tuple[Literal["roi", "atss"], ...]
# auto: when a training begins, anchor_scale of every head is chosen from the boxes it is trained on
Anchors = Literal["fixed", "auto"]


@dataclass(frozen=True)
class BackboneConfig:
    """A timm model with pyramid features."""

    name: str = "resnet50.tv_in1k"
    pretrained: bool = True  # downloads unless `checkpoint` names a local file, which is then read instead
    checkpoint: FilePath | None = None
    frozen_stages: int = 1  # 0: none; 1: stem and first stage; ...
    norm: Literal["frozen", "batch", "group"] = "frozen"
    drop_path: float = 0.0
    levels: Counts = (8, 16, 32)  # strides handed to the neck
    # stages (2, 3, 4 in the papers) whose 3x3 convolutions become modulated deformable ones; of ResNets and ResNeXts
    deformable_stages: tuple[Count, ...] = ()
    deformable_groups: Count = 1  # groups of channels with offsets of their own
    window_size: Count = 24  # of EVA-02: cells of 16 pixels a side of an attention window
    global_every: Count = 4  # of EVA-02: of so many blocks, the last one attends to the whole map
    activation_checkpointing: bool = False
    channels_last: bool = False  # the channels of a pixel beside each other in memory, as tensor cores read them

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        if list(self.deformable_stages) != sorted(set(self.deformable_stages)):
            yield f"{name}.deformable_stages={list(self.deformable_stages)} must be stages that increase"
        if self.deformable_groups != 1 and not self.deformable_stages:
            yield (
                f"{name}.deformable_groups={self.deformable_groups} needs {name}.deformable_stages, such as [2, 3, 4]"
            )
        if list(self.levels) != sorted(set(self.levels)):
            yield f"{name}.levels={list(self.levels)} must be strides that increase"

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which settings are not read under the others; `name` is that of the section."""
        if not self.name.startswith("eva02_") and ":" not in self.name:  # a name of the hub may be of any network
            for setting in ("window_size", "global_every"):
                yield Unused(f"{name}.{setting}", f"{name}.name={self.name}", "choose an EVA-02 (eva02_*)")


def too_few_levels(levels: int, backbone: BackboneConfig, name: str) -> Iterator[str]:
    """Yield what is wrong if section `name` has fewer `levels` than the backbone hands to its neck."""
    if levels < len(backbone.levels):
        yield (
            f"{name}.levels={levels} is less than the {len(backbone.levels)} of {name}.backbone.levels="
            f"{list(backbone.levels)}; raise it, or leave some out"
        )


@dataclass(frozen=True)
class NoNMS:
    """Detections may overlap."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class HardNMS:
    """Of the detections of a class that overlap, the one with the highest score stays."""

    kind: Literal["hard"] = "hard"
    iou: Fraction = 0.6  # overlap above which the others are dropped


@dataclass(frozen=True)
class SoftNMS:
    """Of the detections of a class that overlap, those with a lower score keep a part of it (Bodla et al. 2017)."""

    kind: Literal["soft"] = "soft"
    iou: Fraction = 0.8  # overlap from which on a score falls, to its product with 1 - overlap
    min_score: Fraction = 0.001  # detections whose score is or falls below this are dropped


NMSConfig = NoNMS | SoftNMS | HardNMS


@dataclass(frozen=True)
class MatcherConfig:
    """Weights of the Hungarian costs."""

    cls: float = 4.0
    l1: float = 5.0
    giou: float = 2.0


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network."""

    # Positives of an RPN have an IoU of at least 0.7, but for the best anchor of an object.
    objective: ObjectiveConfig = one_of(RankingConfig(tau=0.7), FOCAL_RPN, BINARY_RPN)
    box_loss: Literal["giou", "l1", "smooth_l1"] = "giou"  # of decoded boxes, or on offsets: the sum, the mean
    beta: Beta = 1.0  # of smooth_l1: the error at which it turns from quadratic to linear
    sample: Annotated[Count | None, Null("all")] = None  # anchors sampled an image; null: all of them
    proposals_before_nms: Count = 4000  # per level
    proposals: Count = 4000
    test_proposals_before_nms: Count = 1000
    test_proposals: Count = 1000
    nms_iou: Fraction = 0.7
    anchor_scale: Positive = 4.0  # of the smallest anchor of an octave, in strides
    scales_per_octave: Count = 3
    anchor_ratios: Annotated[tuple[Positive, ...], NotEmpty()] = (0.5, 1.0, 2.0)  # height / width
    coder_stds: Stds = (1.0, 1.0, 1.0, 1.0)  # standard deviations of the offsets
    # pixels by which an anchor that takes part in training may stick out of its image; null: any number
    allowed_border: Annotated[float | None, Null("any number of pixels")] = None
    prior: Annotated[float, Range(above=0, below=1)] = 0.5  # first objectness of every anchor

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from needs_no_background(self.objective, name)
        yield from needs_trained_boxes(self.objective, self.box_loss, name)

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which weights are of no term; `name` is that of the section."""
        yield from unused_weights(self.objective, (self.box_loss,), name)


@dataclass(frozen=True)
class RegionConfig:
    """What the heads on pooled regions have in common."""

    objective: ObjectiveConfig = one_of(RankingConfig(weight=5.0), FOCAL_ROI, SOFTMAX_ROI)
    box_loss: Literal["giou", "l1", "smooth_l1"] = "giou"  # of decoded boxes, or on offsets: the sum, the mean
    beta: Beta = 1.0  # of smooth_l1: the error at which it turns from quadratic to linear
    stacked_convs: int = 0  # 3x3, with GroupNorm, before the fully connected layers, of which one is left then
    fc_dim: Count = 1024
    class_agnostic: bool = False  # one box per RoI instead of one per class
    low_quality: bool = False  # RoIs that overlap an object most become its own, if they are positives at all
    coder_stds: Stds = (0.1, 0.1, 0.2, 0.2)  # standard deviations of the offsets
    sample: Annotated[Count | None, Null("all")] = None  # RoIs sampled an image, 1/4 positive; null: all proposals
    add_ground_truth: bool = False  # ground-truth boxes join the proposals in training
    max_rois: Annotated[Count | None, Null("no limit")] = None  # cap an image, to bound memory; null: none
    score_threshold: float = 0.0  # class scores at or below are no detections
    nms_iou: Fraction = 0.5
    max_detections: Count = 100

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from needs_trained_boxes(self.objective, self.box_loss, name)

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which weights are of no term; `name` is that of the section."""
        found = unused_weights(self.objective, (self.box_loss,), name)
        yield from (one for one in found if not one.name.endswith(".mask"))  # that of Mask R-CNN's branch


@dataclass(frozen=True)
class RoIConfig(RegionConfig):
    """Faster R-CNN's head on pooled regions."""

    min_iou: Fraction = 0.5  # IoU with an object from which a RoI is a positive


@dataclass(frozen=True)
class DenseHeadConfig:
    """What the one-stage heads on a feature pyramid share: two towers, anchors, and what becomes a detection."""

    objective: ObjectiveConfig = one_of(CNN_RANKING, ScoreConfig(weights=TermWeights(giou=2.0)))
    stacked_convs: int = 4  # of each tower
    anchor_scale: Positive = 4.0  # of the smallest anchor of an octave, in strides
    scales_per_octave: Count = 3
    anchor_ratios: Annotated[tuple[Positive, ...], NotEmpty()] = (1.0,)  # height / width
    before_nms: Count = 1000  # best (anchor, class) pairs of each level that enter suppression
    # Class scores at or below are no detections. The papers have 0.05, after long schedules: a ranking loss gives
    # scores no absolute meaning, and after a short one most objects score less.
    score_threshold: float = 0.0
    nms_iou: Fraction = 0.6
    max_detections: Count = 100

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from needs_no_background(self.objective, name)


@dataclass(frozen=True)
class ATSSHeadConfig(DenseHeadConfig):
    """ATSS head: anchors are assigned by an IoU threshold that each object has of its own."""

    topk: Count = 9  # candidates per level and object
    centerness: bool = False

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from super().problems(name)
        if self.centerness and isinstance(self.objective, RankingConfig):
            yield (
                f"{name}.centerness=true needs {name}.objective.loss=focal; {name}.objective.loss="
                f"{self.objective.loss} ranks by quality instead"
            )
        yield from needs_weights(self.objective, ("giou", "centerness") if self.centerness else ("giou",), name)
        yield from needs_positives(self.objective, name)

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which weights are of no term; `name` is that of the section."""
        yield from unused_weights(self.objective, ("giou", "centerness") if self.centerness else ("giou",), name)


@dataclass(frozen=True)
class AuxATSSConfig(ATSSHeadConfig):
    """The ATSS head beside a decoder, by default with one anchor per cell."""

    objective: ObjectiveConfig = one_of(RankingConfig(weight=5.0), FOCAL_ATSS)
    stacked_convs: int = 1
    anchor_scale: Positive = 8.0
    scales_per_octave: Count = 1


# Co-DETR's dense heads, with samplers and centerness
_CO_RPN = RPNConfig(objective=BINARY_RPN, box_loss="l1", sample=256, proposals=1000)
_CO_ROI = RoIConfig(objective=SOFTMAX_ROI, sample=512, add_ground_truth=True)
_CO_ATSS = AuxATSSConfig(objective=FOCAL_ATSS, centerness=True)


@dataclass(frozen=True)
class DETRConfig:
    """A deformable DETR with auxiliary heads; by default its every prediction set is ranked."""

    SHARED_SECTION: ClassVar[str] = "objective"  # model.loss=rs stands for objective.loss of this and of every head

    name: str = ""
    # of the decoder layers, encoder proposals and auxiliary queries
    objective: ObjectiveConfig = one_of(
        RankingConfig(weight=2.0), ScoreConfig(weights=TermWeights(cls=2.0, l1=5.0, giou=2.0))
    )
    backbone: BackboneConfig = BackboneConfig()
    anchors: Anchors = "fixed"
    dim: Count = 256
    heads: Count = 8
    points: Count = 4
    norm_groups: Count = 32  # of neck, ATSS towers and coarsest map; must divide dim
    levels: Count = 4
    encoder_layers: Count = 6
    decoder_layers: Count = 6
    ffn_dim: Count = 2048
    queries: Count = 300
    # whose boxes the decoder's queries begin with; rpn: its proposals, and those of encoder tokens where they are few
    query_boxes: Literal["encoder", "rpn"] = "encoder"
    # IoU from which such a box gives way to a better one; null: the best become queries
    proposal_nms_iou: Annotated[Fraction | None, Null("no suppression")] = None
    # dense heads that learn beside the decoder and give it queries; any may be left out, as in the papers' ablations.
    # The RPN is there where the RoI head or query_boxes=rpn needs it.
    aux_heads: AuxHeads = ("roi", "atss")
    max_aux_queries: Count = 300
    detections_per_image: Count = 100
    # triton: fused kernels, where there is a GPU; auto: the same, if Triton is installed
    deformable_attention: Literal["auto", "torch", "triton"] = "auto"
    matcher: MatcherConfig = MatcherConfig()
    rpn: RPNConfig = RPNConfig()
    roi: RoIConfig = RoIConfig()
    atss: AuxATSSConfig = AuxATSSConfig()

    has_masks: ClassVar[bool] = False  # whether instance masks are learned and predicted

    @property
    def detection_limits(self) -> dict[str, tuple[str, int]]:
        """Return by head the setting that limits the detections of an image, and its value."""
        limits = {"decoder": ("model.detections_per_image", self.detections_per_image)}
        for head in self.aux_heads:
            limits[head] = f"model.{head}.max_detections", getattr(self, head).max_detections
        return limits

    @property
    def candidates(self) -> int:
        """Return how many (query, class) pairs of an image enter the suppression of `eval.nms`."""
        return self.detections_per_image

    @property
    def dense_heads(self) -> tuple[str, ...]:
        """Return the sections of the dense heads that there are: `aux_heads`, and the RPN if anything needs it."""
        needed = {*self.aux_heads, *(["rpn"] if "roi" in self.aux_heads or self.query_boxes == "rpn" else [])}
        return tuple(name for name in ("rpn", "roi", "atss") if name in needed)

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        dim, groups = self.dim, self.norm_groups
        if dim % self.heads != 0:
            yield f"{name}.dim={dim} must be a multiple of {name}.heads={self.heads}"
        if dim % groups != 0 or dim == groups:
            yield f"{name}.dim={dim} must be a multiple of {name}.norm_groups={groups}, and larger"
        if dim % 4 != 0:
            yield f"{name}.dim={dim} must be a multiple of 4 (sine and cosine of x and y)"
        yield from too_few_levels(self.levels, self.backbone, name)
        if len(set(self.aux_heads)) < len(self.aux_heads):
            yield f"{name}.aux_heads={list(self.aux_heads)} names a head twice"
        yield from needs_no_background(self.objective, name)
        yield from needs_positives(self.objective, name)
        if isinstance(self.objective, ScoreConfig) and not (self.objective.weights.l1 or self.objective.weights.giou):
            yield from needs_weights(self.objective, ("giou",), name)
        if getattr(self.objective, "balance", "") == "epoch" and self.objective.loss in ("alrp", "balrp"):
            yield (
                f"{name}.objective.balance=epoch counts each layer as an iteration, so its epoch is over too early; "
                f"set {name}.objective.balance=value"
            )

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which settings are not read under the others; `name` is that of the section."""
        yield from unused_weights(self.objective, ("l1", "giou"), name)
        cause = f"{name}.aux_heads={as_word(self.aux_heads)}"
        for head in {"rpn", "roi", "atss"} - set(self.dense_heads):
            yield Unused(f"{name}.{head}", cause, f"add {'roi' if head == 'rpn' else head} to {name}.aux_heads")
        if not self.aux_heads:
            yield Unused(f"{name}.max_aux_queries", cause, f"add roi or atss to {name}.aux_heads")
        yield from unused_scales(self.anchors, ("rpn", "atss"), name)


@dataclass(frozen=True)
class BRSDETRConfig(DETRConfig):
    """BRS-DETR: Co-DETR with ranking losses."""

    name: Literal["brs_detr"] = "brs_detr"
    encoder_ranking: Literal["all", "first"] = "all"  # columns of the encoder proposals' logits that are ranked


@dataclass(frozen=True)
class CoDETRConfig(BRSDETRConfig):
    """Co-DETR: the same network with score-based losses, samplers and centerness."""

    name: Literal["co_detr"] = "co_detr"  # type: ignore[assignment]  # the tag of this alternative
    objective: ObjectiveConfig = one_of(
        ScoreConfig(weights=TermWeights(cls=2.0, l1=5.0, giou=2.0)), RankingConfig(weight=2.0)
    )
    matcher: MatcherConfig = MatcherConfig(cls=2.0)
    rpn: RPNConfig = _CO_RPN
    roi: RoIConfig = _CO_ROI
    atss: AuxATSSConfig = _CO_ATSS

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from super().problems(name)
        yield from needs_scores(self.objective, name, self.name, "brs_detr")


_DENOISED = OnlyWith("loss", "quality_focal", "rank")


@dataclass(frozen=True)
class DenoisingConfig:
    """Queries made of noised objects, in training only (DINO, Zhang et al. 2023, section 3.3)."""

    # rank: by the loss of the decoder, in a list of its own; none: there are no such queries
    loss: Literal["quality_focal", "rank", "none"] = "quality_focal"
    queries: Annotated[Count, _DENOISED] = 100  # of an image that are positive, about; as many are negative
    label_noise: Annotated[Fraction, _DENOISED] = 0.5  # of the queries half of this share get a random class
    # by which share of half its side a box may move; a negative by one more. Above 0.5, negatives can turn inside out
    box_noise: Annotated[float, _DENOISED] = 1.0
    # most of an image; of more objects a random choice gets queries
    max_rows: Annotated[Count, Range(min=2), _DENOISED] = 600


@dataclass(frozen=True)
class BRSDINOConfig(DETRConfig):
    """Co-DINO with ranking losses."""

    name: Literal["brs_dino"] = "brs_dino"
    backbone: BackboneConfig = BackboneConfig(levels=(4, 8, 16, 32))
    levels: Count = 5
    queries: Count = 900
    detections_per_image: Count = 300
    denoising: DenoisingConfig = DenoisingConfig()

    @property
    def candidates(self) -> int:
        """Return how many (query, class) pairs of an image enter the suppression of `eval.nms`: one a query."""
        return self.queries

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from super().problems(name)
        own = self.denoising
        if own.loss != "none" and own.max_rows < 2 * own.queries:
            yield (
                f"{name}.denoising.max_rows={own.max_rows} is less than the two rows for each of "
                f"{name}.denoising.queries={own.queries}; raise it, or lower the queries"
            )
        if own.loss == "rank" and isinstance(self.objective, ScoreConfig):
            yield (
                f"{name}.denoising.loss=rank takes the ranking loss of {name}.objective, which is "
                f"{self.objective.loss}; set quality_focal, or {name}.objective.loss=brs with {name}.name=brs_dino"
            )


@dataclass(frozen=True)
class CoDINOConfig(BRSDINOConfig):
    """Co-DINO: scores, samplers and centerness as published."""

    name: Literal["co_dino"] = "co_dino"  # type: ignore[assignment]  # the tag of this alternative
    objective: ObjectiveConfig = one_of(
        ScoreConfig("quality_focal", TermWeights(l1=5.0, giou=2.0)), RankingConfig(weight=2.0)
    )
    matcher: MatcherConfig = MatcherConfig(cls=2.0)
    rpn: RPNConfig = _CO_RPN
    roi: RoIConfig = _CO_ROI
    atss: AuxATSSConfig = _CO_ATSS

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        yield from super().problems(name)
        yield from needs_scores(self.objective, name, self.name, "brs_dino")
