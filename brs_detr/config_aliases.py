"""Other names of settings: those of other programs, and those of our own files of before.

The nearest-name suggestions of an unknown setting look at `ALIASES` first. `migrate` reads weights files and states of
the time before each head had an objective of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_CLASSES = "the classes are read from `categories` of data.train_json. Leave it out."
_LAUNCH = "the launch chooses devices and processes. Leave it out and use `accelerate launch --num_processes N`."
_SIZES = (
    "image sizes are data.augment.short_sides and data.augment.long_side in training, data.test_short_side and "
    "data.test_long_side in evaluation."
)
_ACCUMULATION = (
    "gradients are accumulated where train.total_batch_size is more than train.per_device_batch_size times the number "
    "of processes. Set these two."
)
_RESUME = "a run is resumed from its output_dir. Add --resume."
_OPTIMIZER = "the optimizer is optim.name, adamw or sgd. Set it, optim.lr and optim.weight_decay."
_OBJECTIVES = (
    "each head has an objective of its own. Set model.objective (decoder), model.rpn.objective, model.roi.objective or "
    "model.atss.objective, e.g. model.rpn.objective.weight=1."
)

# what other programs call a setting, by the full name or its last word, and the setting here, or a sentence about it
ALIASES: dict[str, str] = {
    alias: target
    for target, names in {
        "train.total_batch_size": "batch_size batch bs train_batch_size ims_per_batch total_batch images_per_batch",
        "train.per_device_batch_size": "samples_per_gpu batch_size_per_gpu per_gpu_batch_size imgs_per_gpu "
        "per_device_train_batch_size micro_batch_size",
        "train.epochs": "epoch num_epochs max_epochs n_epochs num_train_epochs",
        "train.steps": "max_steps num_steps iters iterations max_iter max_iters num_iters",
        "train.schedule": "scheduler lr_scheduler lr_schedule lr_scheduler_type",
        "train.lr_steps": "lr_drop milestones",
        "train.lr_gamma": "gamma",
        "train.warmup_steps": "warmup warmup_iters warmup_epochs",
        "train.precision": "amp fp16 bf16 half mixed_precision dtype",
        "train.ema_decay": "ema ema_momentum use_ema",
        "train.eval_every": "eval_interval val_interval val_every eval_period",
        "train.log_every": "log_interval print_freq log_freq logging_steps log_period",
        "train.save_every": "save_interval checkpoint_interval checkpoint_period save_steps save_freq",
        "train.patience": "early_stopping",
        "train.init_from": "weights pretrained_weights checkpoint load_from finetune init_checkpoint",
        "train.trackers": "wandb tensorboard logger",
        "optim.lr": "learning_rate base_lr lr0",
        "optim.weight_decay": "wd",
        "optim.clip_norm": "clip_max_norm max_norm max_grad_norm grad_clip clip_grad clip_grad_norm gradient_clip_val",
        "optim.backbone_lr_factor": "lr_backbone backbone_lr",
        "model.backbone.name": "backbone model.backbone encoder_name arch",
        "model.name": "model detector",
        "model.queries": "num_queries num_query",
        "model.dim": "hidden_dim d_model embed_dim embed_dims",
        "model.heads": "nheads num_heads n_heads",
        "model.encoder_layers": "enc_layers num_encoder_layers",
        "model.decoder_layers": "dec_layers num_decoder_layers",
        "model.ffn_dim": "dim_feedforward feedforward_channels",
        "data.source": "dataset dataset_path data_yaml",
        "data.root": "data_root data_path data_dir dataset_dir coco_path",
        "data.train_json": "ann_file annotations train_ann train_annotations train_ann_file",
        "data.val_json": "val_ann val_annotations val_ann_file",
        "data.train_images": "image_dir img_dir img_prefix images train_dir",
        "data.val_images": "val_dir",
        "data.workers": "num_workers n_workers workers_per_gpu dataloader_num_workers",
        "eval.score_threshold": "score_thr score_thresh conf confidence threshold",
        "eval.max_detections": "max_dets max_per_img",
        "eval.nms.kind": "eval.nms nms",
        "output_dir": "out out_dir output outdir work_dir save_dir log_dir logdir checkpoint_dir",
        "seed": "random_seed manual_seed",
        _CLASSES: "num_classes classes nc n_classes class_names names num_labels",
        _LAUNCH: "gpus gpu num_gpus n_gpus ngpus device devices gpu_ids num_processes nproc_per_node world_size nodes",
        _SIZES: "img_size imgsz image_size input_size img_scale",
        _ACCUMULATION: "accumulate accum_iter accumulation_steps grad_accum gradient_accumulation_steps "
        "accumulate_grad_batches",
        _RESUME: "resume_from resume_from_checkpoint auto_resume",
        _OPTIMIZER: "optim optimizer optimizer.name optimizer.type optim.type optimizer_type",
        _OBJECTIVES: "ranking_weights score_weights loss_weights",
        "model.objective.delta": "ranking_delta",
        "model.objective.scope": "ranking_scope",
        "model.objective.loss": "loss loss_type criterion",
    }.items()
    for alias in names.split()
}

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
