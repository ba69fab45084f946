"""Reading official checkpoint files without executing anything that they contain.

MMCV saves a pickled dict with `state_dict`, `meta` (class names, epoch) and `optimizer`; only tensors and plain values
are let through.
"""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from brs_detr.engine.checkpoint import CheckpointError
from brs_detr.user_files import UserFileError, require_unpacked

WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "model.")
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
    while isinstance(content, dict) and (key := next((k for k in WRAPPERS if isinstance(content.get(k), dict)), None)):
        content = content[key]
    tensors = {}
    if isinstance(content, dict):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no named tensors, so it is no checkpoint")
    for prefix in PREFIXES:
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
