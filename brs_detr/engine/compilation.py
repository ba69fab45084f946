"""`train.compile=layers`: torch.compile of each encoder and decoder layer, in place and in training only.

Layers and not the detector: all layers of a kind run the same code, so each kind is compiled once, in minutes less than
a detector takes; what lies between them depends on the objects of a batch and would be compiled again and again. Their
sizes are symbols, since hardly two batches have the same.

In place: names of weights, states and copies (averaged weights, export) are those of a detector that is not compiled. A
validation runs without it (`uncompiled`), so that `eval.py` finds the same figures to the last digit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from brs_detr.exit_codes import Failure
from brs_detr.models.transformer.decoder import DecoderLayer
from brs_detr.models.transformer.encoder import EncoderLayer

LAYERS = (EncoderLayer, DecoderLayer)
Backend = str | Callable[..., object]


class CompilerError(Failure, RuntimeError):
    """`train.compile` cannot be followed; the message says why."""


def compile_layers(model: nn.Module, backend: Backend = "inductor", *, fullgraph: bool = False) -> int:
    """Compile the transformer layers of a detector in place; each is compiled when it first runs.

    Args:
        model: the detector, on its device, before `accelerator.prepare`.
        backend: of torch.compile.
        fullgraph: raise where a layer does not become one graph, instead of running it in parts.

    Returns:
        The number of layers.

    Raises:
        CompilerError: there are none.
    """
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    if not layers:
        raise CompilerError("train.compile=layers: this detector has no transformer layers. Set train.compile=none.")
    for layer in layers:
        layer.compile(backend=backend, dynamic=True, fullgraph=fullgraph)
    return len(layers)


def require_compiler(device: torch.device, backend: Backend = "inductor") -> None:
    """Compile and run a small function with its backward pass, before a training relies on it.

    Raises:
        CompilerError: that fails, mostly for lack of a compiler.
    """
    # Without random numbers: those of the training must not depend on the trial.
    weight = torch.ones(8, 8, device=device, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x @ weight, (8,)).relu()

    try:
        torch.compile(layer, backend=backend, dynamic=True)(torch.ones(3, 8, device=device)).sum().backward()
    except Exception as error:  # torch raises many types, of the compiler's output and of a wrong Python
        lines = [line.strip() for line in str(error).splitlines()]
        # torch puts "backend='inductor' raised:" before the reason
        reason = next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)
        needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler (g++)"
        raise CompilerError(
            f"train.compile=layers: torch.compile does not work here ({reason[:160].rstrip('.')}). "
            f"Install {needed}, or set train.compile=none."
        ) from error


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run modules that were compiled in place as they are written inside."""
    compiled = {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
