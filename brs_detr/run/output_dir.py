"""Guards for output_dir: never overwrite an existing run, never resume with incompatible settings."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from brs_detr.config import Config, ConfigError, differences, from_dict
from brs_detr.engine.batch_plan import BatchPlan
from brs_detr.engine.state import lacks_first_state
from brs_detr.engine.storage import writing
from brs_detr.engine.trainer import BEST, LAST
from brs_detr.exit_codes import CheckpointError
from brs_detr.models.rcnn_config import MaskRCNNConfig
from brs_detr.run.drawings import remove_evaluation
from brs_detr.run.launch import TRACKED_AS
from brs_detr.run.setup import changes_measure, changes_training
from brs_detr.run.weights import EVALUATION

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_WEIGHTS = (BEST, LAST)
_locks: list[IO[str]] = []  # a lock is held as long as its file is open


def check_resumable(
    config: Config, plan: BatchPlan, metadata: dict[str, Any], state: Path, sharded: bool = False
) -> list[str]:
    """Compare the settings of a saved run with this run's, and list the differences that would change its numbers.

    Args:
        config: of this run.
        plan: of this run.
        metadata: stored with `state`.
        state: named in errors.
        sharded: True if this launch shards the weights.

    Returns:
        The differences, if `train.allow_changes` permits them.

    Raises:
        ConfigError: there are differences, and it does not.
        CheckpointError: the metadata is not of a training.
    """
    launch = metadata.get("launch")
    if not isinstance(launch, dict) or "config" not in metadata:
        raise CheckpointError(f"{state}: the settings of its run are missing. Use the state before it.")
    saved = from_dict(metadata["config"], str(state))
    changes = [c for c in differences(_resolved(saved), _resolved(config)) if changes_training(c)]
    for name, value in dataclasses.asdict(plan).items():
        if launch.get(name) != value:
            changes.append(f"launch {name}: {launch.get(name)} -> {value}")
    was_sharded = metadata.get("sharded", sharded)  # not stored by earlier versions
    if was_sharded != sharded:
        changes.append(f"launch sharded (FSDP): {was_sharded} -> {sharded}")
    if changes and not config.train.allow_changes:
        raise ConfigError(
            f"{state}: the run to resume had other settings ({'; '.join(changes)}). "
            "Restore them, or continue with train.allow_changes=true."
        )
    return changes


def _resolved(config: Config) -> Config:
    """Decide what follows from other settings: a run that was saved with `mask.loss=dice` may go on with auto."""
    model = config.model
    if not isinstance(model, MaskRCNNConfig):
        return config
    mask = model.mask.resolved(model.roi.objective)
    return dataclasses.replace(config, model=dataclasses.replace(model, mask=mask))


def require_same_data(config: Config, metadata: dict[str, Any], saved: dict[str, Any], state: Path) -> list[str]:
    """Compare the datasets of a saved run with this run's: with others its epochs would have other images.

    Args:
        config: of this run.
        metadata: of this run, from `setup.run_metadata`.
        saved: stored with `state`; states of earlier versions lack the fingerprints or the classes.
        state: named in errors.

    Returns:
        The annotation files that have changed, if `train.allow_changes` permits it.

    Raises:
        ConfigError: naming the files, if it does not; or the classes are others: the rows of the state's weights are
            those of its classes, in their order.
    """
    data, classes = metadata["data"], metadata["classes"]
    if saved.get("classes", classes) != classes:
        raise ConfigError(
            f"{state}: its classes or their order are not those of {config.data.train_json}. Restore the annotations, "
            "or start another run from the weights with train.init_from, which matches classes by name."
        )
    paths = {"train": config.data.train_json, "val": config.data.val_json}
    former = saved.get("data", data)
    former = former if isinstance(former, dict) else {}
    changed = [paths[split] for split, digest in data.items() if former.get(split) != digest]
    if changed and not config.train.allow_changes:
        raise ConfigError(
            f"{' and '.join(changed)} changed since {state} was saved, or images are missing. Restore them, "
            "or continue with train.allow_changes=true."
        )
    return changed


def changes_of_measure(config: Config, data: dict[str, str], metadata: dict[str, Any], state: Path) -> list[str]:
    """List what makes the figures of this run's validations incomparable with those of a saved run.

    Args:
        config: of this run.
        data: fingerprints of the "train" and "val" annotations.
        metadata: stored with `state`.
        state: named in errors.
    """
    saved = from_dict(metadata["config"], str(state))
    changes = [change for change in differences(_resolved(saved), _resolved(config)) if changes_measure(change)]
    former = metadata.get("data")
    if isinstance(former, dict) and former.get("val") != data["val"]:
        changes.append(f"the images or objects of {config.data.val_json}")
    return changes


def check_output_dir(config: Config) -> None:
    """Raise if the output folder holds a run that is neither resumed nor overwritten; lock it against other trainings.

    Raises:
        ConfigError: the folder cannot be written to, is in use by another training, or holds a run without --resume or
            --overwrite.
    """
    train, folder = config.train, Path(config.output_dir)
    require_writable(folder, "output_dir")
    metrics = folder / "metrics.jsonl"
    exists = (metrics.exists() and metrics.stat().st_size > 0) or any((folder / "state").glob("step-*"))
    if exists and not (train.resume or train.overwrite):
        raise ConfigError(
            f"{folder}: holds a run already. Add --resume to continue it or --overwrite to start again, "
            "or choose another output_dir."
        )
    if int(os.environ.get("RANK", "0")) == 0:
        lock_output_dir(folder)


def tensorboard_files(folder: Path) -> list[Path]:
    """List the files that TensorBoard's tracker has written in a run's folder; it draws all of them as one curve."""
    # By name: with output_dir=. it is the folder of this package.
    names = ("events.out.tfevents.*", "hparams.yml")
    return [path for name in names for path in sorted((folder / TRACKED_AS).rglob(name))]


def remove_run(folder: Path, tracked: Sequence[Path] = ()) -> None:
    """Remove what a run that is overwritten has left of its own; called once the new run is sure to begin.

    These are its states, weights, evaluation, report and batches that were not finite: beside the new run's files they
    would seem to be of it. The run itself replaces the log, metrics and settings.

    Args:
        folder: of the run.
        tracked: its `tensorboard_files`, listed before the new run's trackers have started.

    Raises:
        StorageError: a file cannot be removed.
    """
    shutil.rmtree(folder / "state", ignore_errors=True)
    with writing(folder):
        for path in (*(folder / name for name in (*_WEIGHTS, "report.html")), *folder.glob("nonfinite-*.pt"), *tracked):
            path.unlink(missing_ok=True)
        remove_evaluation(folder / EVALUATION)


def require_state(config: Config, state: Path | None, accelerator: Accelerator) -> None:
    """Raise if a run is resumed of which only the weights are left: starting from scratch would replace them.

    A run that was killed between its first weights and its first state is none of these: it repeats its first epochs.

    Args:
        config: of the run.
        state: the saved state to resume from, the same in every process; None if there is none.
        accelerator: of the launch.

    Raises:
        ConfigError: in every process, naming the weights.
    """
    if state is not None or not config.train.resume or config.train.overwrite:
        return
    folder = Path(config.output_dir)
    left = []
    if accelerator.is_main_process and not lacks_first_state(folder / "state"):
        left = [name for name in _WEIGHTS if (folder / name).is_file()]
    [left] = broadcast_object_list([left])
    if left:
        raise ConfigError(
            f"{folder}: no saved state to resume from, but weights ({', '.join(left)}), which a training from scratch "
            f"would replace. Add --overwrite to permit that, or train on from them in another output_dir with "
            f"train.init_from={folder / left[0]}."
        )


def lock_output_dir(folder: Path) -> None:
    """Lock a folder against other trainings; for the main process only.

    The lock lasts until `locks_released` or the end of this process, whichever way it ends.

    A killed launcher may leave its processes training. Windows has no such locks: there nothing is locked.

    Raises:
        ConfigError: another process trains there.
    """
    if fcntl is None:
        return
    file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (closing it would release the lock)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip()
        raise ConfigError(f"output_dir={folder}: {owner} is training there. Wait for it to end, or stop it.") from None
    except OSError:
        return  # this file system does not support locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks.append(file)


@contextmanager
def locks_released() -> Iterator[None]:
    """Release the locks of this process after a training, however it ends: a notebook lives on."""
    try:
        yield
    finally:
        while _locks:
            _locks.pop().close()


def require_shared_folder(config: Config, accelerator: Accelerator) -> None:
    """Raise if the output folder is not shared by all processes: some would resume and others start from scratch.

    Raises:
        ConfigError: in every process, naming those that see another folder.
    """
    if accelerator.num_processes == 1:
        return
    folder = Path(config.output_dir)
    # A file with a name of its own, created by the main process, has to be visible to all others.
    [name] = broadcast_object_list([f".launch-{time.time_ns()}"])
    if accelerator.is_main_process:
        (folder / name).touch()
    accelerator.wait_for_everyone()
    seen = gather_object([(accelerator.process_index, (folder / name).exists())])
    if accelerator.is_main_process:
        (folder / name).unlink()
    if elsewhere := [str(process) for process, sees in seen if not sees]:
        raise ConfigError(
            f"output_dir={folder}: process {', '.join(elsewhere)} sees another folder there than process 0. "
            "Choose one that all machines share."
        )


def require_writable(folder: Path, name: str) -> None:
    """Create a folder and check that files can be written there, before hours are spent on their content.

    Raises:
        ConfigError: the folder cannot be written to; names the setting or option `name`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{name}={folder}: cannot be written to ({error.strerror}). Choose another folder.") from None
