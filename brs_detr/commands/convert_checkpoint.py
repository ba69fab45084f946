"""The `convert` command: convert an official Co-DETR, Co-DINO or BRS-DETR checkpoint to a weights file, or back."""

from __future__ import annotations

import argparse

from brs_detr.checkpoints.official import export, from_official
from brs_detr.config import ConfigError
from brs_detr.engine.checkpoint import find_weights, save_weights
from brs_detr.models.backbones.weights_io import read_official


def run(options: argparse.Namespace) -> int:
    """Convert a checkpoint, print which tensors were matched or dropped, and return the exit code."""
    suffix = ".pth" if options.to_official else ".safetensors"
    if options.target.suffix != suffix or options.target.resolve() == options.source.resolve():
        raise ConfigError(f"{options.target}: the output file must differ from the source and end in {suffix}")
    if options.to_official:
        if options.augmentation or options.canvas:
            raise ConfigError(
                "--augmentation and --canvas are stored in our weights files; leave them out with --to-official"
            )
        count = export(find_weights(options.source), options.target)
        print(f"{options.target}: {count} tensors with official names written")
        return 0
    weights, report = from_official(
        read_official(options.source),
        str(options.source),
        options.num_classes_from,
        options.augmentation,
        options.canvas,
    )
    save_weights(options.target, weights)
    print(
        f"{options.source}: {report}\n{options.target} written; evaluate: brs-detr eval {options.target} data.root=..."
    )
    return 0
