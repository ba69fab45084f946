"""Settings of sections `optim`, `train` and `eval`: how a detector is optimized, for how long, and how it is scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from brs_detr.config_fields import BelowOne, Count, FilePath, Fraction, Null, OnlyWith, Positive, Unused, one_of
from brs_detr.models.config import HardNMS, NMSConfig, NoNMS, SoftNMS


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, as BRS-DETR is trained, or SGD, as the CNN detectors are."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 2e-4
    weight_decay: float = 1e-4
    betas: Annotated[tuple[BelowOne, BelowOne], OnlyWith("name", "adamw")] = (0.9, 0.999)
    momentum: Annotated[BelowOne, OnlyWith("name", "sgd")] = 0.9
    clip_norm: Annotated[Positive | None, Null("no clipping")] = 0.1
    backbone_lr_factor: float = 0.1
    sampling_offsets_lr_factor: float = 0.1
    # further factor for each backbone stage below the last; of EVA-02 for each block, the last one too;
    # refused for timm backbones whose stages it does not know by name
    backbone_layer_decay: float | None = None
    fused: bool = True  # on CUDA


@dataclass(frozen=True)
class TrainConfig:
    """Length, schedule and bookkeeping of the training."""

    epochs: Annotated[Count, OnlyWith("steps", None)] = 12
    steps: Count | None = None  # optimizer steps instead, rounded up to full epochs; for the cosine schedule
    schedule: Literal["step", "cosine"] = "step"
    lr_steps: Annotated[tuple[int, ...], OnlyWith("schedule", "step")] = (10, 11)  # epochs after which the rate falls
    lr_gamma: Annotated[float, OnlyWith("schedule", "step")] = 0.2  # factor by which it falls
    warmup_steps: int = 0  # optimizer steps
    warmup_start: Fraction = 0.0  # factor of the learning rate from which it rises
    total_batch_size: Count = 16  # images an optimizer step, over all processes and accumulated batches
    # at most, at once; null: the full share of a process; auto: as many as fit, found before the first epoch
    per_device_batch_size: Count | Literal["auto"] | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    compile: Literal["none", "layers"] = "none"  # layers: torch.compile of each encoder and decoder layer
    ema_decay: BelowOne | None = None
    eval_every: Count | None = 1  # epochs; null: about twenty validations altogether
    log_every: Count = 50  # optimizer steps
    gradient_ratio: bool = False  # log the ratio of negative to positive gradients of each head (aLRP loss, Fig. 4)
    save_every: Count | None = 1000  # optimizer steps between saved states; null: only after validations
    patience: Count | None = None  # validations without a better one before the training ends early; null: never
    trackers: tuple[str, ...] = ()  # of Accelerate: tensorboard, wandb, ...
    tf32: bool = True  # float32 products on a GPU may round their inputs to 10 bits
    overfit_batches: Count | None = None  # train and validate on the first images only, that many batches
    on_nonfinite: Literal["stop", "skip"] = "stop"
    # steps skipped in a row after which the training stops all the same
    max_skipped: Annotated[Count, OnlyWith("on_nonfinite", "skip")] = 20
    freeze: tuple[str, ...] = ()  # parts that stay as they are, by the beginning of their parameters' names
    init_from: FilePath | None = None  # run, file, official .pth or name of weights; other classes are allowed
    resume: bool = False  # go on with the run in `output_dir`
    overwrite: bool = False  # start over although `output_dir` holds a run
    allow_changes: bool = False  # resume although settings have changed

    def problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong between settings; `name` is that of the section."""
        steps = list(self.lr_steps)
        if steps != sorted(set(steps)):
            yield f"{name}.lr_steps={steps} must increase"
        if self.schedule != "step":
            return
        if any(step >= self.epochs for step in steps):
            yield (
                f"{name}.lr_steps={steps} must lie before the end, {name}.epochs={self.epochs}; "
                f"shift them, or write {name}.lr_steps=[]"
            )
        if self.steps is not None and steps:
            yield (
                f"{name}.lr_steps={steps} are epochs, {name}.steps={self.steps} leaves none; set {name}.schedule=cosine"
            )

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which settings are not read under the others; `name` is that of the section."""
        if self.warmup_steps == 0:
            yield Unused(f"{name}.warmup_start", f"{name}.warmup_steps=0", f"set {name}.warmup_steps above 0")
        if self.schedule == "step" and not self.lr_steps:
            yield Unused(f"{name}.lr_gamma", f"{name}.lr_steps=[]", f"give {name}.lr_steps")


@dataclass(frozen=True)
class EvalConfig:
    """Validation."""

    batch_size: Count = 1  # images a process
    score_threshold: float = 0.0
    max_detections: Count = 100
    # the head whose boxes count; auto: the best one of the validation, where BRS-DETR has three; ensemble: all of them
    predict_with: Literal["auto", "decoder", "roi", "atss", "head", "ensemble"] = "auto"
    # of the decoder's detections; the other heads have their `nms_iou`
    nms: NMSConfig = one_of(NoNMS(), SoftNMS(), HardNMS())
    # short sides in pixels that every image is resized to, one after the other, instead of data.test_short_side; the
    # long side's limit, data.test_long_side, grows in proportion; sides of squares where test images are squares. []:
    # one size
    test_scales: tuple[Count, ...] = ()
    test_flip: bool = False  # detect in the mirrored image, too; boxes of all views are joined by class-wise NMS
    calibrate: bool = True  # scores are precisions, by the map that the validation stores; false: as the detector's
    # a training writes the files of its best validation, their images to the trackers too, and report.html
    report: bool = True

    def unused(self, name: str) -> Iterator[Unused]:
        """Yield which settings are not read under the others; `name` is that of the section."""
        if self.predict_with in ("roi", "atss") and not isinstance(self.nms, NoNMS) and not self.joins_views:
            action = f"set {name}.predict_with to decoder, auto or ensemble"
            yield Unused(f"{name}.nms", f"{name}.predict_with={self.predict_with}", action)

    @property
    def joins_views(self) -> bool:
        """Whether `nms` joins the boxes of several views of an image, whatever the head."""
        return isinstance(self.nms, HardNMS) and (self.test_flip or len(self.test_scales) > 1)
