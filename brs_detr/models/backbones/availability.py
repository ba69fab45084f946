"""Whether the pretrained weights of a backbone can be had here: in timm's cache, or from a network that answers."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import threading
import urllib.request
from typing import Literal
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from timm.models import PretrainedCfg, get_pretrained_cfg

PATIENCE = 2.0  # seconds
LONG_PATIENCE = 4.0  # where no answer ends the run; below five seconds altogether
_NAMES = ("model.safetensors", "pytorch_model.bin")  # the files of the hub that timm looks for, in its order


def where_weights_are(name: str, patience: float = PATIENCE) -> Literal["cache", "network"] | None:
    """Look for the pretrained weights of a timm model, without downloading them.

    Args:
        name: timm's, with or without the tag of the weights.
        patience: seconds after which a network that does not answer counts as none.

    Returns:
        Where they are; None if they are out of reach, or there are none of that name.
    """
    config = get_pretrained_cfg(name)
    if config is None:
        return None
    if is_cached(config):
        return "cache"
    if config.hf_hub_id:
        if constants.HF_HUB_OFFLINE:
            return None
        url = hf_hub_url(config.hf_hub_id, config.hf_hub_filename or _NAMES[0])
    else:
        url = str(config.url or "")
    return "network" if url and has_file(url, patience) else None


def require_reachable(name: str) -> None:
    """Raise at once if pretrained weights are out of reach: timm's client would retry for most of a minute.

    Args:
        name: timm's; names of a hub or a folder (`hf-hub:...`) are not checked.

    Raises:
        RuntimeError: they are not in the cache, and their server cannot be connected to.
    """
    config = None if ":" in name else get_pretrained_cfg(name)
    if config is None or is_cached(config):
        return
    url = constants.ENDPOINT if config.hf_hub_id else str(config.url or "")
    reason = "HF_HUB_OFFLINE is set" if config.hf_hub_id and constants.HF_HUB_OFFLINE else ""
    # with a proxy nothing is known before the proxy is asked, which the client does
    if not reason and url and not urllib.request.getproxies() and not connects(url, LONG_PATIENCE):
        reason = f"{url} cannot be reached"
    if reason:
        raise RuntimeError(
            f"the pretrained weights of {name} cannot be downloaded ({reason}). Connect to the network once, after "
            "which they are in the cache. Or set model.backbone.checkpoint=PATH to a local file, or start from random "
            "weights: model.backbone.pretrained=false model.backbone.norm=batch model.backbone.frozen_stages=0."
        )


def connects(url: str, patience: float) -> bool:
    """Check whether a server can be connected to within so many seconds; in a thread, as in `has_file`."""
    connected, address = threading.Event(), urlsplit(url)

    def connect() -> None:
        port = address.port or (80 if address.scheme == "http" else 443)
        with contextlib.suppress(OSError, ValueError):
            socket.create_connection((address.hostname or "", port), timeout=patience).close()
            connected.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(patience)
    return connected.is_set()


def is_cached(config: PretrainedCfg) -> bool:
    """Check whether the weights of a timm model were downloaded before, from the hub or from their own address."""
    if config.hf_hub_id:
        names = (config.hf_hub_filename,) if config.hf_hub_filename else _NAMES
        return any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in names)
    return bool(config.url) and os.path.isfile(
        os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(str(config.url)))
    )


def has_file(url: str, patience: float = PATIENCE) -> bool:
    """Check whether a server has a file: False if it refuses, or does not answer in time.

    In a thread that is left behind: the look-up of a name has no timeout, and can take minutes without a network.
    """
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=patience):  # raises for every answer but a success
                answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return answered.is_set()
