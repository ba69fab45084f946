"""AdamW parameter groups and the learning rate as a function of the step.

Groups are merged by (learning rate, weight decay): a handful of large ones step much faster than one a parameter. The
rate is a pure function of the optimizer step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor at each optimizer step.

    Attributes:
        kind: "step" (multiplied by `gamma` at each milestone) or "cosine" (to zero at `total_steps`).
        total_steps: length of the training in optimizer steps.
        milestones: steps from which the rate is lower, for "step".
        gamma: factor at each milestone.
        warmup_steps: linear rise over the first steps; 0 for none.
    """

    kind: str
    total_steps: int
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    warmup_steps: int = 0

    def factor(self, step: int) -> float:
        """Factor on every group's base rate at optimizer step 0, 1, ..."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.kind == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * min(step / self.total_steps, 1.0)))
        return rise * self.gamma ** sum(step >= milestone for milestone in self.milestones)


def lr_factor_of(name: str, factors: Mapping[str, float]) -> float:
    """Factor of the longest key that occurs in a parameter's name; 1 where none does."""
    keys = [key for key in factors if key in name]
    return factors[max(keys, key=len)] if keys else 1.0


def backbone_depth(name: str) -> int:
    """Position of a backbone parameter: 0 for the stem, i + 1 for stage i (timm's `layer1` or `layers.0`)."""
    found = re.search(r"(?:layers?[._]?|stages?[._]?|blocks[._]?)(\d+)", name)
    if not found:
        return 0
    counts_from_one = re.search(r"layer\d", name) is not None
    return int(found[1]) + (0 if counts_from_one else 1)


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    lr_factors: Mapping[str, float],
    backbone_layer_decay: float | None = None,
) -> list[dict]:
    """Trainable parameters grouped by learning rate.

    Args:
        model: parameters with `requires_grad=False` are left out.
        lr: base rate.
        weight_decay: of every parameter, biases and norms included (as the released recipes have it).
        lr_factors: factor on `lr` for parameters whose name contains the key; the longest key wins.
        backbone_layer_decay: further factor for each stage below the last of `backbone.*`; None for none.

    Returns:
        Groups for a torch optimizer with "params", "lr", "initial_lr", "weight_decay" and, for the log, "names".

    Raises:
        ValueError: no parameter is trainable.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter is trainable; check model.backbone.frozen_stages and the detector")
    deepest = max((backbone_depth(name) for name, _ in trainable if "backbone." in name), default=0)
    groups: dict[float, dict] = {}
    for name, parameter in trainable:
        rate = lr * lr_factor_of(name, lr_factors)
        if backbone_layer_decay is not None and "backbone." in name:
            rate *= backbone_layer_decay ** (deepest - backbone_depth(name))
        group = groups.setdefault(
            rate, {"params": [], "names": [], "lr": rate, "initial_lr": rate, "weight_decay": weight_decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return sorted(groups.values(), key=lambda group: -group["lr"])


def build_adamw(groups: list[dict], *, betas: tuple[float, float], fused: bool) -> AdamW:
    """AdamW over `parameter_groups`; fused only where every parameter lies on a CUDA device."""
    on_cuda = all(p.device.type == "cuda" for group in groups for p in group["params"])
    plain = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return AdamW(plain, lr=plain[0]["lr"], betas=betas, fused=fused and on_cuda)


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Scale every group's base rate; returns the highest rate now in force."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(all, trainable) numbers of a module's parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
