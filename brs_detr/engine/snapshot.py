"""What a training consists of at one moment, as named tensors and plain values, and a training set back to it.

Everything goes into safetensors files and one JSON file: nothing is pickled, so nothing that a file holds can be
executed when a run is resumed. Sharded weights are gathered in the main process, tensor by tensor, and every process
takes its own part when they are loaded: the files are the same with and without sharding.
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

from brs_detr.engine.distributed import whole
from brs_detr.engine.logging import LossMeter
from brs_detr.engine.storage import CheckpointError, write_text
from brs_detr.engine.tensor_file import read_tensors, write_tensors
from brs_detr.user_files import require_unpacked

MODEL, AVERAGE, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
VALUES = "trainer.json"
Tensors = dict[str, Tensor]


@dataclass
class TrainerState:
    """Where a run stands.

    Attributes:
        epoch: epochs completed; the one under way is `epoch` when counted from 0.
        step_in_epoch: optimizer steps done in the epoch under way.
        step: optimizer steps done altogether.
        best: highest validation figure so far; None before the first.
        worse: validations since the best one.
        skipped: steps skipped because something was not finite.
        skipped_in_a_row: those of them since the last step that was taken.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best: float | None = None
    worse: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Training:
    """The parts of a training that are saved.

    Attributes:
        accelerator: of the launch; its gradient scaler is saved too.
        model: as `accelerator.prepare` returned it.
        optimizer: as `accelerator.prepare` returned it.
        average: the averaged model; None where there is none.
        position: where the run stands.
        meter: loss terms that are not reported yet.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: AcceleratedOptimizer
    average: nn.Module | None
    position: TrainerState
    meter: LossMeter

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) of what is trained, in the optimizer's order."""
        names = {id(p): name for name, p in self.accelerator.unwrap_model(self.model).named_parameters()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], parameter


@dataclass(frozen=True)
class Snapshot:
    """A training at one moment: tensors by file name and tensor name, and plain values."""

    tensors: dict[str, Tensors]
    values: dict[str, Any]

    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for named in self.tensors.values() for t in named.values())

    def write(self, folder: Path) -> None:
        """Write all files.

        Raises:
            NonFiniteError: a weight, average or optimizer state holds NaN or infinite numbers.
            StorageError: the disk has no room, or may not be written to.
        """
        for name, tensors in self.tensors.items():
            write_tensors(folder / name, tensors)
        write_text(folder / VALUES, json.dumps(self.values, indent=1))


def take(training: Training) -> Snapshot:
    """The training as it stands, for the main process to write; every process calls it, for parts are gathered."""
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
                gathered = whole(tensor)
                group[name] = gathered.cpu() if accelerator.is_main_process else torch.empty(0)
    scaler = accelerator.scaler
    values = {
        "position": dataclasses.asdict(training.position),
        "meter": training.meter.state(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "trained": [name for name, _ in named],
    }
    return Snapshot(tensors, values)


def read(folder: Path, training: Training) -> Snapshot:
    """Read what `Snapshot.write` wrote, or Accelerate for an earlier version of the trainer; nothing is executed.

    Raises:
        CheckpointError: a file is missing or damaged, or the state was saved by an earlier version with FSDP.
    """
    if any(folder.glob("pytorch_model_fsdp*")):
        raise CheckpointError(
            f"{folder}: was saved with FSDP by an earlier version, in files that only pickle reads; start another run "
            "from the weights with train.init_from"
        )
    mend = "remove this state to resume from the one before it"
    if not (folder / VALUES).exists() and (folder / "optimizer.bin").exists():
        return _read_earlier(folder, [name for name, _ in training.parameters()], mend)
    tensors = {name: read_tensors(folder / name, mend)[0] for name in (MODEL, OPTIMIZER)}
    if (folder / AVERAGE).exists():
        tensors[AVERAGE] = read_tensors(folder / AVERAGE, mend)[0]
    try:
        values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / VALUES}: cannot be read ({error}); {mend}") from None
    return Snapshot(tensors, values)


def put_back(training: Training, snapshot: Snapshot, source: Path) -> None:
    """Set a training back to a moment.

    Args:
        training: freshly built, with the same detector.
        snapshot: of `read`.
        source: named in errors.

    Raises:
        CheckpointError: the detector is another one, or other parts of it are trained; or the values make no sense.
    """
    values, tensors = snapshot.values, snapshot.tensors
    own = training.accelerator.unwrap_model(training.model).state_dict()
    named = dict(training.parameters())
    try:
        position, trained = _position(values["position"]), set(values["trained"])
        moments = _by_parameter(tensors[OPTIMIZER])
        training.meter.set_state(values["meter"])
        if training.accelerator.scaler is not None and values["scaler"] is not None:
            training.accelerator.scaler.load_state_dict(values["scaler"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: {VALUES} makes no sense ({type(error).__name__}: {error}); remove this state"
        ) from None
    _require_fit(source, own, tensors[MODEL], "model")
    changed = (trained | moments.keys()) ^ named.keys()
    if changed:
        raise CheckpointError(
            f"{source}: {len(changed)} parameters are trained in only one of the saved run and this one "
            f"({_some(sorted(changed))}); restore train.freeze and the model's settings, or start another run from the "
            "weights with train.init_from"
        )
    sizes = {f"{key}/{name}": named[name] for name, kept in moments.items() for key, t in kept.items() if t.dim()}
    _require_fit(source, sizes, {name: tensors[OPTIMIZER][name] for name in sizes}, "optimizer's state")
    if training.average is not None:  # a run that did not average before begins with the weights
        average = tensors.get(AVERAGE, tensors[MODEL])
        _require_fit(source, training.average.state_dict(), average, "averaged model")
        _fill(training.average.state_dict(), average)
    _fill(own, tensors[MODEL])
    _load_optimizer(training.optimizer, named, moments)
    vars(training.position).update(vars(position))


def _load_optimizer(optimizer: AcceleratedOptimizer, named: dict[str, Tensor], moments: dict[str, Tensors]) -> None:
    """Give the optimizer its memory of each parameter; rates and decay stay as this run's config has them."""
    # copies: what was read from a file may hold on to it, and to its room on the disk, when the state is long deleted
    state = {
        index: {key: _part_of(value, parameter).clone() for key, value in moments[name].items()}
        for index, (name, parameter) in enumerate(named.items())
        if name in moments
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], tensors: Tensors) -> None:
    for name, target in targets.items():
        target.copy_(_part_of(tensors[name], target))


def _part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded as another one is, each process taking its own part of it; others as they are."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _by_parameter(tensors: Tensors) -> dict[str, Tensors]:
    """Tensors named as in "exp_avg/backbone.conv1.weight", by the name of the parameter."""
    found: dict[str, Tensors] = {}
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        found.setdefault(name, {})[key] = tensor
    return found


def _position(values: Mapping[str, Any]) -> TrainerState:
    position = TrainerState(**values)
    for field in dataclasses.fields(TrainerState):
        value = getattr(position, field.name)
        if field.name == "best":
            good = value is None or type(value) in (int, float)
        else:
            good = type(value) is int and value >= 0
        if not good:
            raise ValueError(f"{field.name} is {value!r}")
    return position


def _require_fit(source: Path, own: Mapping[str, Tensor], stored: Mapping[str, Tensor], what: str) -> None:
    shapes = {n: (tuple(stored[n].shape), tuple(own[n].shape)) for n in own.keys() & stored.keys()}
    faults = [f"{n} {s} there and {o} here" for n, (s, o) in sorted(shapes.items()) if s != o]
    faults += [f"{name} only there" for name in sorted(stored.keys() - own.keys())]
    faults += [f"{name} only here" for name in sorted(own.keys() - stored.keys())]
    if faults:
        raise CheckpointError(
            f"{source}: {len(faults)} tensors of the {what} do not fit this run's detector ({_some(faults)}); restore "
            "the model's settings, or start another run from the weights with train.init_from"
        )


def _read_earlier(folder: Path, trained: list[str], mend: str) -> Snapshot:
    """A state that Accelerate saved for an earlier version; of its pickles only tensors and plain values are read."""
    tensors = {MODEL: read_tensors(folder / "model.safetensors", mend)[0]}
    try:
        moments, position, meter = (
            _load_earlier(folder / name)
            for name in ("optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl")
        )
        scaler = folder / "scaler.pt"
        scaler = _load_earlier(scaler) if scaler.exists() else None
        if sum(len(group["params"]) for group in moments["param_groups"]) != len(trained):
            raise ValueError("the optimizer had another number of parameters")
        tensors[OPTIMIZER] = {f"{k}/{trained[i]}": t for i, s in moments["state"].items() for k, t in s.items()}
        if (average := position.pop("ema")) is not None:
            tensors[AVERAGE] = average
        pending = [[list(names), values.tolist()] for names, values in meter["pending"]]
    except pickle.UnpicklingError:
        raise CheckpointError(f"{folder}: holds pickled Python objects besides tensors and is not opened") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{folder}: cannot be read ({type(error).__name__}: {error}); {mend}") from None
    return Snapshot(tensors, {"position": position, "meter": pending, "scaler": scaler, "trained": trained})


def _load_earlier(path: Path) -> Any:
    require_unpacked(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _some(names: Iterable[str], limit: int = 3) -> str:
    shown = list(names)
    return ", ".join(shown[:limit]) + (", ..." if len(shown) > limit else "")
