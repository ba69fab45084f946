"""`convert`: an official Co-DETR or BRS-DETR checkpoint as a weights file for eval.py and fine-tuning."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brs_detr.config import ConfigError, load_config, to_dict
from brs_detr.convert.keys import to_ours
from brs_detr.engine.checkpoint import CheckpointError, Weights, save_weights
from brs_detr.run import build_detector


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `convert`."""
    parser.add_argument("config", help="the recipe that the checkpoint belongs to")
    parser.add_argument("checkpoint", type=Path, help="official .pth file")
    parser.add_argument("out", type=Path, help=".safetensors file to write")
    parser.add_argument("overrides", nargs="*", help="settings to change")
    parser.add_argument(
        "--classes", type=Path, required=True, help="COCO json whose categories, in its order, it knows"
    )


def run(options: argparse.Namespace) -> int:
    """Convert, check against the recipe's detector, write; returns the exit code."""
    config = load_config(options.config, options.overrides)
    tensors, unknown = to_ours(read_official(options.checkpoint))
    # the official code numbers classes in the order of the json
    categories = json.loads(options.classes.read_text(encoding="utf-8"))["categories"]
    model = build_detector(config, len(categories), initial_weights=False)
    state = model.state_dict()
    missing = sorted(set(state) - set(tensors))
    odd = [name for name in state if name in tensors and state[name].shape != tensors[name].shape]
    if missing or unknown or odd:
        raise ConfigError(
            f"{options.checkpoint}: does not fit {options.config} with {len(categories)} classes: "
            f"{len(missing)} tensors missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}, "
            f"{len(odd)} of another shape {odd[:3]}"
        )
    names, ids = [entry["name"] for entry in categories], [entry["id"] for entry in categories]
    save_weights(options.out, Weights({name: tensors[name] for name in state}, names, ids, to_dict(config)))
    print(f"{len(state)} tensors written to {options.out}")
    return 0


def read_official(path: Path) -> dict[str, Tensor]:
    """The state dict of an official file, without wrappers and prefixes.

    Raises:
        CheckpointError: absent, or not a torch file of plain tensors.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise CheckpointError(f"{path}: not a torch file of plain tensors ({str(error).splitlines()[0]})") from None
    state = content.get("state_dict", content)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
