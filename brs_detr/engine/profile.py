"""Where the time of a training step goes: a few real steps under torch's profiler."""

from __future__ import annotations

import gzip
import shutil
import time
from itertools import chain, count, islice
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from brs_detr.engine.trainer import Trainer

WARM_UP, RECORDED = 3, 5


def profile_steps(trainer: Trainer, folder: Path, rows: int = 15) -> str:
    """Train some steps, the last five of them recorded.

    Args:
        trainer: fresh; its weights are others afterwards.
        folder: gets `trace.json.gz` (for chrome://tracing or ui.perfetto.dev) and `profile.txt`, the whole table.
        rows: lines of the table that are returned.

    Returns:
        Time of a step, of its parts and of the costliest operations, as text; "" in all but the main process.
    """
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    batches = chain.from_iterable(map(trainer.batches.epoch, count()))  # an epoch may have fewer
    trainer.model.train()
    for _ in range(WARM_UP):
        trainer.step(list(islice(batches, trainer.settings.accumulate)))
        trainer.position.step += 1
    start = time.perf_counter()
    with profile(activities=activities) as profiler:
        for _ in range(RECORDED):
            with record_function("step: waiting for data"):
                group = list(islice(batches, trainer.settings.accumulate))
            trainer.step(group)
            trainer.position.step += 1
    seconds = (time.perf_counter() - start) / RECORDED
    if not trainer.accelerator.is_main_process:
        return ""  # it would write to the same files
    folder.mkdir(parents=True, exist_ok=True)
    _write_trace(profiler, folder / "trace.json.gz")
    averages, order = profiler.key_averages(), "self_device_time_total" if cuda else "self_cpu_time_total"
    (folder / "profile.txt").write_text(averages.table(sort_by=order, row_limit=-1), encoding="utf-8")
    parts = [event for event in averages if event.key.startswith("step: ")]
    on_host = [event for event in parts if event.device_type == DeviceType.CPU]  # a GPU has spans of the same names
    lines = [f"{seconds:.3f} s a step under the profiler, a mean of {RECORDED} steps; of these on the host:"]
    lines += [
        f"  {event.key.removeprefix('step: '):<18} {event.cpu_time_total / RECORDED / 1e6:8.3f} s"
        for event in sorted(on_host, key=lambda event: -event.cpu_time_total)
    ]
    costly = sorted((e for e in averages if e not in parts), key=lambda event: -getattr(event, order))[:rows]
    lines.append(f"costliest operations on the {'GPU' if cuda else 'CPU'}, without what they call, a step:")
    lines += [
        f"  {e.key[:60]:<60} {getattr(e, order) / RECORDED / 1e3:9.2f} ms {e.count // RECORDED:6} x" for e in costly
    ]
    lines.append(f"trace and whole table in {folder}")
    return "\n".join(lines)


def _write_trace(profiler: profile, path: Path) -> None:
    plain = path.with_suffix("")
    profiler.export_chrome_trace(str(plain))
    with open(plain, "rb") as source, gzip.open(path, "wb") as target:
        shutil.copyfileobj(source, target)
    plain.unlink()
