"""What the name of a model stands for: a folder here, or a repository on the hub. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

from stepwell.folders import read_config

__all__ = ["SHIPPED", "ModelError", "cache_folder", "check_hub_name", "find_folder", "model_type"]

SHIPPED = Path(__file__).parents[1] / "assets"
"""The model that travels with the package."""


class ModelError(ValueError):
    """A model that is not there, is not one, or whose weights do not fit. One line."""


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
        return str(read_config(folder)["model_type"])
    except KeyError:
        raise ModelError(f"{config} cannot be read: it says no model_type") from None
    except ValueError as error:
        raise ModelError(str(error)) from None


def check_hub_name(name: str) -> None:
    """Raises ModelError unless `name` is owner/name, as the hub spells repositories."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ModelError(f"unknown model {name}: no such folder, and hub names look like owner/name")


def cache_folder(name: str) -> Path:
    """Where a converted release is kept: beside the hub's own cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "stepwell" / re.sub(r"[^\w.-]+", "--", name)
