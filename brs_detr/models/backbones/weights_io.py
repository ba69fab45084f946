"""Reading of backbone weights and of official detector checkpoints, without executing any of their content.

`load_backbone_weights` accepts files of torchvision, timm and the original Swin, and of detectors, whose `backbone.`
part it takes. `read_official` reads checkpoints of MMCV, a pickled dict with `state_dict`, `meta` (class names, epoch)
and `optimizer`, of which only tensors and plain values are unpickled.
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

from brs_detr.exit_codes import CheckpointError
from brs_detr.user_files import UserFileError, require_unpacked

# Keys under which training codes store the state dict, and prefixes that wrappers add to its names.
WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema", "ema", "module")
PREFIXES = ("module.", "model.", "backbone.")

State = dict[str, Tensor]


def read_weights(path: str | Path) -> State:
    """Read the tensors of a `.safetensors` or PyTorch file, without the prefixes of wrappers; no code is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold named tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"model.backbone.checkpoint: there is no file {path}")
    if path.suffix == ".safetensors":
        return strip_prefixes(load_file(path))
    try:
        require_unpacked(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserFileError as error:
        raise ValueError(f"{path}: not opened: {error}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds Python objects besides tensors and is not opened. "
            "Save its state dict alone with torch.save."
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{path}: damaged or not a PyTorch file ({reason}). Download it again.") from error
    while isinstance(content, dict) and (key := next((k for k in WRAPPERS if isinstance(content.get(k), dict)), None)):
        content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise ValueError(f"{path}: holds no named tensors. Save a state dict.")
    return strip_prefixes(tensors)


def strip_prefixes(state: State) -> State:
    """Remove the prefixes of wrappers from all names; of a detector, keep the backbone only."""
    for prefix in PREFIXES:
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        # A wrapper prefixes every name; only "backbone." may occur beside other parts, those of a detector.
        if inside and (prefix == "backbone." or len(inside) == len(state)):
            state = inside
    return state


def load_backbone_weights(
    backbone: nn.Module, path: str | Path, rename: Callable[[State], State] | None = None
) -> None:
    """Load a local file into `backbone`; the main process prints what matched.

    Args:
        backbone: changed in place.
        path: a `.pth`, `.pt` or `.safetensors` file.
        rename: applied first, to names of other projects.

    Raises:
        ValueError: no tensor of the file belongs to the backbone.
    """
    state = read_weights(path)
    available = {flat_name(name): (name, value) for name, value in (rename(state) if rename else state).items()}
    matched: State = {}
    missing, differ = [], []
    for name, value in backbone.state_dict().items():
        _, new = available.pop(flat_name(name), (name, None))
        if new is not None and new.shape == value.shape:
            matched[name] = new
        elif new is not None:
            differ.append(f"{name} {tuple(new.shape)} instead of {tuple(value.shape)}")
        elif not name.endswith("num_batches_tracked"):
            missing.append(name)
    unused = [name for name, _ in available.values() if not name.endswith("num_batches_tracked")]
    if not matched:
        raise ValueError(
            f"{path}: none of its {len(state)} tensors belongs to this backbone (the file has {_some(list(state))}; "
            f"needed are {_some(missing or differ)}). Set model.backbone.name to the network of the file."
        )
    backbone.load_state_dict(matched, strict=False)
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"{path}: {len(matched)} backbone tensors read; missing {_some(missing)}; "
            f"of another shape {_some(differ)}; not used {_some(unused)}"
        )


def flat_name(name: str) -> str:
    """Write `stages.0` and `stages_0` alike; timm's feature networks use the second."""
    return name.replace(".", "_")


def _some(names: list[str], max_names: int = 3) -> str:
    """Count names and list the first few."""
    if not names:
        return "0"
    more = ", ..." if len(names) > max_names else ""
    return f"{len(names)} ({', '.join(names[:max_names])}{more})"


OFFICIAL_WRAPPERS = ("state_dict", "model")
OFFICIAL_PREFIXES = ("module.", "model.")
_CORE = np._core if hasattr(np, "_core") else np.core  # NumPy 2 renamed it
PLAIN_NUMPY: list[Any] = [
    np.dtype,
    np.ndarray,
    (_CORE.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (_CORE.multiarray.scalar, "numpy._core.multiarray.scalar"),
    (_CORE.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (_CORE.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    *{type(np.dtype(kind)) for kind in (np.bool_, np.int32, np.int64, np.float32, np.float64)},
]
"""Numbers and arrays of NumPy, which MMCV's `meta` may contain beside the tensors."""


@dataclass(frozen=True)
class OfficialFile:
    """Content of an official checkpoint.

    Attributes:
        tensors: state dict with official names, float32, on the CPU.
        meta: MMCV's metadata: `CLASSES`, `epoch`, ...; empty if the file has no metadata.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)


def read_official(path: Path) -> OfficialFile:
    """Read a `.pth` file of MMCV or a `.safetensors` file with official names.

    Raises:
        CheckpointError: the file is missing, truncated, holds objects other than tensors and plain values, or has no
            named tensors.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: this is a folder, not a checkpoint file. Name the .pth in it.")
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
        raise CheckpointError(f"{path}: holds no named tensors, so it is not a checkpoint.")
    for prefix in OFFICIAL_PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    return OfficialFile(tensors, meta if isinstance(meta, dict) else {})


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    try:
        return load_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}). Download it again.") from None


def _load_pickle(path: Path) -> Any:
    """Unpickle tensors, plain values and NumPy's numbers and arrays; refuse anything else."""
    try:
        require_unpacked(path)
        with torch.serialization.safe_globals(PLAIN_NUMPY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickles of other protocols, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Unsupported global" in reason or "not an allowed global" in reason:
            raise CheckpointError(
                f"{path}: holds Python objects besides tensors and is not opened. If you trust it, save its "
                '`state_dict` alone with torch.save({"state_dict": ...}, PATH).'
            ) from None
        raise CheckpointError(f"{path}: not a PyTorch checkpoint") from None
    except UserFileError as error:
        raise CheckpointError(f"{path}: not opened: {error}") from None
    except Exception:  # torch raises many kinds for a damaged or foreign file
        raise CheckpointError(
            f"{path}: cut short, damaged or not a PyTorch checkpoint. Compare its size with the source and download it "
            "again."
        ) from None
