"""The state a run resumes from: complete folders, verified before use, the last two kept.

A folder holds what Accelerate saves (weights, optimiser, gradient scaler, sharded too under FSDP) and the trainer's own
state, with the checksum of every file. It is written under another name and renamed when complete, so a kill at any
moment leaves complete folders only; a damaged one is named and the one before it used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from brs_detr.engine.checkpoint import CheckpointError, write_text
from brs_detr.engine.sharding import is_sharded

MANIFEST = "manifest.json"


@dataclass
class Position:
    """Where a run stands; everything that is not a tensor of the model or the optimiser.

    Attributes:
        epoch: epochs completed; the one under way is `epoch` when counted from 0.
        step_in_epoch: optimiser steps done in the epoch under way.
        step: optimiser steps done altogether.
        best: highest validation figure so far; None before the first.
        worse: validations since the best one.
        skipped: steps skipped because something was not finite.
        ema: the averaged model, saved and restored with the rest; None where there is none.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best: float | None = None
    worse: int = 0
    skipped: int = 0
    ema: nn.Module | None = field(default=None, repr=False)

    def state_dict(self) -> dict[str, Any]:
        """Called by Accelerate when it saves."""
        values = {key: value for key, value in vars(self).items() if key != "ema"}
        tensors: dict[str, Tensor] | None = self.ema.state_dict() if self.ema is not None else None
        return {**values, "ema": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called by Accelerate when it loads."""
        for key, value in state.items():
            if key != "ema":
                setattr(self, key, value)
            elif self.ema is not None and value is not None:
                self.ema.load_state_dict(value)


def save_state(
    folder: Path, accelerator: Accelerator, position: Position, facts: dict[str, Any], keep: int = 2
) -> Path:
    """Save everything registered with `accelerator`; to be called by every process.

    Args:
        folder: the run's folder of states.
        accelerator: holds the prepared model, the optimiser and the registered `Position`.
        position: where the run stands; the step is part of the name.
        facts: JSON values stored in the manifest, e.g. the config.
        keep: number of states that stay.

    Returns:
        The new folder.
    """
    step, place = position.step, {"step": position.step, "epoch": position.epoch}
    final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sums = {str(file.relative_to(partial)): _checksum(file, flush=True) for file in _files(partial)}
        write_text(partial / MANIFEST, json.dumps({"files": sums, "facts": facts | place}, indent=1))
        if final.exists():  # saved before its validation: it stays until the new one has its place
            former = folder / f"{final.name}.former"
            shutil.rmtree(former, ignore_errors=True)
            os.replace(final, former)
            os.replace(partial, final)
            shutil.rmtree(former, ignore_errors=True)
        else:
            os.replace(partial, final)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def latest_state(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest state that is whole.

    Returns:
        Its folder (None where there is no state at all), and a sentence for each damaged one that was passed over.

    Raises:
        CheckpointError: there are states, but every one is damaged.
    """
    complaints = []
    for state in sorted(folder.glob("step-*"), reverse=True):
        fault = find_fault(state)
        if fault is None:
            return state, complaints
        complaints.append(f"{state}: damaged ({fault}); the state before it is used")
    if complaints:
        raise CheckpointError(
            f"{folder}: every saved state is damaged ({'; '.join(complaints)}); start again with --overwrite, "
            "or from the weights with train.init_from"
        )
    return None, []


def agreed_state(folder: Path, accelerator: Accelerator) -> tuple[Path | None, list[str]]:
    """`latest_state` as the main process finds it, in every process: all resume from the same one.

    Raises:
        CheckpointError: every state is damaged, or the newest one does not fit the launch (see `require_layout`).
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [latest_state(folder)]
        except CheckpointError as error:
            found = [error]
    [found] = broadcast_object_list(found)
    if isinstance(found, CheckpointError):
        raise found
    if found[0] is not None:
        require_layout(found[0], is_sharded(accelerator))
    return found


def require_layout(state: Path, sharded: bool) -> None:
    """Refuse a state whose weights lie on disk as this launch cannot read them.

    Raises:
        CheckpointError: it was saved with sharded weights and the launch does not shard, or the other way round.
    """
    was_sharded = any(state.glob("pytorch_model_fsdp*"))
    if was_sharded != sharded:
        was, now = ("with", "does not use") if was_sharded else ("without", "uses")
        raise CheckpointError(
            f"{state} was saved {was} FSDP, which this launch {now}; resume with the launch the run was started with, "
            "or start another run from its weights with train.init_from"
        )


def find_fault(state: Path) -> str | None:
    """What is wrong with a saved state, or None: every file is checked against its checksum."""
    try:
        sums = json.loads((state / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} cannot be read"
    for name, expected in sums.items():
        try:
            if _checksum(state / name) != expected:
                return f"{name} has changed since it was written"
        except OSError:
            return f"{name} cannot be read"
    return None


def read_facts(state: Path) -> dict[str, Any]:
    """The facts given to `save_state`, and "step" and "epoch", the numbers of those completed."""
    return json.loads((state / MANIFEST).read_text(encoding="utf-8"))["facts"]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _checksum(path: Path, flush: bool = False) -> str:
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
