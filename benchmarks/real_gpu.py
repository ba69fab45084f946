"""What a step does on a real GPU: seconds by events, memory of the allocator, kernels by the profiler, and waits.

The counterpart of `counting.py` for where there is a GPU. Kernels are counted one by one, so there are more of them
than operations: a sort is several. A wait is what `torch.cuda.set_sync_debug_mode` warns of; it does not tell waits for
a result from copies to the device, and names the place only. Those of the backward pass have the place of its call.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sections import OUTSIDE, SectionTracker, Wait, place, section_of

MARK = "section: "
Step = Callable[[], object]


class SectionMarker(TorchDispatchMode):
    """Names the section of every operation in the profiler's record."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = SectionTracker(section_of)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation under the name of its section."""
        if operation.namespace == "profiler":
            return operation(*args, **(kwargs or {}))
        backward = torch._C._current_autograd_node() is not None
        section = self.tracker.of_backward() if backward else self.tracker.of_forward()
        with record_function(f"{MARK}{'backward' if backward else 'forward'} {section}"):
            return operation(*args, **(kwargs or {}))


@dataclass
class Kernels:
    """The kernels of a step.

    Attributes:
        forward, backward: their number by section.
        seconds: of the GPU by section, both passes.
        backward_seconds: those of the backward pass alone.
    """

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    backward_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def total(self) -> int:
        """Kernels of both passes."""
        return self.forward.total() + self.backward.total()

    def add(self, mark: str, seconds: float) -> None:
        """Add one kernel of the section that a mark names."""
        which, section = mark.removeprefix(MARK).split(" ", 1)
        (self.forward if which == "forward" else self.backward)[section] += 1
        self.seconds[section] += seconds
        if which == "backward":
            self.backward_seconds[section] += seconds


def kernels_of(step: Step) -> Kernels:
    """Profile a step, and return its kernels by section."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with SectionMarker():
            step()
        torch.cuda.synchronize()
    kernels = Kernels()
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CPU:
            for kernel in event.kernels:
                kernels.add(mark_above(event), kernel.duration / 1e6)
    return kernels


def mark_above(event: FunctionEvent) -> str:
    """Return the mark of the innermost section that an event of the host lies in."""
    above: FunctionEvent | None = event
    while above is not None and not above.name.startswith(MARK):
        above = above.cpu_parent
    return f"{MARK}forward {OUTSIDE}" if above is None else above.name


def waits_of(step: Step) -> Counter[Wait]:
    """Return the places where the host waits for the device in a step."""
    waits: Counter[Wait] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            waits[Wait(place(), "waits")] += 1

    torch.cuda.synchronize()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        step()
    return waits


def seconds_of(step: Step, repeats: int) -> float:
    """Return the median of the seconds between events before and after a step."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def bytes_of(step: Step) -> int:
    """Return the most memory allocated during a step, beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
