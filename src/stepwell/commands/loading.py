"""How commands load a model to ask it, and the options that say so. Its name is looked at before torch is
imported.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stepwell.folders import check_hub_name, find_folder, is_url, model_type

if TYPE_CHECKING:
    from stepwell.images.limits import ImageLimits
    from stepwell.models.ask import Assistant

__all__ = [
    "Device",
    "Dtype",
    "MaxNewTokens",
    "Precision",
    "Revision",
    "check_model",
    "load_assistant",
    "quieten",
    "short_name",
]

Precision = Literal["float32", "bfloat16", "float16"]

Revision = Annotated[
    str | None, typer.Option(metavar="REVISION", help="Of a hub name: a commit, branch or tag.")
]
Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="Such as cpu, cuda or cuda:1. [default: a GPU where there is one]"),
]
Dtype = Annotated[Precision | None, typer.Option(help="[default: as the model was saved]")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Where an answer is cut off.")]


def load_assistant(
    model: str | None,
    revision: str | None,
    device: str | None,
    dtype: Precision | None,
    limits: ImageLimits | None = None,
) -> Assistant:
    """An assistant, opened the fast way where there is one. Raises ValueError for another kind of model."""
    check_model(model, device)
    folder = None if model is None else find_folder(model)
    if folder is not None and (kind := model_type(folder)).startswith("stepwell_"):
        raise ValueError(f"{model} answers no questions: it is a {kind!r} model")

    from stepwell.models.ask import as_assistant
    from stepwell.weights.light import load_to_ask

    quieten()
    found = load_to_ask(model, device=device, dtype=dtype, revision=revision, limits=limits)
    return as_assistant(found, str(model))


def check_model(model: str | None, device: str | None) -> None:
    """Raises ValueError for a folder that holds no model, for what is neither a folder nor a hub name, and
    for a device that is none.
    """
    folder = None if model is None else find_folder(model)
    if folder is not None:
        model_type(folder)
    elif model is not None and ("/" in model or "_" not in model):
        # Others may be published names, whose list is read where torch is.
        check_hub_name(model if is_url(model) else model.partition(":")[0])
    if device is None:
        return
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps", "xpu") or (":" in device and not index.isdecimal()):
        raise ValueError(f"unknown device {device}: use cpu, cuda, cuda:1, mps or xpu")


def short_name(model: str) -> str:
    """Of a model, for people: of a folder its own, or that of the run that it lies in."""
    folder = find_folder(model) if Path(model).is_dir() else None
    if folder is None:
        return model
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def quieten() -> None:
    """Loading bars and library warnings would drown a one-line answer."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    warnings.simplefilter("ignore")
