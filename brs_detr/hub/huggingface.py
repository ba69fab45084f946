"""Weights from the Hugging Face hub, and a run pushed to it: `hf://user/repository`.

huggingface_hub comes with timm. A repository holds `model.safetensors`, whose metadata has classes and settings, the
resolved `config.yaml`, the curves and the model card. Only these files are read or written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brs_detr.hub.download import DownloadError, is_reachable
from brs_detr.hub.sources import WEIGHTS, SourceError


def fetch(repository: str, revision: str | None = None) -> Path:
    """Download the weights of a repository, or take them from the hub's own cache.

    Raises:
        DownloadError: the hub does not answer, or there are no such weights.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    name = f"hf://{repository}{f'@{revision}' if revision else ''}"
    cached = try_to_load_from_cache(repository, WEIGHTS, revision=revision)
    # a quick look-up first: the client retries for most of a minute
    if constants.HF_HUB_OFFLINE or not is_reachable(constants.ENDPOINT):
        if isinstance(cached, str):
            return Path(cached)
        raise DownloadError(
            f"{name}: {constants.ENDPOINT} does not answer, and {WEIGHTS} is not in its cache "
            f"({constants.HF_HUB_CACHE}). Connect to the network, or give a local file."
        )
    try:
        return Path(hf_hub_download(repository, WEIGHTS, revision=revision))
    except LocalEntryNotFoundError as error:  # a kind of the next one: the network failed in between
        raise _not_downloaded(name, error) from None
    except EntryNotFoundError:
        raise DownloadError(
            f"{name}: this repository has no {WEIGHTS}. Use one that `brs-detr push` has written, or download its "
            "checkpoint and give the path."
        ) from None
    except RepositoryNotFoundError:
        raise DownloadError(
            f"{name}: there is no such repository, or it is private. Check the name, or log in with `hf auth login`."
        ) from None
    except Exception as error:  # those of its HTTP client have no common base
        raise _not_downloaded(name, error) from None


def _not_downloaded(name: str, error: Exception) -> DownloadError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return DownloadError(f"{name}: cannot be downloaded ({reason}). Try again later, or give a local file.")


def require_repository(name: str) -> None:
    """Refuse what the hub takes for no name of a repository with its user.

    Raises:
        SourceError: naming it.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SourceError(
            f"{name}: not the name of a repository ({str(error).rstrip('.')}). Write user/repository."
        ) from None
    if "/" not in name:
        raise SourceError(f"{name}: not the name of a repository. Write user/repository.")


def push(folder: Path, repository: str, *, private: bool = False, message: str = "Upload a detector") -> str:
    """Upload a folder to a repository of the hub, which is created if it does not exist.

    Args:
        folder: with the weights, the card and whatever else belongs to them.
        repository: user/name.
        private: whether a new repository is private.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        DownloadError: the hub does not answer, or refuses.
        SourceError: this is not the name of a repository.
    """
    from huggingface_hub import HfApi, constants

    require_repository(repository)
    if constants.HF_HUB_OFFLINE or not is_reachable(constants.ENDPOINT):
        raise DownloadError(f"{repository}: {constants.ENDPOINT} does not answer. Connect to the network.")
    api: Any = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:  # no token, a refusal, or what its HTTP client raises
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DownloadError(
            f"{repository}: cannot be uploaded ({reason}). Log in with `hf auth login`, as a user who may write there."
        ) from None
    return str(getattr(commit, "commit_url", commit))
