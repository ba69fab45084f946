"""The settings of a run: nested dataclasses are the schema, a flat YAML file a recipe.

`load_config("configs/x.yaml", ["optim.lr=1e-4"])` starts from the defaults below (the released R50 BRS-DETR), applies
the recipe's `base:` if it names one, the recipe, then the command line. A key that does not exist, a value of the wrong
type and a pair that cannot work together are refused at once, with the file and the nearest valid name. The number of
classes is no setting: it is read from the data.

Which values of the settings are out of range, and which pairs cannot work together; what to say of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from brs_detr.config_aliases import ALIASES
from brs_detr.config_io import ConfigError, leaves, nearest_setting, parse_yaml, setting_names, to_dict, update
from brs_detr.recipes import read_layers


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation: one of two policies an image; sides in pixels."""

    short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    long_side: int = 1333
    crop_policy: bool = True  # half of the images: resize, crop, resize again
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_long_side: int = 4200
    crop_min: int = 384
    crop_max: int = 600
    flip: float = 0.5


@dataclass(frozen=True)
class DataConfig:
    """Where images and annotations are; the four paths are relative to `root`."""

    root: str = "datasets/coco"
    train_json: str = "annotations/instances_train2017.json"
    train_images: str = "train2017"
    val_json: str = "annotations/instances_val2017.json"
    val_images: str = "val2017"
    workers: int = 4
    timeout: float | None = 300.0  # seconds to wait for a batch before the run ends, saved; null: for ever
    retry_seconds: float = 60.0  # for how long a file is tried again where the storage fails
    keep_empty: bool = True  # images without objects are trained on
    min_side: int = 32  # smaller images are not trained on
    antialias: bool = True  # low-pass filter when shrinking; the released code had none
    max_image_pixels: int = 120_000_000  # an image with more is left out; decoding takes 7 bytes a pixel
    max_image_bytes: int = 536_870_912  # and so is an image file with more
    max_json_bytes: int = 8_589_934_592  # an annotation file that unpacks to more is refused
    allow_outside_images: bool = False  # follow file names of the json that lead out of the image folder
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    test_short_side: int = 800
    test_long_side: int = 1333


@dataclass(frozen=True)
class BackboneConfig:
    """A timm model with pyramid features."""

    name: str = "resnet50.tv_in1k"
    pretrained: bool = True  # downloads unless `checkpoint` names a local file, which is then read instead
    checkpoint: str | None = None
    frozen_stages: int = 1  # 0: none; 1: stem and first stage; ...
    norm: Literal["frozen", "batch", "group"] = "frozen"
    drop_path: float = 0.0
    levels: tuple[int, ...] = (8, 16, 32)  # strides handed to the neck
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class MatcherConfig:
    """Weights of the Hungarian costs."""

    cls: float = 4.0
    l1: float = 5.0
    giou: float = 2.0


@dataclass(frozen=True)
class RankingWeights:
    """Weight of ranking and sorting in each head; the box terms follow it through self-balancing."""

    decoder: float = 2.0  # also encoder proposals and auxiliary queries
    rpn: float = 1.0
    roi: float = 5.0
    atss: float = 5.0


@dataclass(frozen=True)
class TermWeights:
    """Fixed weights of one head's terms in the score-based objectives."""

    cls: float = 0.0
    l1: float = 0.0
    giou: float = 0.0
    centerness: float = 0.0


@dataclass(frozen=True)
class ScoreWeights:
    """Score-based objectives (`loss: focal`): the weights of each head."""

    decoder: TermWeights = TermWeights(cls=2.0, l1=5.0, giou=2.0)
    rpn: TermWeights = TermWeights(cls=12.0, l1=12.0)
    roi: TermWeights = TermWeights(cls=12.0, giou=120.0)
    atss: TermWeights = TermWeights(cls=12.0, giou=24.0, centerness=12.0)


@dataclass(frozen=True)
class RPNConfig:
    """Auxiliary region proposal network."""

    sample: int | None = None  # anchors sampled an image; null: all of them
    proposals_before_nms: int = 4000  # per level
    proposals: int = 4000
    test_proposals_before_nms: int = 1000
    test_proposals: int = 1000
    nms_iou: float = 0.7
    anchor_scale: float = 4.0  # of the smallest anchor of an octave, in strides
    scales_per_octave: int = 3
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width


@dataclass(frozen=True)
class RoIConfig:
    """Auxiliary Faster R-CNN head."""

    fc_dim: int = 1024
    sample: int | None = None  # RoIs sampled an image; null: all proposals
    add_ground_truth: bool = False  # true boxes join the proposals in training
    max_rois: int | None = None  # cap an image, to bound memory; null: none


@dataclass(frozen=True)
class ATSSConfig:
    """Auxiliary ATSS head."""

    stacked_convs: int = 1
    topk: int = 9
    anchor_scale: float = 8.0  # side of the anchors, in strides
    centerness: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The detector."""

    name: Literal["brs_detr", "co_detr"] = "brs_detr"
    # Rank & Sort, AP, aLRP, NDCG; b...: bucketed; focal and quality_focal: score-based
    loss: Literal["brs", "rs", "bap", "ap", "balrp", "alrp", "bndcg", "ndcg", "focal", "quality_focal"] = "brs"
    ranking_delta: float | None = None  # half width of the ranking's step; null: the loss's own (Rank & Sort 0.5)
    ranking_scope: Literal["process", "global"] = "process"  # rank each process's batch, or that of all processes
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    dim: int = 256
    heads: int = 8
    points: int = 4
    norm_groups: int = 32  # of every GroupNorm; must divide dim
    levels: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_dim: int = 2048
    queries: int = 300
    max_aux_queries: int = 300
    encoder_ranking: Literal["all", "first"] = "all"  # columns of the encoder proposals' logits that are ranked
    score_weighted: bool = False  # localization terms weighted by the scores of their boxes
    detections_per_image: int = 100
    deformable_attention: Literal["torch", "triton"] = "torch"  # triton: fused kernels, where there is a GPU
    matcher: MatcherConfig = field(default_factory=MatcherConfig)
    ranking_weights: RankingWeights = field(default_factory=RankingWeights)
    score_weights: ScoreWeights = field(default_factory=ScoreWeights)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi: RoIConfig = field(default_factory=RoIConfig)
    atss: ATSSConfig = field(default_factory=ATSSConfig)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW."""

    lr: float = 2e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 0.1
    backbone_lr_factor: float = 0.1
    sampling_offsets_lr_factor: float = 0.1
    backbone_layer_decay: float | None = None  # further factor for each backbone stage below the last
    fused: bool = True  # on CUDA


@dataclass(frozen=True)
class TrainConfig:
    """Length, schedule and bookkeeping of the training."""

    epochs: int = 12
    steps: int | None = None  # optimizer steps instead, rounded up to whole epochs; for the cosine schedule
    schedule: Literal["step", "cosine"] = "step"
    lr_steps: tuple[int, ...] = (10, 11)  # epochs after which the rate falls
    lr_gamma: float = 0.2
    warmup_steps: int = 0  # optimizer steps
    total_batch_size: int = 16  # images an optimizer step, over all processes and accumulated batches
    per_device_batch_size: int | None = None  # at most, at once; null: the whole share of a process
    precision: Literal["no", "bf16", "fp16"] = "no"
    ema_decay: float | None = None
    eval_every: int | None = 1  # epochs; null: about twenty validations altogether
    log_every: int = 50  # optimizer steps
    save_every: int | None = 1000  # optimizer steps between saved states; null: only after validations
    patience: int | None = None  # validations without a better one before the training ends early; null: never
    trackers: tuple[str, ...] = ()  # of Accelerate: tensorboard, wandb, ...
    tf32: bool = True  # float32 products on a GPU may round their inputs to 10 bits
    overfit_batches: int | None = None  # train and validate on the first images only, that many batches
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 20  # steps skipped in a row after which the training stops all the same
    freeze: tuple[str, ...] = ()  # parts that stay as they are, by the beginning of their parameters' names
    init_from: str | None = None  # weights or run folder to start from; other classes are allowed
    resume: bool = False  # go on with the run in `output_dir`
    overwrite: bool = False  # start over although `output_dir` holds a run
    allow_changes: bool = False  # resume although settings have changed


@dataclass(frozen=True)
class EvalConfig:
    """Validation."""

    batch_size: int = 1  # images a process
    score_threshold: float = 0.0
    max_detections: int = 100
    predict_with: Literal["decoder", "roi", "atss"] = "decoder"  # the head whose boxes count; no NMS with the decoder


@dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    output_dir: str = "runs/default"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `a.b=value` overrides.

    Args:
        path: of the recipe, or its name (`demo`); see `recipes.find_recipe`.
        overrides: settings to change.

    Raises:
        ConfigError: unknown key, wrong type, impossible pair, unreadable file.
    """
    config = Config()
    for source, layer in read_layers(path):
        config = update(config, layer, source, ALIASES)
    return apply_overrides(config, overrides)


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The config with `a.b=value` strings applied, checked as a whole."""
    config = update_from_command_line(config, overrides)
    check(config)
    return config


def update_from_command_line(config: Config, overrides: Sequence[str]) -> Config:
    """The config with `a.b=value` strings applied; names and types are checked, but not whether the values fit.

    Raises:
        ConfigError: unknown name, wrong type, not of that form.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip().lstrip("-")
        if not equals or not key:
            raise ConfigError(f"command line: {text!r} is not of the form section.setting=value{_written_out(text)}")
        layer: Any = parse_yaml(value, f"command line, {key}") if value else None
        for part in reversed(key.split(".")):
            layer = {part: layer}
        config = update(config, layer, "command line", ALIASES)
    return config


def _written_out(word: str) -> str:
    """How a word that has no value would be written, where it is the name of a setting or near one."""
    near = word if word in setting_names(Config()) else nearest_setting(word, Config(), ALIASES)
    return f"; write {near}=VALUE, without blanks" if near is not None and " " not in near else ""


def option_as_setting(option: str, value: str) -> str:
    """`--data.root` with its value as `data.root=value`, where the name is complete.

    Raises:
        ConfigError: it is not; says which setting was probably meant and how that is written.
    """
    name, written = option.lstrip("-").replace("-", "_"), f"{option} {value}".strip()
    exact = name in setting_names(Config())
    if exact and value:
        return f"{name}={value}"
    near = name if exact else nearest_setting(name, Config(), ALIASES)
    if near is None:
        raise ConfigError(
            f"{option}: neither an option nor near a setting. Settings are written section.setting=value; "
            "`brs-detr info RECIPE --settings` lists them."
        )
    if " " in near:
        raise ConfigError(f"{written}: {near}")
    raise ConfigError(f"{written}: settings are written section.setting=value. Write {near}={value or 'VALUE'}.")


def from_dict(values: Mapping[str, Any], source: str) -> Config:
    """The config that `to_dict` described, for instance the one stored inside a checkpoint named `source`."""
    config = update(Config(), values, source, ALIASES)
    check(config)
    return config


def dump(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120)


def differences(old: Config, new: Config) -> list[str]:
    """`a.b: old -> new` for every setting in which two configs differ."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return [f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]


def check(config: Config) -> None:
    """Refuse values out of range and pairs that cannot work together.

    Raises:
        ConfigError: naming the settings and what to change.
    """
    for broken, message in rules(config):
        if broken:
            raise ConfigError(message)


_AT_LEAST_ONE = """
    data.augment.long_side data.augment.short_sides data.augment.crop_min data.test_short_side data.test_long_side
    model.dim model.heads model.points model.levels model.decoder_layers model.ffn_dim model.queries
    model.detections_per_image model.backbone.levels train.epochs train.steps train.total_batch_size
    train.per_device_batch_size train.eval_every train.log_every train.save_every train.patience train.overfit_batches
    train.max_skipped
    eval.batch_size eval.max_detections model.norm_groups
    model.rpn.proposals model.rpn.proposals_before_nms model.roi.fc_dim model.atss.topk
    model.rpn.test_proposals model.rpn.test_proposals_before_nms model.rpn.scales_per_octave model.rpn.sample
    model.roi.sample model.roi.max_rois model.max_aux_queries
    data.augment.crop_short_sides data.augment.crop_long_side
    data.max_image_pixels data.max_image_bytes data.max_json_bytes
"""
_POSITIVE = frozenset({"data.timeout", "model.rpn.anchor_scale", "model.rpn.anchor_ratios", "model.atss.anchor_scale"})
_NOT_EMPTY = frozenset(
    {
        "data.augment.short_sides",
        "data.augment.crop_short_sides",
        "model.backbone.levels",
        "model.rpn.anchor_ratios",
    }
)
_MAY_BE_NULL = {"model.rpn.sample": "all", "model.roi.sample": "all", "model.roi.max_rois": "no limit"}


def rules(config: Any) -> Iterator[tuple[bool, str]]:
    """(is it broken, what to say then) of every rule.

    Args:
        config: a `config.Config`.
    """
    model, train, augment = config.model, config.train, config.data.augment
    for name, value in leaves(config):
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float))]
        minimum = 1 if name in _AT_LEAST_ONE.split() else 0
        null = f", or null: {_MAY_BE_NULL[name]}" if name in _MAY_BE_NULL else ""
        yield any(v < minimum for v in numbers), f"{name}={value} must be at least {minimum}{null}"
        yield name in _POSITIVE and any(v <= 0 for v in numbers), f"{name}={value} must be above 0"
        yield name in _NOT_EMPTY and value == (), f"{name} needs at least one entry"
    for name, value in (("data.augment.flip", augment.flip), ("model.rpn.nms_iou", model.rpn.nms_iou)):
        yield value > 1, f"{name}={value} must lie between 0 and 1"
    data = config.data
    yield (
        (data.timeout or math.inf) <= data.retry_seconds,
        f"data.timeout={data.timeout} must be above data.retry_seconds={data.retry_seconds}",
    )
    yield any(b >= 1 for b in config.optim.betas), f"optim.betas={list(config.optim.betas)} must be below 1"
    yield model.dim % model.heads != 0, f"model.dim={model.dim} must be a multiple of model.heads={model.heads}"
    groups = f"model.dim={model.dim} must be a multiple of model.norm_groups={model.norm_groups}, and larger"
    yield model.dim % model.norm_groups != 0 or model.dim == model.norm_groups, groups
    yield model.dim % 4 != 0, f"model.dim={model.dim} must be a multiple of 4 (sine and cosine of x and y)"
    strides = model.backbone.levels
    yield model.levels < len(strides), f"model.levels={model.levels} is less than the {len(strides)} backbone levels"
    yield list(strides) != sorted(set(strides)), f"model.backbone.levels={list(strides)} must be strides that increase"
    yield (
        augment.crop_min > augment.crop_max,
        (f"data.augment.crop_min={augment.crop_min} is above data.augment.crop_max={augment.crop_max}"),
    )
    steps = train.lr_steps
    yield list(steps) != sorted(set(steps)), f"train.lr_steps={list(steps)} must increase"
    yield (
        train.schedule == "step" and any(s >= train.epochs for s in steps),
        (
            f"train.lr_steps={list(steps)} must lie before the end, train.epochs={train.epochs}; "
            "shift them, or write train.lr_steps=[]"
        ),
    )
    yield (
        train.schedule == "step" and train.steps is not None and steps != (),
        f"train.lr_steps={list(steps)} are epochs, train.steps={train.steps} leaves none; set train.schedule=cosine",
    )
    yield (train.ema_decay or 0) >= 1, f"train.ema_decay={train.ema_decay} must be below 1"
    yield (
        model.name == "co_detr" and model.loss not in ("focal", "quality_focal"),
        (f"model.name=co_detr is the detector with score-based losses; model.loss={model.loss} makes it brs_detr"),
    )
    yield (
        model.atss.centerness and model.loss not in ("focal", "quality_focal"),
        (f"model.atss.centerness=true needs model.loss=focal; model.loss={model.loss} ranks by quality instead"),
    )
