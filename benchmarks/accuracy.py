"""What each loss is worth: dataset x detector x loss x seed, all with the steps of one recipe.

    python benchmarks/accuracy.py demo=datasets/demo --detectors brs_detr --losses brs rs focal --seeds 0 1 2 3 4
    python benchmarks/accuracy.py demo=datasets/demo --detectors atss faster_rcnn --losses brs score --jobs 2
    python benchmarks/accuracy.py demo=datasets/demo bccd=datasets/bccd --variant cost8 model.matcher.cls=8
    python benchmarks/accuracy.py demo=datasets/demo --detectors brs_dino --variant rank model.denoising.loss=rank
    python benchmarks/accuracy.py mine=FOLDER --recipe brs_detr_small_cpu --out runs/study.json

A run is `train.py RECIPE` from random weights in a process of its own, on one thread, followed by the evaluation of the
last epoch's averaged weights with every head: no epoch is chosen on the images that are reported. Results are kept in a
json beside the table, and what is in it is not run again; an interrupted run is resumed. A variant is a named change of
settings, compared with the run of the same seed without it ("a,b": with that of the variant "a"); with
train.eval_every=2 in it the json has the curve, too. A name that stands for other settings in the json is refused.
"decoder+nms" are the decoder's detections after class-wise NMS, "ensemble" those of all heads, joined by what the other
half of the images says of the heads. Intervals are those of Student's t over paired differences of seeds.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from scipy.stats import t as student
from torchvision.ops import batched_nms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cnn_overfit import machine
from cnn_overfit import settings as cnn_settings

from brs_detr.config import load_config
from brs_detr.data.build import open_val_set
from brs_detr.data.loader import build_eval_loader
from brs_detr.engine.predict import join_heads, predict_with_all_heads
from brs_detr.engine.storage import write_text
from brs_detr.evaluation.coco_eval import evaluate_coco
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.evaluation.results import detections_to_results
from brs_detr.evaluation.summary import Summary
from brs_detr.recipes import find_recipe
from brs_detr.run import setup
from brs_detr.run.scoring import learn_ensemble, score_detections

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy.json"
RANKING = ("brs", "rs", "bap", "ap", "balrp", "alrp", "bndcg", "ndcg")
LOSSES = (*RANKING, "focal", "quality_focal", "score")  # score: the detector's published score-based losses
# "score" of the DETR family is the published detector with its samplers, but with the class cost in the matching of the
# ranking one: what is compared are the losses
PUBLISHED = {"brs_detr": "co_detr", "brs_dino": "co_dino"}
# what a detector of the family needs in the recipes of BRS-DETR: as many denoising queries as others, few inside out
FAMILY = {"brs_detr": [], "brs_dino": ["model.denoising.queries=30", "model.denoising.box_noise=0.4"]}
FIGURES = ("AP", "AP50", "AP75", "mask_AP")
NMS_IOU = 0.6  # as in the ATSS head
NOT_COMPARED = "train.eval_every=1000"  # a curve does not change its run
SMALL_CNN = "cnn/{detector}_small.yaml"
# Recipes by dataset and detector. "*" is any CNN detector; the settings are what a detector needs on the dataset.
RECIPES: dict[str, dict[str, str]] = {
    "demo": {"brs_detr": "demo.yaml", "*": "cnn/{detector}_demo.yaml"},
    "bccd": {"brs_detr": "bccd_cpu.yaml", "*": SMALL_CNN},
    "nuclei": {"brs_detr": "nuclei_cpu.yaml", "*": SMALL_CNN},
}


@dataclass(frozen=True)
class Case:
    """One training: everything that its result depends on, but for the code."""

    dataset: str
    detector: str
    loss: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.dataset} {self.detector} {self.loss} {self.variant} {self.seed}"


def recipe_of(case: Case) -> str:
    """Path of a case's recipe: below `configs`, or a whole one."""
    recipes = RECIPES[case.dataset]
    return recipes["brs_detr" if case.detector in FAMILY else "*"].format(detector=case.detector)


def settings_of(case: Case, variants: dict[str, list[str]]) -> list[str]:
    """What a case changes in its recipe."""
    if case.detector in FAMILY:
        name = PUBLISHED[case.detector] if case.loss == "score" else case.detector
        loss = [f"model.name={name}"]
        if "model.denoising.loss=none" not in variants[case.variant]:  # else there is nothing that they could set
            loss += FAMILY[case.detector]
        loss.append("model.matcher.cls=4" if case.loss == "score" else f"model.loss={case.loss}")
    else:
        loss = cnn_settings(case.detector, case.loss)
    return [*loss, *variants[case.variant]]


def train(case: Case, data: Path, settings: list[str], folder: Path) -> float:
    """Train in a process of its own, or go on with what an interrupted one saved; returns its CPU seconds so far."""
    log, clock = folder.with_suffix(".log"), folder.with_suffix(".seconds")
    before = float(clock.read_text()) if clock.exists() else 0.0
    clock.write_text("nan")  # of a part that is killed together with this script nobody learns the seconds
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / recipe_of(case))]
    command += [
        f"data.root={data}",
        f"output_dir={folder}",
        f"seed={case.seed}",
        "data.workers=0",
        "train.eval_every=1000",
        "eval.report=false",
    ]
    command += [*settings, "--resume" if (folder / "state").exists() else "--overwrite"]
    with log.open("a") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = before + usage.ru_utime + usage.ru_stime
    clock.write_text(str(seconds))
    if process.returncode:
        raise RuntimeError(f"{case}: the training ended with exit code {process.returncode}. See {log}.")
    return seconds


def figures_by_head(weights: Path, data: Path) -> dict[str, dict[str, float]]:
    """COCO's figures of every head on the val split, and of the decoder after NMS."""
    model, loaded, config, _ = setup.restore(weights, [f"data.root={data}"])
    accelerator, dataset = Accelerator(cpu=True), open_val_set(config.data, config.model.has_masks)
    loader = build_eval_loader(dataset, config.eval.batch_size, workers=0)
    truth = GroundTruth.from_dataset(dataset.ground_truth(), dataset.masks)
    limits = {"score_threshold": config.eval.score_threshold, "max_detections": config.eval.max_detections}
    found: dict[str, list[dict[str, Any]]] = predict_with_all_heads(model, loader, accelerator, **limits)
    if "decoder" in found:
        joined = {"ensemble": join_by_other_half(found, loaded.category_ids, truth, model.join_iou)}
        found |= {"decoder+nms": [suppress(image) for image in found["decoder"]]} | (joined if len(found) > 1 else {})
    figures = {}
    for head, detections in found.items():
        summary, _ = score_detections(detections, loaded.category_ids, truth, config, accelerator)
        assert summary is not None
        figures[head] = {name: summary.stats[name] for name in FIGURES if name in summary.stats}
    return figures


def suppress(image: dict[str, Any]) -> dict[str, Any]:
    """An image's detections after class-wise NMS."""
    boxes, scores, labels = (torch.as_tensor(image[name]) for name in ("boxes", "scores", "labels"))
    kept = batched_nms(boxes.float(), scores, labels, NMS_IOU).numpy()
    return image | {name: image[name][kept] for name in ("boxes", "scores", "labels")}


def join_by_other_half(
    found: dict[str, list[dict[str, Any]]], category_ids: list[int], truth: GroundTruth, nms_iou: float
) -> list[dict[str, Any]]:
    """Join the heads' detections of each half of the images (every other one) as learned on the other half."""
    halves = [{head: images[start::2] for head, images in found.items()} for start in (0, 1)]
    joined = []
    for own, other in zip(halves, reversed(halves), strict=True):
        summaries = {head: summarize(images, category_ids, truth) for head, images in other.items()}
        joined += join_heads(own, learn_ensemble(other, summaries), nms_iou)
    return sorted(joined, key=lambda image: image["image_id"])


def summarize(images: list[dict[str, Any]], category_ids: list[int], truth: GroundTruth) -> Summary:
    """Evaluate the detections of some images of a dataset."""
    results = [result for one in images for result in detections_to_results(one["image_id"], one, category_ids)]
    return evaluate_coco(truth, results, image_ids=[one["image_id"] for one in images])


def folder_of(case: Case, work: Path) -> Path:
    """Return the folder of a case's training."""
    return work / str(case).replace(" ", "-")


def run(case: Case, data: Path, settings: list[str], work: Path) -> dict[str, Any]:
    """Train and evaluate a case."""
    folder = folder_of(case, work)
    folder.parent.mkdir(parents=True, exist_ok=True)
    seconds = train(case, data, settings, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["kind"] == "val"]
    figures = figures_by_head(folder / "last.safetensors", data)
    return {
        "heads": figures,
        "curve": [{key: line[key] for key in line if key == "epoch" or key.endswith("AP")} for line in validations],
        "cpu_seconds": None if math.isnan(seconds) else round(seconds),
        "steps": validations[-1]["step"],
        "recipe": Path(recipe_of(case)).stem,
        "settings": settings,
        "machine": machine(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the code that runs, with a `+` where files differ from it; empty without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def interval(values: list[float]) -> str:
    """Mean with the half width of its 95 % confidence interval, as text in AP points."""
    mean = 100 * statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.1f}"
    half = 100 * student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.1f} ± {half:.1f}"


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, as text in AP points."""
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f}" + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(results: dict[str, dict]) -> str:
    """The results as tables, one per dataset and detector, a line per loss, variant and head."""
    groups: dict[tuple[str, str], dict[tuple[str, str], dict[int, dict]]] = {}
    for name, result in results.items():
        dataset, detector, loss, variant, seed = name.split()
        groups.setdefault((dataset, detector), {}).setdefault((loss, variant), {})[int(seed)] = result
    machines = dict.fromkeys(result["machine"] for result in results.values())
    lines = ["# `python benchmarks/accuracy.py`", "", *machines, ""]
    for (dataset, detector), runs in groups.items():
        heads = list(dict.fromkeys(head for seeds in runs.values() for one in seeds.values() for head in one["heads"]))
        steps = {one["steps"] for seeds in runs.values() for one in seeds.values()}
        lines += [f"## {detector} on {dataset}", "", f"{' or '.join(map(str, sorted(steps)))} steps. AP in points.", ""]
        lines += [
            "| loss | settings | head | seeds | AP | AP50 | AP against | CPU s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for (loss, variant), seeds in runs.items():
            for head in heads:
                own = {seed: one for seed, one in seeds.items() if head in one["heads"]}  # older runs lack the ensemble
                lines += [line(runs, loss, variant, head, own)] if own else []
        lines.append("")
    return "\n".join(lines)


def line(
    runs: dict[tuple[str, str], dict[int, dict]], loss: str, variant: str, head: str, seeds: dict[int, dict]
) -> str:
    """A line of the table, with the paired differences from the recipe or from the score-based loss."""
    figures = {seed: one["heads"][head] for seed, one in sorted(seeds.items())}
    difference = ""
    references = [(loss, variant.rpartition(",")[0]), (loss, "recipe")]
    references += [("score", variant), ("score", "recipe"), ("focal", "recipe")]
    for reference in references:
        against = runs.get(reference, {})
        if reference == (loss, variant) or _steps(against) != _steps(seeds):
            continue
        others = {seed: one["heads"][head]["AP"] for seed, one in against.items() if head in one["heads"]}
        paired = [one["AP"] - others[seed] for seed, one in figures.items() if seed in others]
        if paired:
            name = " ".join(new for new, own in zip(reference, (loss, variant)) if new != own)
            difference = f"{interval(paired)} ({name}, {len(paired)})"
            break
    ap, ap50 = (spread([one[key] for one in figures.values()]) for key in ("AP", "AP50"))
    known = [one["cpu_seconds"] for one in seeds.values() if one["cpu_seconds"] is not None]
    seconds = f"{statistics.mean(known):.0f}" if known else ""
    return f"| {loss} | {variant} | {head} | {len(seeds)} | {ap} | {ap50} | {difference} | {seconds} |"


def _steps(seeds: dict[int, dict]) -> set[int]:
    """Lengths of some runs."""
    return {one["steps"] for one in seeds.values()}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `folders_of` reads."""
    parser.add_argument("data", nargs="+", help="NAME=FOLDER; these have recipes: " + ", ".join(RECIPES))
    parser.add_argument(
        "--recipe", help="name or file of BRS-DETR's recipe for the other datasets, whatever their names"
    )


def folders_of(args: argparse.Namespace) -> dict[str, Path]:
    """The folder of each dataset of the command line; those without recipes are given the one of `--recipe`."""
    folders = {}
    for item in args.data:
        name, equals, folder = item.partition("=")
        if not equals:
            raise SystemExit(f"{item}: no dataset. Write NAME=FOLDER.")
        if require_word(name, item) not in RECIPES:
            if args.recipe is None:
                raise SystemExit(f"{name}: has no recipe; {', '.join(RECIPES)} have. Name one by --recipe.")
            RECIPES[name] = {"brs_detr": str(find_recipe(args.recipe).resolve()), "*": SMALL_CNN}
        folders[name] = Path(folder).resolve()
    return folders


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--detectors", nargs="+", default=["brs_detr"])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["brs"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar=("NAME", "SETTING=VALUE"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each on one thread")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the json of results; the table is written beside it")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "accuracy", help="folder of the trainings")
    return parser.parse_args()


def cases_of(args: argparse.Namespace, datasets: Iterable[str], variants: dict[str, list[str]]) -> list[Case]:
    """All cases, seeds outermost: an interrupted study has something of everything."""
    return [
        Case(dataset, detector, loss, variant, seed)
        for seed in args.seeds
        for dataset in datasets
        for variant in variants
        for detector in args.detectors
        for loss in args.losses
    ]


def refuse_other_settings(cases: Iterable[Case], variants: dict[str, list[str]], results: dict[str, dict]) -> None:
    """Stop where a result of the same name was trained with another recipe or other settings than its case has now."""
    for case in cases:
        if str(case) not in results:
            continue
        recipe = ROOT / "configs" / recipe_of(case)
        if (known := results[str(case)].get("recipe", recipe.stem)) != recipe.stem:
            raise SystemExit(
                f"accuracy.py: the result of `{case}` has the recipe {known}, not {recipe.stem}. "
                "Give the dataset another name."
            )
        kept, now = results[str(case)]["settings"], settings_of(case, variants)
        if load_config(recipe, [*kept, NOT_COMPARED]) != load_config(recipe, [*now, NOT_COMPARED]):
            raise SystemExit(
                f"accuracy.py: the result of `{case}` has the settings {' '.join(kept)}, not {' '.join(now)}. "
                "Give the variant another name."
            )


def require_word(name: str, argument: str = "--variant") -> str:
    """The name of a variant or dataset, if it is one word, as the name of a case needs it."""
    if len(name.split()) != 1:
        raise SystemExit(f"{argument}: the name {name!r} is not one word. Leave out its spaces.")
    return name


def stored(out: Path) -> dict[str, dict]:
    """The results so far, by case."""
    return json.loads(out.read_text()) if out.exists() else {}


def keep(out: Path, results: dict[str, dict]) -> None:
    """Add results to the json, which several studies may share, and write its table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = dict(sorted((stored(out) | results).items()))
        text = table(results)  # before anything is written: it stops at a case that is no case
        write_text(out, json.dumps(results, indent=1) + "\n")
        write_text(out.with_suffix(".md"), text)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    folders = folders_of(args)
    variants = {require_word(name): settings for name, *settings in args.variant} or {"recipe": []}

    def finish(case: Case) -> None:
        result = run(case, folders[case.dataset], settings_of(case, variants), args.work)
        keep(args.out, {str(case): result})
        shutil.rmtree(folder_of(case, args.work))
        folder_of(case, args.work).with_suffix(".seconds").unlink()
        shown = ", ".join(
            f"{head} {figures['AP']:.3f}/{figures['AP50']:.3f}" for head, figures in result["heads"].items()
        )
        print(f"{case}: {shown}, {result['cpu_seconds']} s", flush=True)

    cases, results = cases_of(args, folders, variants), stored(args.out)
    refuse_other_settings(cases, variants, results)
    missing = [case for case in cases if str(case) not in results]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(finish, missing))
    keep(args.out, {})
    print(args.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
