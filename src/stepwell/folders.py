"""A model's folder before anything in it is opened: found by a name, fetched from the Hugging Face hub, its
settings read.

Weights and settings are fetched, never code. What goes wrong is one line. Needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "SHIPPED",
    "SHIPPED_NAMES",
    "HubError",
    "ModelError",
    "cache_folder",
    "check_hub_name",
    "download",
    "find_folder",
    "model_type",
    "one_line",
    "read_config",
]

SHIPPED = Path(__file__).parent / "assets"
"""The model that travels with the package."""
SHIPPED_NAMES = ("reader_tiny",)

OURS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


class ModelError(ValueError):
    """A model that is not there, is not one, or whose weights do not fit. One line."""


class HubError(OSError):
    """A download that did not happen. One line."""


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


def read_config(folder: Path) -> dict[str, Any]:
    """config.json in a folder, empty where there is none. Raises ValueError where it is no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: not JSON ({type(error).__name__})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} cannot be read: it holds a {type(config).__name__}, not settings")
    return config


def one_line(error: BaseException) -> str:
    """What an error says, short enough to end a line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return " ".join(str(error).split())[:200] or type(error).__name__


def find_folder(model: str | Path) -> Path | None:
    """The folder that `model` names, or its shipped model; None where there is none. Raises ModelError for a
    file.
    """
    if model in SHIPPED_NAMES:
        return SHIPPED
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
        return str(read_config(folder)["model_type"])
    except KeyError:
        raise ModelError(f"{config} cannot be read: it says no model_type") from None
    except ValueError as error:
        raise ModelError(str(error)) from None


def check_hub_name(name: str) -> None:
    """Raises ModelError unless `name` is owner/name, as the hub spells repositories."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ModelError(
            f"unknown model {name}: no such folder, not the shipped {', '.join(SHIPPED_NAMES)}, "
            "and hub names look like owner/name"
        )


def cache_folder(name: str) -> Path:
    """Where a converted release is kept: beside the hub's own cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "stepwell" / re.sub(r"[^\w.-]+", "--", name)
