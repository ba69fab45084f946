"""Read tensors from backbone and detector checkpoints without executing anything that they contain.

Understood are torchvision, timm and original Swin files as well as whole detectors, whose `backbone.` part is taken.

Reading official checkpoint files without executing anything that they contain.

MMCV saves a pickled dict with `state_dict`, `meta` (class names, epoch) and `optimizer`; only tensors and plain values
are let through.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from brs_detr.user_files import UserFileError, require_unpacked


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the mend."""


WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema", "ema", "module")
PREFIXES = ("module.", "model.", "backbone.")

State = dict[str, Tensor]


def read_weights(path: str | Path) -> State:
    """The tensors of a `.safetensors` or PyTorch file, unwrapped, by name; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something other than named tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"model.backbone.checkpoint: there is no file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return strip_prefixes(load_file(path))
    try:
        require_unpacked(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserFileError as error:
        raise ValueError(f"{path} is not opened: {error}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects besides tensors and is not opened; save its state dict alone with torch.save"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{path} is damaged or no PyTorch file ({reason}); fetch it again") from error
    while isinstance(content, dict) and (key := next((k for k in WRAPPERS if isinstance(content.get(k), dict)), None)):
        content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise ValueError(f"{path} holds no named tensors; expected a state dict")
    return strip_prefixes(tensors)


def strip_prefixes(state: State) -> State:
    """Names without the prefixes of wrappers; of a whole detector only the backbone is kept."""
    for prefix in PREFIXES:
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        # a wrapper prefixes every name; only "backbone." may stand beside the other parts of a detector
        if inside and (prefix == "backbone." or len(inside) == len(state)):
            state = inside
    return state


def load_weights(
    backbone: nn.Module, path: str | Path, rename: Callable[[State], State] | None = None, quiet: bool = False
) -> str:
    """Fill `backbone` from a local file and say what matched.

    Args:
        backbone: changed in place.
        path: a `.pth`, `.pt` or `.safetensors` file.
        rename: translates foreign names first.
        quiet: only return the report; otherwise the first process prints it.

    Returns:
        The report: how many tensors matched, which are missing in the file, which differ in shape, which are unused.

    Raises:
        ValueError: no tensor of the file belongs to the backbone.
    """
    state = read_weights(path)
    found = {flat_name(name): (name, value) for name, value in (rename(state) if rename else state).items()}
    matched, missing, differ = {}, [], []
    for name, value in backbone.state_dict().items():
        _, new = found.pop(flat_name(name), (name, None))
        if new is not None and new.shape == value.shape:
            matched[name] = new
        elif new is not None:
            differ.append(f"{name} {tuple(new.shape)} instead of {tuple(value.shape)}")
        elif not name.endswith("num_batches_tracked"):
            missing.append(name)
    unused = [name for name, _ in found.values() if not name.endswith("num_batches_tracked")]
    if not matched:
        raise ValueError(
            f"{path}: none of its {len(state)} tensors belongs to this backbone (the file has {_some(list(state))}; "
            f"needed are {_some(missing or differ)}); is model.backbone.name the network the file was made with?"
        )
    backbone.load_state_dict(matched, strict=False)
    report = (
        f"{path}: {len(matched)} backbone tensors read; missing {_some(missing)}; "
        f"of another shape {_some(differ)}; not used {_some(unused)}"
    )
    if not quiet and int(os.environ.get("RANK", "0")) == 0:
        print(report)
    return report


def flat_name(name: str) -> str:
    """A name in which `stages.0` and `stages_0` are the same; timm writes the second when it takes a network apart."""
    return name.replace(".", "_")


def _some(names: list[str], max_names: int = 3) -> str:
    if not names:
        return "0"
    more = ", ..." if len(names) > max_names else ""
    return f"{len(names)} ({', '.join(names[:max_names])}{more})"


OFFICIAL_WRAPPERS = ("state_dict", "model")
OFFICIAL_PREFIXES = ("module.", "model.")
_CORE = np._core if hasattr(np, "_core") else np.core  # NumPy 2 renamed it
PLAIN_NUMPY = [
    np.dtype,
    np.ndarray,
    (_CORE.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (_CORE.multiarray.scalar, "numpy._core.multiarray.scalar"),
    (_CORE.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (_CORE.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    *{type(np.dtype(kind)) for kind in (np.bool_, np.int32, np.int64, np.float32, np.float64)},
]
"""Numbers and arrays of NumPy, which MMCV's notes about a run may hold beside the tensors."""


@dataclass(frozen=True)
class OfficialFile:
    """An official checkpoint in memory.

    Attributes:
        tensors: state dict with official names, float32, on the CPU.
        meta: MMCV's notes: `CLASSES`, `epoch`, ...; empty where the file has none.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)


def read_official(path: Path) -> OfficialFile:
    """Read a `.pth` file of MMCV or a `.safetensors` file with official names.

    Raises:
        CheckpointError: absent, cut short, with other objects than tensors and plain values, or without named tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    meta = content.get("meta") if isinstance(content, dict) else None
    while isinstance(content, dict) and (
        key := next((k for k in OFFICIAL_WRAPPERS if isinstance(content.get(k), dict)), None)
    ):
        content = content[key]
    tensors = {}
    if isinstance(content, dict):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no named tensors, so it is no checkpoint")
    for prefix in OFFICIAL_PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    return OfficialFile(tensors, meta if isinstance(meta, dict) else {})


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); fetch it again") from None


def _load_pickle(path: Path) -> Any:
    try:
        require_unpacked(path)
        with torch.serialization.safe_globals(PLAIN_NUMPY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickles of other protocols, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Unsupported global" in reason or "not an allowed global" in reason:
            raise CheckpointError(
                f"{path}: holds Python objects besides tensors and is not opened; where you trust it, save its "
                '`state_dict` alone with torch.save({"state_dict": ...}, PATH)'
            ) from None
        raise CheckpointError(f"{path}: not a PyTorch checkpoint") from None
    except UserFileError as error:
        raise CheckpointError(f"{path}: not opened: {error}") from None
    except Exception:  # torch raises many kinds for a damaged or foreign file
        raise CheckpointError(
            f"{path}: cut short, damaged or no PyTorch checkpoint; compare its size with the source and fetch it again"
        ) from None
