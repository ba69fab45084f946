"""What each CNN detector learns of eight images with each loss, in equally many steps.

    python benchmarks/cnn_overfit.py datasets/bccd
    python benchmarks/cnn_overfit.py datasets/bccd --detectors atss --losses brs score --steps 100 --out /tmp/few.md
    python benchmarks/cnn_overfit.py datasets/nuclei --detectors mask_rcnn yolact solov2 --max-side 256

Every run trains a recipe of `configs/cnn` (`NAME_small.yaml`) from random weights on the first images of a training
set in COCO format, without augmentation, and evaluates it on the same images. Finished runs are kept in a json beside
the table and are not repeated; `--again` repeats them. "score" is the published score-based loss of a detector.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import timm
import torch
import torchvision
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brs_detr.config import Config, dump, load_config
from brs_detr.data.build import build_eval_transforms, open_val_set
from brs_detr.data.loader import collate
from brs_detr.engine.optim import Schedule, build_optimizer, set_learning_rate
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.losses.balance import set_epoch_length
from brs_detr.ops.images import Batch
from brs_detr.run import setup
from brs_detr.run.dataset import write_subset
from brs_detr.run.scoring import score

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cnn_overfit_cpu.md"
RANKING = ("brs", "rs", "bap", "ap", "balrp", "alrp")
# Each detector with the settings of its published score-based loss.
SAMPLED = (
    "model.rpn.objective.loss=binary_cross_entropy model.rpn.box_loss=l1 model.rpn.sample=256 "
    "model.roi.objective.loss=cross_entropy model.roi.box_loss=l1 model.roi.sample=512"
)
SCORE_BASED = {
    "retinanet": "model.loss=focal",
    "foveabox": "model.loss=focal model.head.box_loss=smooth_l1",
    "atss": "model.loss=focal model.head.centerness=true model.head.objective.weights.centerness=1",
    "paa": "model.loss=focal model.head.iou_branch=true",
    "faster_rcnn": SAMPLED,
    "cascade_rcnn": f"{SAMPLED} model.roi.stage_weights=[1,.5,.25] model.roi.std_divisors=[1,2,3]",
    "mask_rcnn": SAMPLED,
    "yolact": "model.loss=focal",
    "solov2": "model.loss=focal",
}
EVERY_LOSS = (*RANKING, "score")
WITH_MASKS = ("mask_rcnn", "yolact", "solov2")
WITH_EVERY_LOSS = ("atss", "faster_rcnn")  # the others are trained with brs and the score-based loss


def settings(detector: str, loss: str) -> list[str]:
    """What to change in a detector's recipe for a loss."""
    return SCORE_BASED[detector].split() if loss == "score" else [f"model.loss={loss}"]


def read_batches(
    config: Config, num_images: int, folder: Path, max_side: int | None = None
) -> tuple[list[Batch], GroundTruth, list[int]]:
    """The first images of the training set at test size, their annotations, and the ids of the categories."""
    data, target = config.data, folder / "subset.json"
    content = json.loads(Path(data.root, data.train_json).read_text())
    if max_side is not None:
        content["images"] = [image for image in content["images"] if max(image["height"], image["width"]) <= max_side]
    write_subset(content, target, num_images)
    subset = replace(data, val_json=str(target.resolve()), val_images=data.train_images)
    dataset = open_val_set(subset, config.model.has_masks)
    resize = build_eval_transforms(subset)
    # with masks, which the batches of an evaluation leave out
    samples = [resize(*dataset.load(index)) for index in range(len(dataset))]
    size = config.train.total_batch_size
    batches = [collate(samples[start : start + size]) for start in range(0, len(samples), size)]
    return batches, GroundTruth.from_dataset(dataset.ground_truth(), dataset.masks), dataset.category_ids


def train_and_score(config: Config, batches: list[Batch], truth: GroundTruth, ids: list[int], steps: int) -> dict:
    """Train on the batches in turn for `steps`, then evaluate on them; the time is the CPU's of the steps."""
    accelerator = Accelerator(cpu=True)
    model, train = setup.build_detector(config, len(ids)), config.train
    set_epoch_length(model, len(batches))
    optimizer = build_optimizer(config.optim, model)
    schedule = Schedule(train.schedule, steps, warmup_steps=train.warmup_steps, warmup_start=train.warmup_start)
    started = time.process_time()
    for step in range(steps):
        set_learning_rate(optimizer, schedule.factor(step))
        terms = model(*batches[step % len(batches)])
        optimizer.zero_grad()
        sum(terms.values()).backward()
        if config.optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        if (step + 1) % train.log_every == 0:
            values = (f"{name} {float(value.detach()):.3f}" for name, value in terms.items())
            print(f"  step {step + 1}:", *values, flush=True)
    seconds = time.process_time() - started
    summary, _ = score(model, ids, truth, batches, config, accelerator)
    assert summary is not None
    figures = {name: summary.stats[name] for name in ("AP", "AP50", "mask_AP", "correlation") if name in summary.stats}
    return {**figures, "seconds": seconds}


def describe(config: Config, args: argparse.Namespace) -> str:
    """All that a result depends on, but for where the data lies."""
    unplaced = replace(config, output_dir="", data=replace(config.data, root=""))
    subset = f"{args.images} {args.steps}" + (f" {args.max_side}" if args.max_side else "")
    return hashlib.sha256(f"{dump(unplaced)}{subset}".encode()).hexdigest()[:16]


def table(results: dict[str, dict]) -> str:
    """The results as a table, with the machine and the versions."""
    runs = results.values()
    first, machines = next(iter(runs)), dict.fromkeys(run["machine"] for run in runs)
    lines = [
        "# `python benchmarks/cnn_overfit.py DATA`",
        "",
        f"Every run: {first['images']} images trained on and evaluated on, {first['steps']} steps of {first['batch']} "
        f"images from random weights, seed {first['seed']}.",
        "Seconds are CPU time of all steps, on one thread.",
        *machines,
        "",
        "| detector | data | loss | AP | AP50 | mask AP | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in results.items():
        detector, loss = name.split()
        figures = [f"{run[key]:.3f}" if key in run else "" for key in ("AP", "AP50", "mask_AP")]
        lines.append(f"| {detector} | {run['data']} | {loss} | {' | '.join(figures)} | {run['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Cores and versions."""
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, torchvision, timm))
    today = time.strftime("%Y-%m-%d", time.gmtime())
    return f"{os.cpu_count()} {platform.machine()} cores, Python {platform.python_version()}, {versions}; {today}."


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with annotations/train.json and images/")
    parser.add_argument(
        "--detectors",
        nargs="+",
        default=[name for name in SCORE_BASED if name not in WITH_MASKS],
        choices=list(SCORE_BASED),
        help="default: those that learn no masks",
    )
    parser.add_argument("--losses", nargs="+", choices=[*RANKING, "score"], help="default: see the table")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--max-side", type=int, help="leave out larger images, whose objects would become too small")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table; a json beside it keeps the results")
    parser.add_argument("--again", action="store_true", help="repeat runs that are in the json")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="changes to every recipe")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    kept = args.out.with_suffix(".json")
    results: dict[str, dict] = json.loads(kept.read_text()) if kept.exists() else {}
    for detector in args.detectors:
        for loss in args.losses or (EVERY_LOSS if detector in WITH_EVERY_LOSS else ("brs", "score")):
            name = f"{detector} {loss}"
            config = load_config(
                ROOT / "configs" / "cnn" / f"{detector}_small.yaml",
                [f"data.root={args.data}", *settings(detector, loss), *args.set],
            )
            recipe = describe(config, args)
            if not args.again and results.get(name, {}).get("recipe") == recipe:
                continue
            print(f"{name}:", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                batches, truth, ids = read_batches(config, args.images, Path(folder), args.max_side)
                figures = train_and_score(config, batches, truth, ids, args.steps)
            print("  " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)
            facts = {"recipe": recipe, "data": args.data.name, "images": args.images, "steps": args.steps}
            facts |= {"batch": config.train.total_batch_size, "seed": config.seed, "machine": machine()}
            results[name] = figures | facts
            order = [f"{d} {l}" for d in SCORE_BASED for l in EVERY_LOSS]
            results = {key: results[key] for key in order if key in results}
            kept.write_text(json.dumps(results, indent=1) + "\n")
            args.out.write_text(table(results))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
