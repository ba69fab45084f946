"""The optimizer with its parameter groups, and the learning rate as a function of the step.

Parameters are grouped by learning rate: a few large groups step much faster than one per parameter. The rate is a pure
function of the optimizer step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from brs_detr.engine.batch_plan import TrainingLength
from brs_detr.engine.config import OptimConfig, TrainConfig
from brs_detr.exit_codes import Failure

_NORM = re.compile(r"\.norm\d*\.\w+$")
PYRAMID = "backbone.pyramid."  # a neck inside a backbone: it is not pretrained, and learns as the other necks do


class RateError(Failure, ValueError):
    """The settings of `optim` give a detector's parameters no learning rates; the message says what to change."""


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule: a factor at each optimizer step.

    Attributes:
        kind: "step" (multiplied by `gamma` at each milestone) or "cosine" (to zero at `total_steps`).
        total_steps: length of the training in optimizer steps.
        milestones: steps from which the rate is lower, for "step".
        gamma: factor at each milestone.
        warmup_steps: linear rise over the first steps; 0 for no warm-up.
        warmup_start: factor that the rise begins above.
    """

    kind: str
    total_steps: int
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    warmup_steps: int = 0
    warmup_start: float = 0.0

    def factor(self, step: int, done: int | None = None) -> float:
        """Return the factor on every group's base rate.

        Args:
            step: index of the optimizer step, in epochs of their present number of steps.
            done: steps taken before it, which the warm-up counts; None: `step`. Others where epochs had other numbers.
        """
        done = step if done is None else done
        # done + 1, so that the first step does not have a rate of 0.
        share = min(1.0, (done + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        rise = self.warmup_start + (1 - self.warmup_start) * share
        if self.kind == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * min(step / self.total_steps, 1.0)))
        return rise * self.gamma ** sum(step >= milestone for milestone in self.milestones)


def build_schedule(config: TrainConfig, length: TrainingLength) -> Schedule:
    """Build the learning-rate schedule of a training, with milestones in optimizer steps."""
    milestones = [epoch * length.steps_per_epoch for epoch in config.lr_steps]
    return Schedule(
        config.schedule, length.steps, milestones, config.lr_gamma, config.warmup_steps, config.warmup_start
    )


def lr_factor_of(name: str, factors: Mapping[str, float]) -> float:
    """Return the factor of the longest key contained in a parameter's name; 1 if no key is."""
    keys = [key for key in factors if key in name]
    return factors[max(keys, key=len)] if keys else 1.0


def backbone_depth(name: str) -> int | None:
    """Return the depth of a backbone parameter.

    Returns:
        0 for the stem, i + 1 for stage i (timm's `layer1` or `layers.0`) or block i of a ViT; None behind the last.
    """
    if "backbone.out_norm." in name:  # a Swin's norms behind each stage count as its stem, this one of a ViT does not
        return None
    stage = re.search(r"\.(?:layers?|stages?|blocks)[._]?(\d+)", name)
    if not stage:
        return 0
    counts_from_one = re.search(r"layer\d", name) is not None  # ResNets only
    return int(stage[1]) + (0 if counts_from_one else 1)


def require_depths(depths: Mapping[str, int | None], decay: float) -> None:
    """Check that `backbone_depth` knows the stages of a backbone.

    Args:
        depths: by parameter name, in the order in which they are registered.
        decay: of each stage, for the error.

    Raises:
        RateError: no parameter has a stage, or one behind the first stage has none; norms behind stages need none.
    """
    first = next((index for index, depth in enumerate(depths.values()) if depth), 0)
    unknown = [name for name, depth in list(depths.items())[first:] if depth == 0 and not _NORM.search(name)]
    if unknown:
        raise RateError(
            f"optim.backbone_layer_decay={decay}: the stage of {unknown[0]} is not known, nor that of "
            f"{len(unknown) - 1} more parameters. Set it to null, or use a ResNet, ConvNeXt, Swin or EVA-02."
        )


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate; those with `requires_grad=False` are left out.

    The weight decay applies to every parameter, biases and norms included, as in the released recipes.

    Returns:
        Groups for a torch optimizer with "params", "lr", "initial_lr", "weight_decay" and, for the log, "names".

    Raises:
        RateError: no parameter is trainable, or the stages of a backbone whose rate decays are not known.
    """
    factors = {
        "backbone.": config.backbone_lr_factor,
        PYRAMID: 1.0,
        "sampling_offsets": config.sampling_offsets_lr_factor,
    }
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise RateError("no parameter is trainable. Check train.freeze and model.backbone.frozen_stages.")
    decayed = [name for name, _ in trainable if "backbone." in name and PYRAMID not in name]
    depths = {name: backbone_depth(name) for name in decayed}
    if config.backbone_layer_decay is not None:
        require_depths(depths, config.backbone_layer_decay)
    deepest = max((depth for depth in depths.values() if depth is not None), default=0) + (None in depths.values())
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in trainable:
        rate = config.lr * lr_factor_of(name, factors)
        depth = depths.get(name)
        if config.backbone_layer_decay is not None and depth is not None:
            rate *= config.backbone_layer_decay ** (deepest - depth)
        group = groups.setdefault(
            rate, {"params": [], "names": [], "lr": rate, "initial_lr": rate, "weight_decay": config.weight_decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return sorted(groups.values(), key=lambda group: -group["lr"])


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """Build AdamW or SGD with the config's rates; fused only if every parameter is on a CUDA device already."""
    groups = parameter_groups(model, config)
    fused = config.fused and all(p.device.type == "cuda" for group in groups for p in group["params"])
    plain = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    if config.name == "sgd":
        return SGD(plain, lr=plain[0]["lr"], momentum=config.momentum, fused=fused)
    return AdamW(plain, lr=plain[0]["lr"], betas=config.betas, fused=fused)


def averages_of(optimizer: Optimizer) -> set[str]:
    """Return the names of the tensors that an optimizer of `build_optimizer` keeps of each parameter."""
    if isinstance(optimizer, SGD):
        return {"momentum_buffer"} if optimizer.defaults["momentum"] else set()
    return {"step", "exp_avg", "exp_avg_sq"}


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Scale every group's base rate; returns the highest resulting rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Count a module's parameters, as (all, trainable)."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
