"""How far the bucketed gradient of Rank & Sort lies from the exact one, on the logits of a real training.

    python benchmarks/bucketing_in_training.py configs/demo.yaml datasets/demo --steps 875 --every 25

Trains a recipe with `brs` and at every so many steps computes both gradients on the very logits, positives and
qualities of each prediction set: the relative L1 distance, and what the exact gradient says of the same step.
`losses_bucketing.py` does the same on drawn logits.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from itertools import chain, count, islice
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cnn_overfit import machine

from brs_detr.config import Config, load_config
from brs_detr.data.build import open_train_set
from brs_detr.data.loader import EpochBatches, build_train_loader
from brs_detr.engine.optim import Schedule, build_optimizer, set_learning_rate
from brs_detr.losses import rank_sort_loss
from brs_detr.losses.objective import PredictionSet, RankingObjective
from brs_detr.run import setup

RESULTS = Path(__file__).resolve().parent / "results" / "bucketing_in_training.md"
EPOCH_PARTS = 5  # lines of the table: the training is cut into as many parts


class Meter:
    """Measures the prediction sets that the ranking objectives of a detector are called with.

    Attributes:
        step: of the training.
        on: whether this step is measured.
        rows: one dict a set and measured step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.step, self.on, self.rows = 0, False, []
        for name, module in model.named_modules():
            if isinstance(module, RankingObjective):
                module.register_forward_pre_hook(lambda module, inputs, name=name: self.measure(name, module, *inputs))

    def measure(self, name: str, objective: RankingObjective, predictions: PredictionSet) -> None:
        """Compare the gradients of each set that an objective is given at once; sets without a positive have none."""
        if not self.on:
            return
        classes = predictions.logits.shape[-1]
        found = predictions.checked(classes)
        if not found.rows.shape[1]:
            return
        counted, positives = found.counted(), found.rows * classes + found.positive_labels()
        for layer, logits in enumerate(found.logits):
            valid = None if counted is None else counted[layer]
            self.compare(name, logits, positives[layer], found.quality[layer], valid, objective.delta)

    def compare(
        self, name: str, logits: Tensor, positives: Tensor, quality: Tensor, valid: Tensor | None, delta: float
    ) -> None:
        """Compare the gradients of one ranking, as `gradient` computes them."""
        exact, bucketed = (
            gradient(logits, positives, quality, valid, delta, method) for method in ("exact", "bucketed")
        )
        own = torch.zeros_like(exact, dtype=torch.bool)
        own[positives] = True
        self.rows.append(
            {
                "step": self.step,
                "objective": name.removesuffix(".objective") if name != "objective" else "decoder and its query sets",
                "positives": len(positives),
                "logits": logits.numel(),
                "negatives": distance(bucketed[~own], exact[~own]),
                "own": distance(bucketed[own], exact[own]),
                "cosine": torch.cosine_similarity(bucketed, exact, dim=0).item(),
            }
        )


def gradient(
    logits: Tensor, positives: Tensor, quality: Tensor, valid: Tensor | None, delta: float, method: str
) -> Tensor:
    """Gradient of both terms of Rank & Sort, flattened."""
    leaf = logits.detach().double().requires_grad_()
    terms = rank_sort_loss(leaf, positives, quality.double(), valid=valid, delta=delta, method=method)
    return torch.autograd.grad(sum(terms), leaf)[0].flatten()


def distance(value: Tensor, reference: Tensor) -> float:
    """Relative L1 distance; 0 where there is nothing to compare."""
    total = reference.abs().sum()
    return ((value - reference).abs().sum() / total).item() if total > 0 else 0.0


def train(config: Config, steps: int, every: int) -> list[dict]:
    """Train a recipe on one thread, measuring every so many steps."""
    torch.manual_seed(config.seed)
    data = open_train_set(config.data, config.seed)
    model = setup.build_detector(config, data.num_classes)
    meter = Meter(model)
    optimizer = build_optimizer(config.optim, model)
    schedule = Schedule(config.train.schedule, steps, warmup_steps=config.train.warmup_steps)
    loader = build_train_loader(data, config.train.total_batch_size, seed=config.seed)
    batches = chain.from_iterable(map(EpochBatches(loader).epoch, count()))
    for step, batch in enumerate(islice(batches, steps)):
        meter.step, meter.on = step, step % every == 0
        set_learning_rate(optimizer, schedule.factor(step))
        loss = sum(model(*batch).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or math.inf)
        optimizer.step()
        if meter.on:
            print(f"step {step}: loss {float(loss.detach()):.2f}", flush=True)
    return meter.rows


def table(rows: list[dict], steps: int, recipe: str) -> str:
    """Means over the sets of each objective and part of the training."""
    lines = [
        f"# `python benchmarks/bucketing_in_training.py configs/{recipe} DATA`",
        "",
        f"{steps} steps. Relative L1 distance of the bucketed from the exact gradient of ranking + sorting, and the",
        "cosine of the two, means over the prediction sets of an objective. " + machine(),
        "",
        "| objective | steps | positives | logits | on negatives | on positives | cosine |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["objective"] for row in rows):
        for part in range(EPOCH_PARTS):
            first, last = part * steps // EPOCH_PARTS, (part + 1) * steps // EPOCH_PARTS
            chosen = [row for row in rows if row["objective"] == name and first <= row["step"] < last]
            if chosen:
                keys = ("positives", "logits", "negatives", "own", "cosine")
                positives, logits, negatives, own, cosine = (
                    sum(row[key] for row in chosen) / len(chosen) for key in keys
                )
                lines.append(
                    f"| {name} | {first} to {last - 1} | {positives:.0f} | {logits:,.0f} | {negatives:.2%} | {own:.2%} "
                    f"| {cosine:.4f} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data", type=Path, help="data.root")
    parser.add_argument("--steps", type=int, default=875)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(args.recipe, [f"data.root={args.data}", "model.loss=brs", "data.workers=0"])
    rows = train(config, args.steps, args.every)
    args.out.with_suffix(".json").write_text(json.dumps(rows) + "\n")
    args.out.write_text(table(rows, args.steps, args.recipe.name))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
