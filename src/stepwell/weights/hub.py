"""What the name of a model stands for: a folder here, or files on the Hugging Face hub. Needs no torch.

Weights and settings are fetched, never code: safetensors, or the torch files of a release, which conversion
reads safely. What goes wrong is one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "HubError",
    "ModelError",
    "cache_folder",
    "check_hub_name",
    "download",
    "find_folder",
    "model_type",
]

OURS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


class ModelError(ValueError):
    """A model that is not there, is not one, or whose weights do not fit. One line."""


class HubError(OSError):
    """A download that did not happen. One line."""


def find_folder(model: str | Path) -> Path | None:
    """The folder that `model` names, None where there is none. Raises ModelError for a file."""
    folder = Path(model).expanduser()
    if folder.is_file():
        raise ModelError(f"{model} is a file; convert it into a model folder first: stepwell convert --help")
    return folder if str(model) and folder.is_dir() else None


def model_type(folder: Path) -> str:
    """What kind of model a folder says it holds. Raises ModelError without settings or without weights."""
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        hint = f" ({pickles[0]} is a pickle, which is not opened: stepwell convert)" if pickles else ""
        raise ModelError(f"{folder} holds no weights: no *.safetensors beside its config.json{hint}")
    try:
        return str(json.loads(config.read_text("utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{config} cannot be read ({type(error).__name__})") from None


def check_hub_name(name: str) -> None:
    """Raises ModelError unless `name` is owner/name, as the hub spells repositories."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ModelError(f"unknown model {name}: no such folder, and hub names look like owner/name")


def cache_folder(name: str) -> Path:
    """Where a converted release is kept: beside the hub's own cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "stepwell" / re.sub(r"[^\w.-]+", "--", name)


def download(
    repository: str,
    patterns: Sequence[str] = OURS,
    *,
    advice: str = "download it elsewhere and name its folder",
) -> Path:
    """The folder that holds a repository's files of these patterns, fetched or from the hub's cache.

    Raises HubError, which ends in `advice` where the hub cannot be reached, or which says that the hub has no
    such repository for this user.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except GatedRepoError:
        raise HubError(
            f"{repository} asks for a licence first: accept it on the hub, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(f"the hub has no {repository}, or it is private: `hf auth login`") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = type(error.__cause__ or error).__name__
        raise HubError(
            f"{repository} is not on this machine and the hub cannot be reached ({reason}); {advice}"
        ) from None
