"""Files from the Hugging Face hub, and one line where they cannot be had.

Weights and settings are fetched, never code: safetensors, or the torch files of a release, which conversion
reads safely.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["HubError", "cache_folder", "download", "looks_like_a_hub_name"]

OURS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


class HubError(OSError):
    """A download that did not happen. One line."""


def looks_like_a_hub_name(name: str) -> bool:
    """owner/name, as the hub spells repositories."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) is not None


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
