"""The launch of a script: processes, device, precision and trackers, as Accelerate gives them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType

from brs_detr.config import Config, ConfigError
from brs_detr.config_io import leaves
from brs_detr.engine.distributed import is_sharded, sharding_plugin, sharding_wanted


def start_accelerator(config: Config, *, trackers: bool = False) -> Accelerator:
    """Accelerate's view of the launch: devices, processes, precision and, for a training, its trackers.

    Raises:
        ConfigError: this precision is not supported on this machine, or a tracker is unknown or not installed.
    """
    names = list(config.train.trackers) if trackers else []
    require_trackers(names)
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision=fp16 needs a GPU; use bf16 or no")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would not find each other
            mixed_precision=config.train.precision,
            fsdp_plugin=sharding_plugin(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_longest_collective(config))],
            log_with=names or None,
            project_dir=config.output_dir if names else None,
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"the launch and train.precision={config.train.precision} do not fit: {error}") from error
    if names:
        try:
            plain = (int, float, str)  # what trackers can hold
            settings = {name: value if isinstance(value, plain) else str(value) for name, value in leaves(config)}
            accelerator.init_trackers("brs_detr", config=settings)
        except Exception as error:  # each tracker has its own kinds: no login, no network, no rights
            raise ConfigError(f"train.trackers={names}: {' '.join(str(error).split())}") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ConfigError(f"{launched} processes were launched but {accelerator.num_processes} take part; use torchrun")
    if sharding_wanted() and launched > 1 and not is_sharded(accelerator):
        raise ConfigError("the launch asks for FSDP, which Accelerate has for GPUs only; leave it out on CPUs")
    return accelerator


def _longest_collective(config: Config) -> timedelta:
    """For how long a process waits for the others: half an hour, and as long as those may wait for their data."""
    accumulated = config.train.total_batch_size // (config.train.per_device_batch_size or config.train.total_batch_size)
    return timedelta(minutes=30, seconds=(config.data.timeout or 0) * max(1, accumulated))


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Accelerate does not know, or would leave out in silence since their package is absent.

    Raises:
        ConfigError: naming the tracker.
    """
    known = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    available = [str(kind) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(f"train.trackers: {name} is not known; there are {', '.join(known)}")
        if name not in available:
            raise ConfigError(f"train.trackers: {name} is not installed; `pip install {name}`, or leave it out")


def describe_machine(accelerator: Accelerator) -> str:
    """Device, processes, precision and versions, in one line."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    return (
        f"torch {torch.__version__} on {device.type} ({name}), {accelerator.num_processes} process(es), "
        f"precision {accelerator.mixed_precision}"
    )


def choose_device(name: str | None) -> torch.device:
    """The device named; without a name a GPU if there is one.

    Raises:
        ConfigError: this machine has no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0][:120]
        raise ConfigError(f"--device {name}: cannot be used here ({reason}); leave it out, or write cpu") from None
