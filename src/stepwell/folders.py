"""A model's folder before anything in it is opened: fetched from the Hugging Face hub, its settings read.

Weights and settings are fetched, never code. What goes wrong is one line. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["HubError", "download", "one_line", "read_config"]

OURS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


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
    return " ".join(str(error).split())[:200] or type(error).__name__
