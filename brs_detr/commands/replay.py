"""The `replay` command: rerun a batch that training saved because of a non-finite value, and report where it starts."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brs_detr.config import Config, ConfigError, from_dict
from brs_detr.engine.distributed import seed_step, to_device
from brs_detr.ops.images import ImageBatch
from brs_detr.run.launch import choose_device
from brs_detr.run.setup import build_detector, freeze, require_known_backbone
from brs_detr.user_files import require_unpacked

EXIT_REPRODUCED, EXIT_FINITE = 0, 1
_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(options: argparse.Namespace) -> int:
    """Replay a saved step and return the exit code: 0 if a value is not finite again, 1 if all are finite."""
    saved = read_saved(options.batch)
    device = choose_device(options.device)
    config = from_dict(saved["facts"]["config"], str(options.batch))
    require_known_backbone(config, options.batch)
    model = rebuild(config, saved, options.batch).to(device)
    batches = [
        (ImageBatch(batch["pixels"], batch["sizes"], batch["original_sizes"]), batch["targets"])
        for batch in saved["batches"]
    ]
    print(f"step {saved['step']}, process {saved['process']}, precision {config.train.precision}")
    seed_step(saved["seed"], saved["step"], saved["process"])
    findings: list[str] = []
    for number, (images, targets) in enumerate(batches):
        ids = ", ".join(str(target["image_id"]) for target in targets)
        objects = sum(len(target["boxes"]) for target in targets)
        print(f"batch {number + 1} of {len(batches)}: images {ids}; {objects} objects")
        model.zero_grad()  # each batch alone: accumulated gradients would hide which one is not finite
        lines = replay_batch(model, images.to(device), to_device(targets, device), config.train.precision)
        findings += [f"batch {number + 1}: {line}" if len(batches) > 1 else line for line in lines]
    print("\n".join(findings or ["everything is finite here: another process, device or precision was the cause"]))
    return EXIT_REPRODUCED if findings else EXIT_FINITE


def read_saved(path: Path) -> dict[str, Any]:
    """Read a file written by `save_batch`.

    Raises:
        ConfigError: the file is of another kind.
    """
    not_a_batch = ConfigError(f"{path}: not a batch saved by training. Give a file named nonfinite-STEP.pt.")
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    if not zipfile.is_zipfile(path):  # torch.load would try older formats, with less clear errors
        raise not_a_batch
    try:
        require_unpacked(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(f"{path}: holds Python objects besides tensors and is not opened") from None
    except Exception as error:  # torch raises many types for a damaged file
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    if not is_batch(saved):
        raise not_a_batch
    return saved


def is_batch(saved: Any) -> bool:
    """Return True if a value has the structure that `save_batch` writes."""
    kinds = {"seed": int, "step": int, "process": int, "facts": dict, "weights": dict, "batches": list}
    if not isinstance(saved, dict) or not all(isinstance(saved.get(key), kind) for key, kind in kinds.items()):
        return False
    metadata = saved["facts"]
    if not (isinstance(metadata.get("config"), dict) and isinstance(metadata.get("classes"), list)):
        return False
    return all(_is_stored(batch) for batch in saved["batches"])


def _is_stored(batch: Any) -> bool:
    if not isinstance(batch, dict) or not isinstance(batch.get("pixels"), Tensor):
        return False
    sizes: Any = batch.get("sizes")
    targets: Any = batch.get("targets")
    if not all(isinstance(value, list) for value in (sizes, batch.get("original_sizes"), targets)):
        return False
    needed = {"boxes", "labels", "image_id"}
    if not all(isinstance(target, dict) and needed <= target.keys() for target in targets):
        return False
    return len(targets) == len(batch["pixels"]) == len(sizes)


def rebuild(config: Config, saved: dict[str, Any], path: Path) -> nn.Module:
    """Build the detector of the failed step, in training mode.

    Raises:
        ConfigError: the weights are not those of the detector that the config describes.
    """
    model = build_detector(config, len(saved["facts"]["classes"]), initial_weights=False)
    freeze(model, config)
    try:
        model.load_state_dict(saved["weights"])
    except (RuntimeError, AttributeError, TypeError):
        raise ConfigError(
            f"{path}: its weights do not fit the detector of this version. Replay it with the version that saved it."
        ) from None
    return model.train()


def replay_batch(model: nn.Module, images: ImageBatch, targets: list[dict[str, Any]], precision: str) -> list[str]:
    """Run a forward and a backward pass, and describe the values that are not finite, the earliest first."""
    findings = [f"image {t['image_id']} has a box that is not finite" for t in targets if not all_finite([t["boxes"]])]
    modules: list[str] = []
    # inner modules run first, so the first name is the innermost culprit
    hooks = [
        module.register_forward_hook(_name_recorder(name, modules)) for name, module in model.named_modules() if name
    ]
    dtype = _PRECISION.get(precision)
    with torch.autocast(images.pixels.device.type, dtype=dtype, enabled=dtype is not None):
        losses = model(images, targets)
    for hook in hooks:
        hook.remove()
    if modules:
        findings.append(f"the first module whose output is not finite: {modules[0]} ({len(modules)} in total)")
    bad = [name for name, value in losses.items() if not all_finite([value])]
    if bad:
        findings.append(f"loss terms that are not finite: {', '.join(bad)}")
    torch.stack(list(losses.values())).sum().backward()
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not all_finite([p.grad])]
    if bad:
        findings.append(f"gradients that are not finite: {len(bad)} parameters, the first is {bad[0]}")
    return findings


def all_finite(values: Iterable[Any]) -> bool:
    """Return True if every floating-point tensor among the values is finite."""
    return all(bool(torch.isfinite(v).all()) for v in values if isinstance(v, Tensor) and v.is_floating_point())


def _name_recorder(name: str, names: list[str]) -> Callable[[nn.Module, tuple, Any], None]:
    """Make a forward hook that adds the module's name to `names` if its output is not finite."""

    def record(module: nn.Module, inputs: tuple, output: Any) -> None:
        values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
        if not all_finite(values):
            names.append(name)

    return record
