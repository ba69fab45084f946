"""Evaluate trained weights: `accelerate launch eval.py RUN_OR_CHECKPOINT [a.b=value ...] [--out FOLDER]`.

Prints COCO's figures, a table of classes and what is most often taken for what; writes `results.json` (COCO's result
format, the dataset's own category ids), `evaluation.json` (all figures), `per_class.csv`, `confusion.csv`,
`precision_recall.csv`, and pictures of them and of found and true boxes. Nothing but the weights file is needed:
classes and config travel inside it. The figures equal those that the training's validation printed for these weights;
where settings differ from the training's, that is said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

from brs_detr import config as configuration
from brs_detr import run
from brs_detr.config import ConfigError
from brs_detr.data.faults import DataError
from brs_detr.data.loader import build_eval_loader
from brs_detr.engine.checkpoint import CheckpointError, write_text
from brs_detr.engine.storage import StorageError, complain, end_output, writing
from brs_detr.evaluation.coco import GroundTruth
from brs_detr.evaluation.results import finite_results
from brs_detr.exit_codes import ExitCode, Interruption
from brs_detr.launch import start_accelerator
from brs_detr.report import write_curves, write_pictures
from brs_detr.resuming import require_writable
from brs_detr.scoring import dataset_notes, score
from brs_detr.user_files import forgive_output, printable

FIGURES = ("model.", "eval.", "data.test_", "data.antialias")  # beginnings of the settings that figures depend on
OPTIONAL = "confusion.csv confusion.png precision_recall.csv precision_recall.png pictures.png curves.png"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="run folder (its best weights) or .safetensors file")
    parser.add_argument("overrides", nargs="*", help="settings to change, e.g. data.root=/data/coco")
    parser.add_argument("--out", type=Path, help="folder to write to (default: evaluation/ beside the weights)")
    parser.add_argument("--pictures", type=int, default=12, help="example pictures to draw (default 12; 0: none)")
    options = parser.parse_intermixed_args(arguments)
    forgive_output()
    try:
        evaluate(options.weights, options.overrides, options.out, options.pictures)
    except (ConfigError, DataError, CheckpointError) as error:
        complain(error)
        return ExitCode.REFUSED
    except StorageError as error:
        complain(error)
        return ExitCode.STORAGE
    except Interruption as error:
        complain(error)
        return error.code
    return ExitCode.OK


def evaluate(weights_path: Path, overrides: list[str], out: Path | None = None, pictures: int = 0) -> None:
    """Evaluate a run folder's best weights, or a weights file, on the val split of its config."""
    model, weights, config, file = run.restore(weights_path, overrides)
    out = out or file.parent / "evaluation"
    require_writable(out, "--out")
    # prediction is in float32 whatever the training's precision, which this machine may not have
    accelerator = start_accelerator(replace(config, train=replace(config.train, precision="no")))
    dataset = run.open_val_set(config)
    run.require_same_categories(weights.classes, weights.category_ids, dataset, str(file))
    process = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    options = {"workers": run.worker_count(config), "timeout": config.data.timeout}
    loader = build_eval_loader(dataset, config.eval.batch_size, **options, **process)
    truth, listed = GroundTruth.read(dataset.ground_truth()), dataset.report["images_listed"]
    with contextlib.closing(loader):
        model.to(accelerator.device)
        summary, results = score(model, weights.category_ids, truth, loader, config, accelerator, listed)
    if summary is None:
        return
    stored = configuration.from_dict(weights.config, str(file))
    summary.notes += [*dataset_notes(dataset), *changed_settings(stored, config)]
    epoch = weights.extra.get("epoch", "?")
    with writing(out):
        for name in OPTIONAL.split():  # of an evaluation before, which may have had more to draw
            (out / name).unlink(missing_ok=True)
        write_text(out / "results.json", json.dumps(finite_results(results), allow_nan=False))
        summary.save(out, {"weights": str(file), "epoch": epoch, "annotations": dataset.json_path})
        write_pictures(out, dataset, results, pictures, summary.thresholds())
        write_curves(out, summary, file.parent / "metrics.jsonl")
    print(f"{printable(file)} (epoch {printable(epoch)}) on {printable(dataset.json_path)}\n")
    print(f"{summary.table()}\n\nsaved in {printable(out)}")


def changed_settings(stored: configuration.Config, used: configuration.Config) -> list[str]:
    """A note on the settings that bear on the figures and are not those that the weights were validated with."""
    changes = [change for change in configuration.differences(stored, used) if change.startswith(FIGURES)]
    changes = [change for change in changes if not change.startswith("eval.batch_size")]
    return [f"not as in the training: {'; '.join(changes)}"] if changes else []


if __name__ == "__main__":
    sys.exit(end_output(main()))
