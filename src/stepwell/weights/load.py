"""`stepwell.load`: the shipped model, a folder, a model of ours on the hub, or a published release.

Strict where transformers is not: a tensor that is missing, left over or of another shape is an error, never a
random number, and pickled weights are not opened. Everything that can go wrong with a model is one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from stepwell.models.ask import Assistant
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.perception import (
    PyramidBackbone,
    PyramidBackboneConfig,
    PyramidClassifierConfig,
    PyramidForImageClassification,
)
from stepwell.models.processor import StepwellProcessor
from stepwell.models.published.papers import find_published
from stepwell.models.published.published import Published
from stepwell.models.register import register
from stepwell.weights.checkpoint import open_checkpoint
from stepwell.weights.convert import convert
from stepwell.weights.hub import HubError, cache_folder, download, looks_like_a_hub_name

__all__ = ["SHIPPED", "ModelError", "load", "load_folder"]

SHIPPED = Path(__file__).parents[1] / "assets"
RELEASE = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Precision = str | torch.dtype


class ModelError(ValueError):
    """A model that is not there, is not one, or whose weights do not fit. One line."""


def load(
    model: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: Precision | None = None,
) -> Any:
    """A model, ready to use: an Assistant (`.ask`, `.features`), or the backbone or classifier of a folder.

    model: None for the shipped one; a folder of ours; `owner/name` on the hub in our format; the name of
    a published release ("OpenGVLab/PIIP-LLaVA_CLIP-BL_512-256_7B", "OpenGVLab/PIIP:detection/<file>.pth"),
    which is downloaded and converted once. device: None takes a GPU where there is one. dtype: "float32",
    "bfloat16", "float16"; None keeps the stored one. Raises ModelError and HubError, each one line.
    """
    return load_folder(_folder(model), device=device, dtype=dtype)


def load_folder(
    folder: Path, *, device: str | torch.device | None = None, dtype: Precision | None = None
) -> Any:
    """What a folder of ours holds; arguments and errors as in `load`."""
    where, precision = _device(device), _dtype(dtype)
    kind = _kind(folder)
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        hint = f" ({pickles[0]} is a pickle, which is not opened: stepwell convert)" if pickles else ""
        raise ModelError(f"{folder} holds no weights: no *.safetensors beside its config.json{hint}")
    register()
    return LOADERS[kind](folder, where, precision)


def _folder(model: str | Path | None) -> Path:
    """The folder that a name stands for, fetched and converted where it must be."""
    if model is None:
        if not (SHIPPED / "config.json").is_file():
            raise ModelError(f"this installation has no shipped model in {SHIPPED}; name one")
        return SHIPPED
    folder = Path(model).expanduser()
    if str(model) and folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"{model} is a file; convert it into a folder first: stepwell convert --help")
    name = str(model)
    published = find_published(name)
    if published is not None:
        return _released(published)
    if not looks_like_a_hub_name(name):
        raise ModelError(f"unknown model {name!r}: no such folder, and hub names look like owner/name")
    return download(name)


def _released(published: Published) -> Path:
    """The converted release, made on first use; the converted folder is what is kept and asked for later."""
    folder = cache_folder(published.name)
    if not (folder / "config.json").is_file():
        if published.repository is None:
            raise ModelError(f"{published.name} was described but not released; convert your own copy of it")
        convert(_source(published, published.repository), folder, as_=published.name)
    return folder


def _source(published: Published, repository: str) -> Path:
    """The file or folder of a release, whole. Raises HubError where it is not to be had."""
    what = published.file or "all files"
    advice = (
        f"download {what} from {repository} elsewhere, then "
        f"stepwell convert {published.file or 'FOLDER'} OUT --as {published.name}"
    )
    source = download(repository, [published.file] if published.file else RELEASE, advice=advice)
    if published.file:
        source = source / published.file
        there = source.is_file()
    else:
        there = _is_whole(source)
    if not there:
        raise HubError(f"{what} of {repository} did not arrive on this machine; {advice}")
    return source


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has settings and every file of weights that its index names.

    Offline, the hub's cache hands out whatever part of a repository it holds.
    """
    if not (folder / "config.json").is_file():
        return False
    for index in [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]:
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if all((folder / name).is_file() for name in names):
            return True
    return any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))


def _kind(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        kind = config["model_type"]
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a model folder: it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read ({type(error).__name__})") from None
    if kind not in LOADERS:
        raise ModelError(
            f"{folder} holds a {kind!r} model, not one of ours ({', '.join(sorted(LOADERS))}); "
            "official releases come in through stepwell convert"
        )
    return str(kind)


def _assistant(folder: Path, device: torch.device, dtype: torch.dtype | None) -> Assistant:
    try:
        processor = StepwellProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder} has no processor that can be used: {_line(error)}") from None
    return Assistant(_strict(StepwellForConditionalGeneration, folder, dtype).to(device), processor)


def _strict(kind: type[PreTrainedModel], folder: Path, dtype: torch.dtype | None) -> Any:
    """from_pretrained without its leniency: every tensor found, none left over, all of the right shape."""
    open_checkpoint(folder).close()  # says in one line what is damaged
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be loaded: {_line(error)}") from None
    for what, words in (
        ("missing_keys", "are missing"),
        ("unexpected_keys", "have no place in this model"),
        ("mismatched_keys", "are of another shape"),
    ):
        if found := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[what]):
            raise ModelError(f"the weights in {folder} do not fit: {len(found)} tensors {words} ({found[0]})")
    return model


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {str(device)!r} cannot be used: {_line(error)}") from None
    return found


def _dtype(dtype: Precision | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
        return DTYPES[dtype]
    return dtype


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


def _backbone(folder: Path, device: torch.device, dtype: torch.dtype | None) -> PyramidBackbone:
    return cast(PyramidBackbone, _strict(PyramidBackbone, folder, dtype).to(device))


def _classifier(
    folder: Path, device: torch.device, dtype: torch.dtype | None
) -> PyramidForImageClassification:
    return cast(
        PyramidForImageClassification, _strict(PyramidForImageClassification, folder, dtype).to(device)
    )


LOADERS: dict[str, Callable[[Path, torch.device, torch.dtype | None], Any]] = {
    StepwellConfig.model_type: _assistant,
    PyramidBackboneConfig.model_type: _backbone,
    PyramidClassifierConfig.model_type: _classifier,
}
"""By the model_type of a folder's config.json."""
