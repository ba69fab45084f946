"""Count what a training step asks of a GPU: operations that start kernels, and places where the host would wait.

No GPU is needed. `on_device` marks a model's tensors as those of an imagined GPU (`DeviceTensor`): they are computed on
the CPU, but say to Python that they lie on a GPU, so that the code takes the branches it takes there. `StepCounter`
watches the operations on them; those on plain tensors, which a GPU run computes on the host too, are not counted.

What counts, one each: every operation below autograd that is neither a view nor an allocation, as a rule one kernel,
sometimes several. Operations on lists of tensors (`torch._foreach_*`) and fused optimizers count once.

What waits: an operation whose result the host needs (`tolist`, `item`, `cpu`) or whose size depends on its values
(`nonzero`, boolean indexing, `nms`, ...). Listed apart are copies to the device that wait until they are made: tensors
made of Python numbers on the device, `to(device)` without `non_blocking`. CUDA waits there too, for all kernels before.

The sections are those of `sections.py`.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.utils.clip_grad as clipping
import torch.optim.optimizer as optimizers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sections import SectionTracker, Wait, place, section_of

DEVICE, HOST = torch.device("cuda", 0), torch.device("cpu")

# Allocations, and what only changes how a tensor is seen but is no view to its schema.
WITHOUT_KERNEL = {
    *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_", "set_"),
    *("detach", "alias", "lift", "lift_fresh", "_unsafe_view", "_local_scalar_dense", "is_same_size"),
}
# The size of the result, or the result itself, has to come to the host.
WAITING = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "nms"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}
FROM_DATA = {torch.tensor, torch.as_tensor, Tensor.new_tensor, torch.asarray}


class DeviceTensor(Tensor):
    """A tensor of the imagined GPU: computed on the CPU, but of a CUDA device to who asks in Python."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The imagined GPU."""
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """True."""
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        """False."""
        return False


class ImaginedEvent:
    """Stands for `torch.cuda.Event` while a step is counted."""

    def __init__(self, counter: StepCounter, **_: Any) -> None:
        self.counter = counter

    def record(self, *_: Any) -> None:
        """Do nothing: the host goes on."""

    def synchronize(self) -> None:
        """Note that the host waits."""
        self.counter.wait("event")


def on_device(model: nn.Module) -> nn.Module:
    """Put all parameters and buffers of a model on the imagined GPU, in place; build the optimizer after that."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    moved = tensor.detach().as_subclass(DeviceTensor).requires_grad_(tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter):
                        moved._is_param = True  # what `isinstance(x, nn.Parameter)` asks of a subclass of Tensor
                    known[id(tensor)] = moved
                table[name] = known[id(tensor)]
    return model


def starts_kernel(operation: torch._ops.OpOverload) -> bool:
    """Return False for views, allocations and what is no computation."""
    if operation.namespace in ("prim", "prims", "profiler"):
        return False
    name = operation._schema.name.split("::")[1]
    if name in WITHOUT_KERNEL or name.startswith("sym_"):
        return False
    return not any(one.alias_info is not None and not one.alias_info.is_write for one in operation._schema.returns)


def is_device(value: object) -> bool:
    """Return True if an argument names a GPU."""
    if isinstance(value, torch.device):
        return value.type == DEVICE.type
    return isinstance(value, str) and value.split(":")[0] == DEVICE.type


class StepCounter(TorchDispatchMode):
    """Counts the operations on the imagined GPU, and their time on this CPU, while it is entered.

    Attributes:
        forward, backward: operations by section.
        operators: the same by (section, name), both passes.
        waits: the host waits for a result.
        copies: it waits for a copy to the device.
        seconds: CPU time inside the operations, by section, both passes; `data` of the host is not in it.
        backward_seconds: that of the backward pass alone.
    """

    def __init__(self, sections: Callable[[FrameType | None], str] = section_of) -> None:
        super().__init__()
        self.sections = sections
        self.paused = False
        self.called_on_device = False  # by the Python call that is running
        self.in_backward = False
        self._calls, self._stack = _PythonCalls(self), contextlib.ExitStack()
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self.operators: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[Wait] = Counter()
        self.copies: Counter[Wait] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.backward_seconds: defaultdict[str, float] = defaultdict(float)
        self.tracker = SectionTracker(self.sections)

    @property
    def total(self) -> int:
        """Operations of both passes."""
        return self.forward.total() + self.backward.total()

    def __enter__(self) -> StepCounter:
        """Start counting."""
        super().__enter__()
        self._stack.enter_context(_gpu_branches(self))
        self._stack.enter_context(self._calls)
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        self._stack.close()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it if it is one of the imagined GPU."""
        kwargs = kwargs or {}
        if self.paused:
            return operation(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        mine = self.in_backward or any(isinstance(x, DeviceTensor) for x in tensors)
        if not mine and (tensors or not self.called_on_device):
            return operation(*args, **kwargs)
        section = self.tracker.of_backward() if self.in_backward else self.tracker.of_forward()
        with self._timed(section):
            result = operation(*args, **kwargs)
        if starts_kernel(operation) and not self._is_copy(operation, args):
            self._add(section, str(operation))
        self._note_waits(operation, args, kwargs, section if self.in_backward else None)
        given = {id(x) for x in tensors}
        return tree_map(lambda x: self.put(x) if isinstance(x, Tensor) and id(x) not in given else x, result)

    @contextlib.contextmanager
    def stand_in(self, name: str, operations: int = 1) -> Iterator[None]:
        """Count what runs inside as so many operations of a GPU, whatever it is."""
        section = self.tracker.of_backward() if self.in_backward else self.tracker.of_forward()
        self._add(section, name, operations)
        with self.pause(), self._timed(section):
            yield

    @contextlib.contextmanager
    def _timed(self, section: str) -> Iterator[None]:
        start = time.process_time()
        yield
        taken = time.process_time() - start
        self.seconds[section] += taken
        if self.in_backward:
            self.backward_seconds[section] += taken

    def _add(self, section: str, name: str, operations: int = 1) -> None:
        (self.backward if self.in_backward else self.forward)[section] += operations
        self.operators[section, name] += operations

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Count nothing inside."""
        former, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = former

    @contextlib.contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Count what runs inside as operations of the backward pass."""
        self.in_backward = True
        try:
            yield
        finally:
            self.in_backward = False

    def put(self, tensor: Tensor) -> Tensor:
        """Mark a tensor as one of the imagined GPU."""
        return tensor if isinstance(tensor, DeviceTensor) else tensor.as_subclass(DeviceTensor)

    def wait(self, operation: str, differentiated: str | None = None) -> None:
        """Note that the host waits for a result."""
        self.waits[Wait(place() if differentiated is None else f"backward of {differentiated}", operation)] += 1

    def copy(self, operation: str) -> None:
        """Note that the host waits for a copy to the device."""
        self.copies[Wait(place(), operation)] += 1

    def _note_waits(
        self, operation: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any], section: str | None
    ) -> None:
        """Note it if an operation is one that waits."""
        name = operation._schema.name.split("::")[1]
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(name, section)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            by_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            filled = name != "index" and args[2].numel() == 1  # `x[mask] = number` is a masked fill
            if by_mask and not filled:
                self.wait("boolean index", section)
            elif section is None and any(not isinstance(index, DeviceTensor) for index in indices):
                self.copy("index from the host")
        elif self._is_copy(operation, args):
            # A single number of the host is filled in; a copy with `non_blocking` is only queued.
            queued = args[1].dim() == 0 or any(args[2:]) or kwargs.get("non_blocking")
            if not queued and isinstance(args[1], DeviceTensor):
                self.wait("copy to the host")
            elif not queued:
                self.copy("copy to the device")

    def _is_copy(self, operation: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
        """Return True for a copy between host and device, which is no kernel."""
        if operation._schema.name != "aten::copy_" or self.in_backward:
            return False
        return isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor)


class _PythonCalls(TorchFunctionMode):
    """Sees the calls in Python above the operations: where tensors are made, and copies between host and device."""

    def __init__(self, counter: StepCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.backward:
            with self, self.counter.backward_pass():  # autograd functions in Python make tensors too
                kwargs = {"grad_tensors" if name == "gradient" else name: value for name, value in kwargs.items()}
                return torch.autograd.backward(*args, **kwargs)
        if function is Tensor.pin_memory:
            return args[0]
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        if function in (Tensor.cpu, Tensor.cuda, Tensor.to):
            return self._move(function, args, kwargs)
        mine = any(isinstance(x, DeviceTensor) for x in tree_leaves((args, kwargs)))
        if function in (Tensor.tolist, Tensor.numpy) and mine:
            self.counter.wait(function.__name__)
            with self.counter.pause():
                return function(args[0].detach().as_subclass(Tensor), *args[1:], **kwargs)
        wanted = is_device(kwargs.get("device")) or (mine and kwargs.get("device") is None)
        if is_device(kwargs.get("device")):
            kwargs = {**kwargs, "device": HOST}
        if function in FROM_DATA and wanted:
            self.counter.copy(function.__name__)
            with self.counter.pause():
                return function(*args, **kwargs).as_subclass(DeviceTensor)
        former, self.counter.called_on_device = self.counter.called_on_device, wanted
        try:
            return function(*args, **kwargs)
        finally:
            self.counter.called_on_device = former

    def _move(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Copy between host and device, or only convert."""
        tensor, *rest = args
        values = [*rest, *kwargs.values()]
        to_device = function is Tensor.cuda or any(is_device(x) or isinstance(x, DeviceTensor) for x in values)
        to_host = function is Tensor.cpu or any(x == HOST or x == "cpu" for x in values if not isinstance(x, Tensor))
        blocking = not (kwargs.get("non_blocking") or any(x is True for x in rest[1:]))
        rest = [HOST if is_device(x) else x for x in rest]
        kwargs = {name: HOST if is_device(x) else x for name, x in kwargs.items()}
        function = Tensor.to if function is Tensor.cuda else function
        if isinstance(tensor, DeviceTensor) and to_host:
            if blocking:
                self.counter.wait("copy to the host")
            with self.counter.pause():
                return function(tensor, *rest, **kwargs).as_subclass(Tensor)
        if not isinstance(tensor, DeviceTensor) and to_device:
            if blocking:
                self.counter.copy("copy to the device")
            with self.counter.pause():
                return function(tensor, *(rest or [HOST]), **kwargs).as_subclass(DeviceTensor)
        return function(tensor, *rest, **kwargs)


@contextlib.contextmanager
def _gpu_branches(counter: StepCounter) -> Iterator[None]:
    """Let optimizers and gradient norms of torch take lists of imagined tensors, and events be waited for."""
    allowed: list[Any] = optimizers._foreach_supported_types
    norms: Any = clipping
    former = norms._has_foreach_support, norms._group_tensors_by_device_and_dtype
    allowed.append(DeviceTensor)
    norms._has_foreach_support = lambda *_: True
    norms._group_tensors_by_device_and_dtype = lambda lists: {(DEVICE, None): (lists, None)}
    cuda: Any = torch.cuda
    event, cuda.Event = cuda.Event, partial(ImaginedEvent, counter)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
            yield
    finally:
        allowed.remove(DeviceTensor)
        cuda.Event = event
        norms._has_foreach_support, norms._group_tensors_by_device_and_dtype = former


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create while they live; on a GPU, use its allocator instead."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add the storages that it creates."""
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
