"""The states a run resumes from: complete folders, verified before use, the last two kept.

A folder holds what `snapshot` writes and a manifest with the checksum of every file and of itself. It is written under
another name and renamed when complete, and renamed again before it is deleted, so a kill at any moment leaves complete
folders only; a damaged one is named and the one before it used.
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
from brs_detr.engine.snapshot import Snapshot, Training, put_back, read, take
from brs_detr.engine.storage import FULL, CheckpointError, flush_folder, together, write_text, writing

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)(\.former)?")


def save_state(folder: Path, training: Training, facts: dict[str, Any], keep: int = 2) -> list[str]:
    """Save a training; to be called by every process.

    Where the disk is full, the older ones of the saved states make room for the new one.

    Args:
        folder: the run's folder of states.
        training: what is saved; its step is part of the name.
        facts: JSON values stored in the manifest, e.g. the config.
        keep: number of states that stay.

    Returns:
        Sentences for the log.

    Raises:
        StorageError: the disk has no room, or may not be written to; the former states are as they were.
        NonFiniteError: a tensor holds NaN or infinite numbers; the former states are as they were.
    """
    position, accelerator, notes = training.position, training.accelerator, []
    facts = facts | {"step": position.step, "epoch": position.epoch, "sharded": is_sharded(accelerator)}
    snapshot = take(training)

    def save() -> None:
        tidy(folder)
        final = folder / f"step-{position.step:08d}"
        with writing(folder, needed=snapshot.size()):
            try:
                partial = _write(final, snapshot, facts)
            except OSError as error:
                if error.errno not in FULL or not (removed := _make_room(folder, snapshot.size())):
                    raise
                former = ", ".join(removed)
                notes.append(f"{folder}: not enough room on the disk; removed {former} to make room for {final.name}")
                partial = _write(final, snapshot, facts)
            _put_in_place(partial, final)
        _remove_old(folder, position.step, keep)

    together(accelerator, save)
    return notes


def load_state(state: Path, training: Training) -> None:
    """Set a training back to a saved state; every process calls it.

    Raises:
        CheckpointError: it is damaged, or of another detector; names what does not fit.
    """
    put_back(training, read(state, training), state)


def latest_state(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest state that is whole.

    Returns:
        Its folder (None where there is no state at all), and a sentence for each damaged one that was passed over.

    Raises:
        CheckpointError: there are states, but every one is damaged.
    """
    complaints = []
    for state in reversed(states(folder)):
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

    What a process that was killed has left unfinished is removed first.

    Raises:
        CheckpointError: every state is damaged.
    """
    found: list[Any] = [None]

    def look() -> None:
        tidy(folder)
        found[0] = latest_state(folder)

    together(accelerator, look)
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def states(folder: Path) -> list[Path]:
    """The folders of saved states, damaged ones included, the newest last.

    A state that is saved again at the same step bears the name `step-N.former` until the new one has its place.
    """
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), pair[0][2] is None))]


def tidy(folder: Path) -> None:
    """Remove what a process that was killed has left: states half written or half deleted, and former ones."""
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
    """What is wrong with a saved state, or None: every file is checked against its checksum."""
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


def read_facts(state: Path) -> dict[str, Any]:
    """The facts given to `save_state`, "step" and "epoch", the numbers of those completed, and "sharded".

    Raises:
        CheckpointError: the manifest is damaged.
    """
    return _read_manifest(state)["facts"]


def _write(final: Path, snapshot: Snapshot, facts: dict[str, Any]) -> Path:
    """A complete state under another name; nothing is left of one that could not be written to its end."""
    partial = final.with_name(f".{final.name}.partial")
    try:
        partial.mkdir(parents=True)
        snapshot.write(partial)
        sums = {file.name: _checksum(file) for file in sorted(partial.iterdir())}
        content = json.loads(json.dumps({"files": sums, "facts": facts}))  # as it will be read
        write_text(partial / MANIFEST, json.dumps(content | {"sha256": _sum_of(content)}, indent=1))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial


def _put_in_place(partial: Path, final: Path) -> None:
    if final.exists():  # saved before its validation: it stays until the new one has its place
        former = final.with_name(f"{final.name}.former")
        os.replace(final, former)
        os.replace(partial, final)
        _remove(former)
    else:
        os.replace(partial, final)
    flush_folder(final.parent)


def _make_room(folder: Path, needed: int) -> list[str]:
    """Remove all states but the newest one that is whole, where that is enough; the names of those removed."""
    found = states(folder)
    whole = next((state for state in reversed(found) if find_fault(state) is None), None)
    removed = [state for state in found if whole is not None and state != whole]
    gain = sum(file.stat().st_size for state in removed for file in state.rglob("*"))
    if shutil.disk_usage(folder).free + gain < needed:
        return []
    for state in removed:
        _remove(state)
    return [state.name for state in removed]


def _remove_old(folder: Path, step: int, keep: int) -> None:
    """Remove all states but the last ones: also those half deleted, and damaged ones from which this run went back."""
    found = states(folder)
    sound = [state for state in found if _number(state) <= step and _is_complete(state)]
    for state in found:
        if state not in sound[-keep:]:
            _remove(state)


def _remove(state: Path) -> None:
    """Delete a state; it loses its name first, so that half of one is never taken for a state."""
    doomed = state.with_name(f".{state.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(state, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _is_complete(state: Path) -> bool:
    try:
        return all((state / name).is_file() for name in _read_manifest(state)["files"])
    except (CheckpointError, OSError):
        return False


def _number(state: Path) -> int:
    match = _NAME.fullmatch(state.name)
    return int(match[1]) if match else -1


def _read_manifest(state: Path) -> dict[str, Any]:
    """{"files": checksum by name, "facts": ...}; those of earlier versions hold no checksum of their own.

    Raises:
        CheckpointError: it cannot be read, has changed since it was written, or is none.
    """
    try:
        content = json.loads((state / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{MANIFEST} cannot be read") from None
    files, facts = (content.get(key) for key in ("files", "facts")) if isinstance(content, dict) else (None, None)
    good = isinstance(files, dict) and isinstance(facts, dict) and content.keys() <= {"files", "facts", "sha256"}
    if not good or not files or not all(isinstance(value, str) for value in files.values()):
        raise CheckpointError(f"{MANIFEST} is no manifest of a state")
    if not all(type(facts.get(key)) is int for key in ("step", "epoch")):
        raise CheckpointError(f"{MANIFEST} does not say at which step and epoch the state was saved")
    if content.get("sha256", _sum_of(content)) != _sum_of(content):
        raise CheckpointError(f"{MANIFEST} has changed since it was written")
    return content


def _sum_of(manifest: dict[str, Any]) -> str:
    plain = json.dumps({key: manifest[key] for key in ("files", "facts")}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
