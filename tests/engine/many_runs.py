"""`train.py` and `eval.py` several times over in the same processes: `many_runs.py JOBS.json`, under torchrun.

Starting processes takes longer than training a toy detector in them. JOBS.json holds a list of `Job` fields. Process r
leaves what job "name" printed in `name.r.txt` beside it, and the exit codes of all jobs in `codes.r.json`.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.fsdp import FSDPModule

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from sharded_run import sharding_accelerator  # noqa: E402
from support import Killed  # noqa: E402

import brs_detr.run.launch  # noqa: E402
import eval  # noqa: E402
import train  # noqa: E402
from brs_detr.engine.trainer import Trainer  # noqa: E402
from brs_detr.models.brs_detr import BRSDETR  # noqa: E402

TINY_SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 4}
KILLED = -9


@dataclasses.dataclass
class Job:
    """One run. What happens at a step happens when so many optimizer steps are done, in the last process.

    Attributes:
        name: of the files it leaves.
        arguments: of the script.
        script: "train" or "eval".
        environment: of the launch; FSDP where it says ACCELERATE_USE_FSDP=true.
        tiny_swin: every timm model is a Swin of toy size.
        kill: step at which all processes end without a word.
        terminate: step at which it gets a SIGTERM.
        poison: step at which a loss term becomes NaN.
    """

    name: str
    arguments: list[str]
    script: str = "train"
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    tiny_swin: bool = False
    kill: int | None = None
    terminate: int | None = None
    poison: int | None = None


def last_process():
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


@contextlib.contextmanager
def mishaps(job):
    """The job's own kill, signal, NaN and backbone."""
    step, losses, create = Trainer.step, BRSDETR.losses, timm.create_model
    steps = [0]

    def mishap_step(trainer, group):
        if not trainer.position.step and trainer.accelerator.is_main_process:
            kinds = {type(module).__name__ for module in trainer.model.modules() if isinstance(module, FSDPModule)}
            print("sharded:", *sorted(kinds))
        steps[0] = trainer.position.step
        if steps[0] == job.kill:
            raise Killed
        if steps[0] == job.terminate and last_process():
            os.kill(os.getpid(), 15)
        return step(trainer, group)

    def mishap_losses(model, *arguments):
        terms = losses(model, *arguments)
        if steps[0] == job.poison and last_process():
            terms["encoder.l1"] = terms["encoder.l1"] * float("nan")
        return terms

    def create_tiny(name, **settings):
        return create(name, **settings, **(TINY_SWIN if job.tiny_swin else {}))

    with (
        mock.patch.object(Trainer, "step", mishap_step),
        mock.patch.object(BRSDETR, "losses", mishap_losses),
        mock.patch.object(timm, "create_model", create_tiny),
    ):
        yield


def run(job):
    """The exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    sharded = job.environment.get("ACCELERATE_USE_FSDP") == "true"
    with (
        mock.patch.dict(os.environ, job.environment),
        mock.patch.object(brs_detr.run.launch, "Accelerator", sharding_accelerator if sharded else Accelerator),
        mishaps(job),
    ):
        try:
            return {"train": train, "eval": eval}[job.script].main(job.arguments)
        except Killed:
            return KILLED


def main():
    torch.set_num_threads(1)
    PartialState.destroy_process_group = lambda *_: None  # the next job needs it
    path = Path(sys.argv[1])
    rank, codes = os.environ["RANK"], {}
    for job in (Job(**fields) for fields in json.loads(path.read_text())):
        with (
            open(path.with_name(f"{job.name}.{rank}.txt"), "w") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            began = time.perf_counter()
            codes[job.name] = run(job)
            print(f"{time.perf_counter() - began:.1f} s")
        path.with_name(f"codes.{rank}.json").write_text(json.dumps(codes))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
