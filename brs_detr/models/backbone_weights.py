"""Reading the weights of a backbone from a local file, whoever saved it.

Understood are torchvision, timm and original Swin files as well as whole detectors, whose `backbone.` part is taken.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from brs_detr.user_files import UserFileError, require_unpacked

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


def _some(names: list[str], limit: int = 3) -> str:
    if not names:
        return "0"
    more = ", ..." if len(names) > limit else ""
    return f"{len(names)} ({', '.join(names[:limit])}{more})"
