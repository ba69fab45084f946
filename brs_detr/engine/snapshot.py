"""Snapshots of a training as named tensors and plain values, and restoring a training from them.

A snapshot is stored in safetensors files and one JSON file: nothing is pickled, so no content of a file can be executed
when a run is resumed. Sharded weights are gathered in the main process, tensor by tensor, and every process takes its
own part when they are loaded: the files are the same with and without sharding.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from brs_detr.engine.distributed import full_tensor
from brs_detr.engine.logging import LossMeter
from brs_detr.engine.optim import averages_of
from brs_detr.engine.storage import write_text
from brs_detr.engine.tensor_file import read_tensors, write_tensors
from brs_detr.exit_codes import CheckpointError
from brs_detr.user_files import require_unpacked

MODEL, AVERAGE, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
VALUES = "trainer.json"
Tensors = dict[str, Tensor]


@dataclass
class TrainerState:
    """Progress of a training; its field names are keys of the saved state.

    Attributes:
        epoch: epochs completed; also the number, from 0, of the current one.
        step_in_epoch: optimizer steps done in the current epoch.
        steps_per_epoch: optimizer steps of an epoch; 0 in states of earlier versions, which did not store them.
        step: optimizer steps done in total.
        best: highest validation AP so far; None before the first validation.
        worse: validations since the best one.
        skipped: steps skipped because a loss or gradient was not finite.
        skipped_in_a_row: steps skipped since the last step that was taken.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    steps_per_epoch: int = 0
    step: int = 0
    best: float | None = None
    worse: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def convert(self, steps_per_epoch: int, by_steps: bool) -> bool:
        """Go on with epochs of another number of steps; return True if that moves the position.

        Args:
            steps_per_epoch: of this run; the saved one may have had another total batch or training set.
            by_steps: True where the training's length is a number of steps: as many stay done. Otherwise the epochs
                stay, and the share done of the current one.
        """
        former, self.steps_per_epoch = self.steps_per_epoch, steps_per_epoch
        if former in (0, steps_per_epoch) or self.step == 0:
            return False
        if by_steps:
            unvalidated = int(self.step_in_epoch == former)  # saved between an epoch's last step and its validation
            self.epoch, done = divmod(self.step - unvalidated, steps_per_epoch)
            self.step_in_epoch = done + unvalidated
        else:  # rounded down: some images come twice rather than not at all
            self.step_in_epoch = self.step_in_epoch * steps_per_epoch // former
        return True


@dataclass(frozen=True)
class TrainingParts:
    """The parts of a training that are saved.

    Attributes:
        accelerator: of the launch; its gradient scaler is saved too.
        model: as `accelerator.prepare` returned it.
        optimizer: as `accelerator.prepare` returned it.
        average: the averaged model (EMA), or None.
        position: progress of the training.
        meter: loss terms not reported yet.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: AcceleratedOptimizer
    average: nn.Module | None
    position: TrainerState
    meter: LossMeter

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, parameter) of the trained parameters, in the optimizer's order."""
        names = {id(p): name for name, p in self.accelerator.unwrap_model(self.model).named_parameters()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], parameter


@dataclass(frozen=True)
class Snapshot:
    """The state of a training: tensors by file name and tensor name, and plain values."""

    tensors: dict[str, Tensors]
    values: dict[str, Any]

    def size(self) -> int:
        """Return the bytes of all tensors."""
        return sum(t.numel() * t.element_size() for named in self.tensors.values() for t in named.values())

    def write(self, folder: Path) -> None:
        """Write all files.

        Raises:
            NonFiniteError: a weight, average or optimizer state holds NaN or infinite numbers.
            StorageError: the disk is full or cannot be written to.
        """
        for name, tensors in self.tensors.items():
            write_tensors(folder / name, tensors)
        write_text(folder / VALUES, json.dumps(self.values, indent=1))


def take(training: TrainingParts) -> Snapshot:
    """Take a snapshot for the main process to write; every process calls it, since sharded tensors are gathered."""
    accelerator, named = training.accelerator, list(training.parameters())
    memory = [(name, key, t) for name, p in named for key, t in training.optimizer.state.get(p, {}).items()]
    tensors = {
        MODEL: accelerator.unwrap_model(training.model).state_dict(),
        OPTIMIZER: {f"{key}/{name}": tensor for name, key, tensor in memory if isinstance(tensor, Tensor)},
    }
    if training.average is not None:
        tensors[AVERAGE] = training.average.state_dict()
    for group in tensors.values():
        for name, tensor in group.items():
            if isinstance(tensor, DTensor):
                gathered = full_tensor(tensor)
                # On the CPU at once, and only in the main process: the gathered model need not fit on a GPU.
                group[name] = gathered.cpu() if accelerator.is_main_process else torch.empty(0)
    scaler = accelerator.scaler
    values = {
        "position": dataclasses.asdict(training.position),
        "meter": training.meter.state(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "trained": [name for name, _ in named],
    }
    return Snapshot(tensors, values)


def read(folder: Path, training: TrainingParts) -> Snapshot:
    """Read a snapshot, also one that Accelerate saved for an earlier version of the trainer; no code is executed.

    Raises:
        CheckpointError: a file is missing or damaged, or the state was saved by an earlier version with FSDP.
    """
    if any(folder.glob("pytorch_model_fsdp*")):
        raise CheckpointError(
            f"{folder}: was saved with FSDP by an earlier version, in files that only pickle reads. Start another run "
            "from the weights with train.init_from."
        )
    advice = "Remove this state to resume from the one before it."
    if not (folder / VALUES).exists() and (folder / "optimizer.bin").exists():
        return _read_earlier(folder, [name for name, _ in training.parameters()], advice)
    tensors = {name: read_tensors(folder / name, advice)[0] for name in (MODEL, OPTIMIZER)}
    if (folder / AVERAGE).exists():
        tensors[AVERAGE] = read_tensors(folder / AVERAGE, advice)[0]
    try:
        values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / VALUES}: cannot be read ({error}). {advice}") from None
    return Snapshot(tensors, values)


def put_back(training: TrainingParts, snapshot: Snapshot, source: Path) -> list[str]:
    """Restore a training from a snapshot; what another optimizer has kept of the parameters is left out.

    Args:
        training: freshly built, with the same detector.
        snapshot: of `read`.
        source: named in errors.

    Returns:
        Lines for the log.

    Raises:
        CheckpointError: the detector or its trained parameters differ, or the values are invalid.
    """
    values, tensors = snapshot.values, snapshot.tensors
    own = training.accelerator.unwrap_model(training.model).state_dict()
    named = dict(training.parameters())
    # Everything is checked before the first tensor is overwritten.
    try:
        position, trained = _position(values["position"]), set(values["trained"])
        moments = _by_parameter(tensors[OPTIMIZER])
        training.meter.set_state(values["meter"])
        if training.accelerator.scaler is not None and values["scaler"] is not None:
            training.accelerator.scaler.load_state_dict(values["scaler"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: {VALUES} has invalid content ({type(error).__name__}: {error}). Remove this state."
        ) from None
    _require_fit(source, own, tensors[MODEL], "model")
    changed = (trained | moments.keys()) ^ named.keys()
    if changed:
        raise CheckpointError(
            f"{source}: {len(changed)} parameters are trained in only one of the saved run and this one "
            f"({_some(sorted(changed))}). Restore train.freeze and the model's settings, or start another run from the "
            "weights with train.init_from."
        )
    notes, kept_averages = [], {key for kept in moments.values() for key in kept}
    if kept_averages and kept_averages != averages_of(training.optimizer.optimizer):
        moments = {}
        notes.append(f"optimizer: {source} was saved by one of another kind. The averages of this one start at zero.")
    sizes = {f"{key}/{name}": named[name] for name, kept in moments.items() for key, t in kept.items() if t.dim()}
    _require_fit(source, sizes, {name: tensors[OPTIMIZER][name] for name in sizes}, "optimizer's state")
    if training.average is not None:  # a run saved without EMA starts its average from the weights
        average = tensors.get(AVERAGE, tensors[MODEL])
        _require_fit(source, training.average.state_dict(), average, "averaged model")
        _fill(training.average.state_dict(), average)
    _fill(own, tensors[MODEL])
    _load_optimizer(training.optimizer, named, moments)
    vars(training.position).update(vars(position))
    return notes


def _load_optimizer(optimizer: AcceleratedOptimizer, named: dict[str, Tensor], moments: dict[str, Tensors]) -> None:
    """Restore the optimizer's state of each parameter; rates and decay are those of this run's config."""
    # Copies: tensors mapped from a file would keep its disk space in use after the state is deleted.
    state = {
        index: {key: _copy_like(_part_of(value, parameter), parameter) for key, value in moments[name].items()}
        for index, (name, parameter) in enumerate(named.items())
        if name in moments
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _copy_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Copy a part of the optimizer's state; one of the parameter's shape in its memory layout, as it was made."""
    if value.shape != parameter.shape or isinstance(value, DTensor):
        return value.clone()
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], tensors: Tensors) -> None:
    """Copy tensors into those of the same name."""
    for name, target in targets.items():
        target.copy_(_part_of(tensors[name], target))


def _part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor like another one, each process taking its own part; return other tensors unchanged."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _by_parameter(tensors: Tensors) -> dict[str, Tensors]:
    """Group tensors named as in "exp_avg/backbone.conv1.weight" by the name of the parameter."""
    grouped: dict[str, Tensors] = {}
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        grouped.setdefault(name, {})[key] = tensor
    return grouped


def _position(values: Mapping[str, Any]) -> TrainerState:
    """Build a `TrainerState` from JSON values, and check their types and signs."""
    position = TrainerState(**values)
    for field in dataclasses.fields(TrainerState):
        value = getattr(position, field.name)
        if field.name == "best":
            valid = value is None or type(value) in (int, float)
        else:
            valid = type(value) is int and value >= 0
        if not valid:
            raise ValueError(f"{field.name} is {value!r}")
    return position


def _require_fit(source: Path, own: Mapping[str, Tensor], stored: Mapping[str, Tensor], what: str) -> None:
    """Raise unless two sets of tensors agree in names and shapes."""
    shapes = {n: (tuple(stored[n].shape), tuple(own[n].shape)) for n in own.keys() & stored.keys()}
    faults = [f"{n} {s} there and {o} here" for n, (s, o) in sorted(shapes.items()) if s != o]
    faults += [f"{name} only there" for name in sorted(stored.keys() - own.keys())]
    faults += [f"{name} only here" for name in sorted(own.keys() - stored.keys())]
    if faults:
        raise CheckpointError(
            f"{source}: {len(faults)} tensors of the {what} do not match this run's detector ({_some(faults)}). "
            "Restore the model's settings, or start another run from the weights with train.init_from."
        )


def _read_earlier(folder: Path, trained: list[str], advice: str) -> Snapshot:
    """Read a state that Accelerate saved for an earlier version; only tensors and plain values are unpickled."""
    tensors = {MODEL: read_tensors(folder / "model.safetensors", advice)[0]}
    try:
        moments, position, meter = (
            _load_earlier(folder / name)
            for name in ("optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl")
        )
        scaler_path = folder / "scaler.pt"
        scaler = _load_earlier(scaler_path) if scaler_path.exists() else None
        if sum(len(group["params"]) for group in moments["param_groups"]) != len(trained):
            raise ValueError("the optimizer had another number of parameters")
        tensors[OPTIMIZER] = {f"{k}/{trained[i]}": t for i, s in moments["state"].items() for k, t in s.items()}
        if (average := position.pop("ema")) is not None:
            tensors[AVERAGE] = average
        pending = [[list(names), values.tolist()] for names, values in meter["pending"]]
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{folder}: holds pickled Python objects besides tensors and is not opened. {advice}"
        ) from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{folder}: cannot be read ({type(error).__name__}: {error}). {advice}") from None
    return Snapshot(tensors, {"position": position, "meter": pending, "scaler": scaler, "trained": trained})


def _load_earlier(path: Path) -> Any:
    """Unpickle tensors and plain values."""
    require_unpacked(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _some(names: Iterable[str], max_names: int = 3) -> str:
    """List the first few names."""
    shown = list(names)
    return ", ".join(shown[:max_names]) + (", ..." if len(shown) > max_names else "")
