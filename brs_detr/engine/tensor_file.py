"""Named tensors on disk as safetensors, with a checksum of the whole file inside it.

Any reader of safetensors reads these files. They are written here rather than by that library: tensor by tensor without
a copy of them all, with the permissions that the umask asks for, and with the operating system's own errors. The
checksum stands at the beginning of the header and covers the rest of the header and all tensors.
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

from brs_detr.engine.storage import CheckpointError, NonFiniteError, write_file

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
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        path: the file.
        tensors: on any device; they may share memory.
        metadata: texts to store beside them.

    Raises:
        NonFiniteError: a tensor holds NaN or infinite numbers.
        StorageError: the disk has no room, or may not be written to.
    """
    require_finite(tensors, str(path))
    # the larger types first: every tensor then begins at a multiple of its element size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _header(tensors, names, metadata or {})

    def write(file: BinaryIO) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        digest = hashlib.sha256(header)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous()
            # a tensor of one element counts as contiguous whatever its stride, which `view` then refuses
            data = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy()
            digest.update(data)
            file.write(data)
        file.seek(8 + len(_BEGINNING))
        file.write(digest.hexdigest().encode())

    write_file(path, write)


def read_tensors(path: Path, mend: str = "use an earlier one") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a safetensors file; a file without a checksum is taken as it is.

    Args:
        path: the file.
        mend: what to do where the file is damaged, for the message.

    Raises:
        CheckpointError: it cannot be read, is damaged, or is no safetensors file.
    """
    try:
        intact = has_its_checksum(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); {_access(error, mend)}") from None
    except (SafetensorError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the file is damaged ({error}); {mend}") from None
    if not intact:
        raise CheckpointError(f"{path}: the file is damaged (it has changed since it was written); {mend}")
    return tensors, metadata


def has_its_checksum(path: Path) -> bool:
    """Is a safetensors file as it was written; True of one that holds no checksum.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LONGEST_HEADER))
        if not header.startswith(_BEGINNING):
            return True
        first, last = len(_BEGINNING), len(_BEGINNING) + len(_NO_SUM)
        digest = hashlib.sha256(header[:first] + _NO_SUM.encode() + header[last:])
        return hashlib.file_digest(file, lambda: digest).hexdigest().encode() == header[first:last]


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors of which nothing could be learned or predicted any more.

    Raises:
        NonFiniteError: naming `what` and the first of the tensors.
    """
    if bad := not_finite(tensors):
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFiniteError(
            f"{what}: is not written: {', '.join(bad[:3])}{more} held NaN or infinite numbers. What was written "
            "before is kept; a training goes on from it with --resume, a lower optim.lr and train.allow_changes=true."
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinite numbers."""
    return [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]


def _header(tensors: Mapping[str, Tensor], names: list[str], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"sha256": _NO_SUM, **metadata}}
    place = 0
    for name in names:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        entry = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        content[name], place = entry, place + size
    header = json.dumps(content, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _access(error: OSError, mend: str) -> str:
    return "ask its owner for the permission" if isinstance(error, PermissionError) else mend
