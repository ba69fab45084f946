"""Guards for output_dir: never overwrite an existing run, never resume with incompatible settings."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import IO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from brs_detr.config import Config, ConfigError, differences, from_dict
from brs_detr.engine.batch_plan import BatchPlan
from brs_detr.engine.storage import CheckpointError

# settings in which a resumed run may differ: they change no number of the training
_FREE_TO_CHANGE = (
    "output_dir",
    "data.root",  # what lies there is compared instead, as are the annotations and the names of the images
    "data.train_",
    "data.val_",
    "data.workers",
    "data.timeout",
    "data.retry_seconds",
    "data.max_json_bytes",
    "data.allow_outside_images",  # what it lets in is compared with the rest of the images
    "train.resume",
    "train.overwrite",
    "train.allow_changes",
    "train.log_every",
    "train.save_every",
    "train.trackers",
    "train.on_nonfinite",
    "train.max_skipped",
    "eval.batch_size",
)

_held: list[IO[str]] = []  # a lock lasts as long as its file is open


def check_resumable(config: Config, plan: BatchPlan, facts: dict, state: Path, sharded: bool = False) -> list[str]:
    """Differences between a saved run and this one that would change its numbers.

    Args:
        config: of this run.
        plan: of this run.
        facts: stored with `state`.
        state: named in errors.
        sharded: does this launch shard the weights.

    Returns:
        The differences, when `train.allow_changes` permits them.

    Raises:
        ConfigError: there are some, and it does not.
        CheckpointError: the facts are none of a run.
    """
    launch = facts.get("launch")
    if not isinstance(launch, dict) or "config" not in facts:
        raise CheckpointError(f"{state}: does not say with which settings it was saved; use the state before it")
    saved = from_dict(facts["config"], str(state))
    changes = [c for c in differences(saved, config) if not c.startswith(_FREE_TO_CHANGE)]
    for name, value in dataclasses.asdict(plan).items():
        if launch.get(name) != value:
            changes.append(f"launch {name}: {launch.get(name)} -> {value}")
    was_sharded = facts.get("sharded", sharded)  # earlier versions did not say
    if was_sharded != sharded:
        changes.append(f"launch sharded (FSDP): {was_sharded} -> {sharded}")
    if changes and not config.train.allow_changes:
        raise ConfigError(
            f"{state}: the run to resume had other settings ({'; '.join(changes)}); "
            "restore them, or go on with train.allow_changes=true"
        )
    return changes


def require_same_data(config: Config, data: dict[str, str], facts: dict, state: Path) -> None:
    """Refuse to go on with a run whose annotations have changed: its epochs would hold other images.

    Args:
        config: of this run.
        data: fingerprints of the "train" and "val" annotations.
        facts: stored with `state`.
        state: named in the error.

    Raises:
        ConfigError: naming the files, unless `train.allow_changes` permits it.
    """
    paths = {"train": config.data.train_json, "val": config.data.val_json}
    former = facts.get("data", data)
    former = former if isinstance(former, dict) else {}
    changed = [paths[split] for split, digest in data.items() if former.get(split) != digest]
    if changed and not config.train.allow_changes:
        raise ConfigError(
            f"{' and '.join(changed)} changed since {state} was saved, or images are missing; restore them, "
            "or go on with train.allow_changes=true"
        )


def check_output_dir(config: Config) -> None:
    """Refuse to write over an existing run, unless told; keep other trainings out of the folder.

    Raises:
        ConfigError: the output folder cannot be written to, or it holds a run, and neither resuming nor overwriting was
            asked for.
    """
    train, folder = config.train, Path(config.output_dir)
    require_writable(folder, "output_dir")
    metrics = folder / "metrics.jsonl"
    exists = (metrics.exists() and metrics.stat().st_size > 0) or any((folder / "state").glob("step-*"))
    if exists and not (train.resume or train.overwrite):
        raise ConfigError(
            f"{folder} holds a run already: add --resume to go on with it, --overwrite to start anew, "
            "or choose another output_dir"
        )
    if int(os.environ.get("RANK", "0")) == 0:
        lock_output_dir(folder)


def remove_run(folder: Path) -> None:
    """Remove what a later resume could mistake for a new run's; once the new one is known to begin."""
    shutil.rmtree(folder / "state", ignore_errors=True)
    for name in ("best.safetensors", "last.safetensors"):
        (folder / name).unlink(missing_ok=True)


def lock_output_dir(folder: Path) -> None:
    """Keep other trainings out of a folder as long as this process lives, however it ends; only the main process does.

    A launcher that is killed may leave its processes training.

    Raises:
        ConfigError: another process trains there.
    """
    file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (closing it would give the folder up)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        who = file.read().strip()
        raise ConfigError(f"output_dir={folder}: {who} is training there; wait for its end or stop it") from None
    except OSError:
        return  # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held.append(file)


def require_shared_folder(config: Config, accelerator: Accelerator) -> None:
    """Refuse an output folder that is not one and the same for all processes: some would resume, others start anew.

    Raises:
        ConfigError: in every process, naming those that look elsewhere.
    """
    if accelerator.num_processes == 1:
        return
    folder = Path(config.output_dir)
    [name] = broadcast_object_list([f".launch-{time.time_ns()}"])
    if accelerator.is_main_process:
        (folder / name).touch()
    accelerator.wait_for_everyone()
    seen = gather_object([(accelerator.process_index, (folder / name).exists())])
    if accelerator.is_main_process:
        (folder / name).unlink()
    if elsewhere := [str(process) for process, sees in seen if not sees]:
        raise ConfigError(
            f"output_dir={folder}: process {', '.join(elsewhere)} sees another folder there than process 0; "
            "choose one that all machines share"
        )


def require_writable(folder: Path, name: str) -> None:
    """Make a folder, and a file in it for a moment, before hours are spent on what is to be written there.

    Raises:
        ConfigError: it cannot be done; names the setting or option `name`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{name}={folder}: cannot be written to ({error.strerror}); choose another folder") from None
