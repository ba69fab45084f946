"""Launch of a script with Accelerate: processes, device, precision and trackers."""

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

TRACKED_AS = "brs_detr"  # the trackers' name of the project, and TensorBoard's folder in output_dir


def start_accelerator(config: Config, *, trackers: bool = False) -> Accelerator:
    """Create the Accelerator of this launch, for a training with its trackers, which `start_trackers` starts.

    Raises:
        ConfigError: this precision is not supported on this machine, or a tracker is unknown or not installed.
    """
    names = list(config.train.trackers) if trackers else []
    require_trackers(names)
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision=fp16 needs a GPU. Use bf16 or no.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it, several CPU processes would not form a group
            mixed_precision=config.train.precision,
            fsdp_plugin=sharding_plugin(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_longest_collective(config))],
            log_with=names or None,
            project_dir=config.output_dir if names else None,
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"train.precision={config.train.precision}: not possible with this launch: {error}"
        ) from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ConfigError(
            f"launch: {launched} processes were started but only {accelerator.num_processes} take part. Use torchrun."
        )
    if sharding_wanted() and launched > 1 and not is_sharded(accelerator):
        raise ConfigError("launch: Accelerate supports FSDP on GPUs only. Leave it out on CPUs.")
    return accelerator


def start_trackers(config: Config, accelerator: Accelerator) -> None:
    """Start the trackers of a launch, if it has some: from here on they write files, or to a server.

    Raises:
        ConfigError: a tracker cannot start.
    """
    if not accelerator.log_with:
        return
    plain = (int, float, str)  # the types that trackers accept
    settings = {name: value if isinstance(value, plain) else str(value) for name, value in leaves(config)}
    try:
        accelerator.init_trackers(TRACKED_AS, config=settings)
    except Exception as error:  # each tracker raises its own: no login, no network, no permission
        raise ConfigError(f"train.trackers={list(config.train.trackers)}: {' '.join(str(error).split())}") from error


def _longest_collective(config: Config) -> timedelta:
    """Return how long a process waits for the others: half an hour plus the time those may wait for their data."""
    total, most = config.train.total_batch_size, config.train.per_device_batch_size
    accumulated = total if most == "auto" else total // (most or total)  # auto: one image at once, at worst
    return timedelta(minutes=30, seconds=(config.data.timeout or 0) * max(1, accumulated))


def require_trackers(names: Sequence[str]) -> None:
    """Raise for trackers that Accelerate does not know, or would skip silently since their package is not installed.

    Raises:
        ConfigError: naming the tracker.
    """
    known = [str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL]
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(f"train.trackers: {name} is not known. Choose from {', '.join(known)}.")
        if name not in available:
            raise ConfigError(f"train.trackers: {name} is not installed. Run `pip install {name}`, or leave it out.")


def describe_machine(accelerator: Accelerator) -> str:
    """Describe device, processes, precision and versions in one line."""
    device = accelerator.device
    # one with `accelerate launch` unless --num_cpu_threads_per_process or OMP_NUM_THREADS says more
    threads = f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    return (
        f"torch {torch.__version__} on {device.type} ({name}), {accelerator.num_processes} process(es), "
        f"precision {accelerator.mixed_precision}"
    )


def choose_device(name: str | None) -> torch.device:
    """Return the named device; without a name, a GPU if there is one, else the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # An empty tensor, since torch.device() also accepts the name of a device that does not exist.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0][:120]
        raise ConfigError(f"device={name}: cannot be used here ({reason}). Leave it out, or write cpu.") from None
