"""Saved states, from which a run resumes: complete folders, verified before use, the last two kept.

A folder holds the files of a snapshot and a manifest with the checksum of every file and of itself. It is written under
another name and renamed when complete, and renamed again before it is deleted, so that a kill at any moment leaves
complete folders only. A damaged state is reported, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from brs_detr.engine.distributed import is_sharded
from brs_detr.engine.snapshot import Snapshot, TrainingParts, put_back, read, take
from brs_detr.engine.storage import FULL, flush_folder, together, write_text, writing
from brs_detr.exit_codes import CheckpointError

MANIFEST = "manifest.json"
NONE_YET = ".none-yet"  # in the folder of states until the first is saved; without it they were deleted
_NAME = re.compile(r"step-(\d+)(\.former)?")


def save_state(folder: Path, training: TrainingParts, metadata: dict[str, Any], keep: int = 2) -> list[str]:
    """Save a training; every process calls it.

    If the disk is full, older states are removed to make room for the new one.

    Args:
        folder: the run's folder of states.
        training: what is saved; its step is part of the name.
        metadata: stored in the manifest as JSON, e.g. the config.
        keep: number of states to keep.

    Returns:
        Lines for the log.

    Raises:
        StorageError: the disk is full or cannot be written to; earlier states are unchanged.
        NonFiniteError: a tensor holds NaN or infinite numbers; earlier states are unchanged.
    """
    position, accelerator = training.position, training.accelerator
    notes: list[str] = []
    metadata = metadata | {"step": position.step, "epoch": position.epoch, "sharded": is_sharded(accelerator)}
    snapshot = take(training)

    def save() -> None:
        tidy(folder)
        final = folder / f"step-{position.step:08d}"
        with writing(folder, needed=snapshot.size()):
            try:
                partial = _write(final, snapshot, metadata)
            except OSError as error:
                if error.errno not in FULL or not (removed := _make_room(folder, snapshot.size())):
                    raise
                names = ", ".join(removed)
                notes.append(f"{folder}: not enough room on the disk. Removed {names} to make room for {final.name}.")
                partial = _write(final, snapshot, metadata)
            _put_in_place(partial, final)
            (folder / NONE_YET).unlink(missing_ok=True)
        _remove_old(folder, position.step, keep)

    together(accelerator, save)
    return notes


def expect_first_state(folder: Path) -> None:
    """Note in the folder of states of a run that begins from scratch that none is saved yet.

    Raises:
        StorageError: the folder cannot be written to.
    """
    write_text(folder / NONE_YET, "")


def lacks_first_state(folder: Path) -> bool:
    """Return True if a run has begun and saved no state yet, False if its states were deleted."""
    return (folder / NONE_YET).is_file()


def load_state(state: Path, training: TrainingParts) -> list[str]:
    """Restore a training from a saved state; every process calls it.

    Returns:
        Lines for the log.

    Raises:
        CheckpointError: the state is damaged or of another detector; names the difference.
    """
    return put_back(training, read(state, training), state)


def latest_state(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged state.

    Returns:
        Its folder (None if there is no state), and a line for the log about each damaged one that was skipped.

    Raises:
        CheckpointError: there are states, but all are damaged.
    """
    warnings: list[str] = []
    for state in reversed(states(folder)):
        fault = find_fault(state)
        if fault is None:
            return state, warnings
        warnings.append(f"{state}: damaged ({fault}). Using the state before it.")
    if warnings:
        raise CheckpointError(
            f"{folder}: every saved state is damaged ({' '.join(warnings)}). Start again with --overwrite, or from "
            "the weights with train.init_from."
        )
    return None, []


def agreed_state(folder: Path, accelerator: Accelerator) -> tuple[Path | None, list[str]]:
    """Return `latest_state` of the main process in every process, so that all resume from the same state.

    Unfinished files of a killed process are removed first.

    Raises:
        CheckpointError: every state is damaged.
    """
    latest: list[Any] = [None]

    def look() -> None:
        tidy(folder)
        latest[0] = latest_state(folder)

    together(accelerator, look)
    if accelerator.num_processes > 1:
        broadcast_object_list(latest)
    state, warnings = latest[0]
    return state, warnings


def states(folder: Path) -> list[Path]:
    """List the folders of saved states, damaged ones included, the newest last.

    A state that is saved again at the same step is named `step-N.former` until the new one is in place.
    """
    named = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(named, key=lambda pair: (int(pair[0][1]), pair[0][2] is None))]


def tidy(folder: Path) -> None:
    """Remove what a killed process has left: partly written, partly deleted and replaced states."""
    for former in folder.glob("step-*.former"):
        if former.with_suffix("").exists():
            _remove(former)
        else:
            with contextlib.suppress(OSError):
                os.replace(former, former.with_suffix(""))
    for pattern in (".step-*.partial", ".step-*.deleted"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def find_fault(state: Path) -> str | None:
    """Check every file of a saved state against its checksum; return what is damaged, or None."""
    try:
        sums = _read_manifest(state)["files"]
    except CheckpointError as error:
        return str(error)
    for name, expected in sums.items():
        try:
            if _checksum(state / name) != expected:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def read_metadata(state: Path) -> dict[str, Any]:
    """Read the metadata given to `save_state`, with "step" and "epoch" (numbers of completed ones) and "sharded".

    Raises:
        CheckpointError: the manifest is damaged.
    """
    metadata: dict[str, Any] = _read_manifest(state)["facts"]
    return metadata


def _write(final: Path, snapshot: Snapshot, metadata: dict[str, Any]) -> Path:
    """Write a complete state under a temporary name, and remove it if that fails."""
    partial = final.with_name(f".{final.name}.partial")
    try:
        partial.mkdir(parents=True)
        snapshot.write(partial)
        sums = {file.name: _checksum(file) for file in sorted(partial.iterdir())}
        content = json.loads(json.dumps({"files": sums, "facts": metadata}))  # as it will be read
        write_text(partial / MANIFEST, json.dumps(content | {"sha256": _sum_of(content)}, indent=1))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial


def _put_in_place(partial: Path, final: Path) -> None:
    """Rename a complete state to its final name."""
    if final.exists():  # saved at this step before its validation: kept until the new one is in place
        former = final.with_name(f"{final.name}.former")
        os.replace(final, former)
        os.replace(partial, final)
        _remove(former)
    else:
        os.replace(partial, final)
    flush_folder(final.parent)


def _make_room(folder: Path, needed: int) -> list[str]:
    """Remove all states but the newest undamaged one, if that frees enough space; return the names of those removed."""
    saved = states(folder)
    newest = next((state for state in reversed(saved) if find_fault(state) is None), None)
    removed = [state for state in saved if newest is not None and state != newest]
    gain = sum(file.stat().st_size for state in removed for file in state.rglob("*"))
    if shutil.disk_usage(folder).free + gain < needed:
        return []
    for state in removed:
        _remove(state)
    return [state.name for state in removed]


def _remove_old(folder: Path, step: int, keep: int) -> None:
    """Remove all states but the last ones, also incomplete ones and those after the one this run resumed from."""
    saved = states(folder)
    complete = [state for state in saved if _number(state) <= step and _is_complete(state)]
    for state in saved:
        if state not in complete[-keep:]:
            _remove(state)


def _remove(state: Path) -> None:
    """Delete a state, renamed first so that a partly deleted one is never taken for a state."""
    doomed = state.with_name(f".{state.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(state, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _is_complete(state: Path) -> bool:
    """Return True if all files exist; their checksums, which take longer, are not compared."""
    try:
        return all((state / name).is_file() for name in _read_manifest(state)["files"])
    except (CheckpointError, OSError):
        return False


def _number(state: Path) -> int:
    """Return the step in a state's name."""
    match = _NAME.fullmatch(state.name)
    return int(match[1]) if match else -1


def _read_manifest(state: Path) -> dict[str, Any]:
    """Read {"files": checksum by name, "facts": ...}; manifests of earlier versions have no checksum of their own.

    Raises:
        CheckpointError: the manifest cannot be read, has changed since it was written, or is not one.
    """
    try:
        content: Any = json.loads((state / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{MANIFEST} cannot be read") from None
    files, metadata = (content.get(key) for key in ("files", "facts")) if isinstance(content, dict) else (None, None)
    if (
        not (isinstance(files, dict) and isinstance(metadata, dict) and content.keys() <= {"files", "facts", "sha256"})
        or not files
        or not all(isinstance(value, str) for value in files.values())
    ):
        raise CheckpointError(f"{MANIFEST} is not the manifest of a state")
    if not all(type(metadata.get(key)) is int for key in ("step", "epoch")):
        raise CheckpointError(f"{MANIFEST} does not say at which step and epoch the state was saved")
    if content.get("sha256", _sum_of(content)) != _sum_of(content):
        raise CheckpointError(f"{MANIFEST} has changed since it was written")
    manifest: dict[str, Any] = content
    return manifest


def _sum_of(manifest: dict[str, Any]) -> str:
    """Compute the checksum of a manifest's content."""
    # Sorted keys: the checksum must not depend on how the JSON was formatted.
    plain = json.dumps({key: manifest[key] for key in ("files", "facts")}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _checksum(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
