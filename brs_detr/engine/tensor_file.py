"""Safetensors files with a checksum of their content.

Any safetensors reader reads these files. They are written here rather than by that library: one tensor after the other
without a copy of them all, with the permissions of the umask, and with the operating system's own errors. The checksum
is at the beginning of the header and covers the rest of the header and all tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from brs_detr.engine.storage import NonFiniteError, write_file
from brs_detr.exit_codes import CheckpointError

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BEGINNING = b'{"__metadata__":{"sha256":"'
_NO_SUM = "0" * 64
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Args:
        path: the file.
        tensors: on any device; they may share memory.
        metadata: strings to store with them.

    Raises:
        NonFiniteError: a tensor holds NaN or infinite numbers.
        StorageError: the disk is full or cannot be written to.
    """
    require_finite(tensors, str(path))
    # Larger types first: every tensor then begins at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _header(tensors, names, metadata or {})

    def write(file: BinaryIO) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        digest = hashlib.sha256(header)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous()
            # A tensor of one element counts as contiguous whatever its stride, but `view` refuses some strides.
            data = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        # The checksum replaces the zeros that were hashed in its place.
        file.seek(8 + len(_BEGINNING))
        file.write(digest.hexdigest().encode())

    write_file(path, write)


def read_tensors(path: Path, advice: str = "Use an earlier one.") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, on the CPU, and the metadata of a safetensors file, with or without a checksum.

    Args:
        path: the file.
        advice: what to do if the file is damaged, for the message.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or is not a safetensors file.
    """
    try:
        intact = has_its_checksum(path)
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError as error:
        advice = "Ask its owner for permission." if isinstance(error, PermissionError) else advice
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}). {advice}") from None
    except (SafetensorError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the file is damaged ({error}). {advice}") from None
    if not intact:
        raise CheckpointError(f"{path}: the file is damaged (it has changed since it was written). {advice}")
    return tensors, metadata


def has_its_checksum(path: Path) -> bool:
    """Return True if a safetensors file matches its checksum, or has none.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _MAX_HEADER))
        if not header.startswith(_BEGINNING):
            return True
        first, last = len(_BEGINNING), len(_BEGINNING) + len(_NO_SUM)
        digest = hashlib.sha256(header[:first] + _NO_SUM.encode() + header[last:])
        return hashlib.file_digest(file, lambda: digest).hexdigest().encode() == header[first:last]


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise if tensors hold NaN or infinite numbers: a detector with such weights predicts nothing.

    Raises:
        NonFiniteError: naming `what` and the first such tensors.
    """
    if bad := not_finite(tensors):
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFiniteError(
            f"{what}: is not written: {', '.join(bad[:3])}{more} held NaN or infinite numbers. Earlier files are kept; "
            "resume a training from them with --resume, a lower optim.lr and train.allow_changes=true."
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinite numbers."""
    return [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]


def _header(tensors: Mapping[str, Tensor], names: list[str], metadata: Mapping[str, str]) -> bytes:
    """Build the header, padded with spaces to a multiple of 8 bytes, which aligns the tensors behind it."""
    content: dict[str, object] = {"__metadata__": {"sha256": _NO_SUM, **metadata}}
    start = 0
    for name in names:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        entry = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, start + size]}
        content[name], start = entry, start + size
    header = json.dumps(content, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)
