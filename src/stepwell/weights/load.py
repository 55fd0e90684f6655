"""`stepwell.load`: the shipped model, a folder, a model of ours on the hub, or a published release.

Strict where transformers is not: a tensor that is missing, left over or of another shape is an error, never a
random number, pickled weights are not opened, and code that lies beside weights is never run. Everything that
can go wrong with a model is one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME

from stepwell.folders import (
    SHIPPED,
    HubError,
    ModelError,
    cache_folder,
    check_hub_name,
    commit_of,
    download,
    find_folder,
    model_type,
    one_line,
)
from stepwell.images.limits import ImageLimits
from stepwell.keys.checkpoint import CheckpointError, open_checkpoint, weight_files
from stepwell.models.ask import Assistant
from stepwell.models.config import StepwellConfig
from stepwell.models.loading_bar import no_loading_bar
from stepwell.models.predicting import Predicts
from stepwell.models.processor import StepwellProcessor
from stepwell.models.published.papers import find_published
from stepwell.models.published.published import Published
from stepwell.models.register import MODELS
from stepwell.weights.convert import convert
from stepwell.weights.placement import Precision, find_device, find_dtype

__all__ = ["load", "model_folder"]

RELEASE = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")


def load(
    model: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: Precision | None = None,
    revision: str | None = None,
    vision: Mapping[str, Any] | None = None,
    limits: ImageLimits | None = None,
    loading_bar: bool = False,
) -> Any:
    """A model, ready to use: an Assistant (`.ask`, `.features`), a detector, a segmenter or a classifier
    (`.predict`), with the processor that lies beside it, or what else a folder holds: a backbone, an
    up-sampler.

    model: None for the shipped assistant; "boards_tiny", the shipped detector; a folder of ours; `owner/name`
    on the hub in our format; the name of a published release ("OpenGVLab/PIIP-LLaVA_CLIP-BL_512-256_7B",
    "OpenGVLab/PIIP:detection/<file>.pth"), which is downloaded and converted once.
    device: None takes a GPU where there is one. dtype: "float32", "bfloat16", "float16"; None keeps the
    stored one. revision: of a name on the hub, a commit, branch or tag; which commit it was is the model's
    `commit`, or `config._commit_hash`. vision: changes to the geometry of
    an assistant, of which no weight depends, such as {"sizes": [448, 896]}. limits: of the image files that
    an assistant is asked about. loading_bar: draws transformers'. Raises ModelError and HubError, each one
    line.
    """
    where, precision, folder = find_device(device), find_dtype(dtype), model_folder(model, revision)
    with nullcontext() if loading_bar else no_loading_bar():
        return _open(folder, where, precision, vision, limits)


def _open(
    folder: Path,
    where: torch.device,
    precision: torch.dtype | None,
    vision: Mapping[str, Any] | None,
    limits: ImageLimits | None,
) -> Any:
    kind = model_type(folder)
    if kind not in MODELS:
        raise ModelError(
            f"{folder} holds a {kind!r} model, not one of ours ({', '.join(sorted(MODELS))}); "
            "official releases come in through stepwell convert"
        )
    if kind != StepwellConfig.model_type:
        if vision or limits:
            name = "vision" if vision else "limits"
            raise ModelError(f"{folder} holds a {kind!r} model; {name}=... is for assistants")
        model: Any = _strict(MODELS[kind], folder, precision).to(where)
        if isinstance(model, Predicts):
            model.kept_processor = _image_processor(model, folder)
        return model
    processor = _processor(folder)
    processor.image_processor.limits = limits or processor.image_processor.limits
    options: dict[str, Any] = {}
    if vision:
        try:
            processor.image_processor = processor.image_processor.adjusted(vision)
        except ValueError as error:
            raise ModelError(str(error)) from None
        options["config"] = StepwellConfig.from_pretrained(folder)
        options["config"].vision_config = processor.image_processor.vision_config
    network: Any = _strict(MODELS[kind], folder, precision, **options).to(where)
    assistant = Assistant(network, processor)
    assistant.commit = network.config._commit_hash
    return assistant


def model_folder(model: str | Path | None, revision: str | None) -> Path:
    """The folder that a name stands for, fetched and converted where it must be. Raises as `load` does."""
    if revision is not None and (model is None or find_folder(model) is not None):
        raise ModelError(f"revision {revision}: {model or SHIPPED.name} is on this machine, as one version")
    if model is None:
        if not (SHIPPED / "config.json").is_file():
            raise ModelError(f"this installation has no shipped model in {SHIPPED}; name one")
        return SHIPPED
    folder = find_folder(model)
    if folder is not None:
        return folder
    published = find_published(str(model))
    if published is not None:
        return _released(published, revision)
    check_hub_name(str(model))
    return download(str(model), revision=revision)


def _released(published: Published, revision: str | None) -> Path:
    """The converted release, made on first use; the converted folder is what is kept and asked for later, one
    for each commit that somebody asked for.
    """
    folder, source = cache_folder(published.name), None
    if revision is not None and published.repository is not None:
        source = _source(published, published.repository, revision)
        folder = cache_folder(f"{published.name}--{commit_of(source) or revision}")
    if not (folder / "config.json").is_file():
        if published.repository is None:
            raise ModelError(f"{published.name} was described but not released; convert your own copy of it")
        source = source or _source(published, published.repository, revision)
        convert(source, folder, as_=published.name)
    return folder


def _source(published: Published, repository: str, revision: str | None) -> Path:
    """The file or folder of a release, whole. Raises HubError where it is not to be had."""
    what = published.file or "all files"
    advice = (
        f"download {what} from {repository} elsewhere, then "
        f"stepwell convert {published.file or 'FOLDER'} OUT --as {published.name}"
    )
    patterns = [published.file] if published.file else RELEASE
    source = download(repository, patterns, revision=revision, advice=advice)
    source /= published.file or ""
    try:
        weight_files(source)
        whole = source.is_file() or (source / "config.json").is_file()
    except (OSError, CheckpointError):  # offline, the hub's cache hands out whatever part it holds
        whole = False
    if not whole:
        raise HubError(f"{what} of {repository} did not arrive on this machine; {advice}")
    return source


def _processor(folder: Path) -> Any:
    try:
        return StepwellProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder} has no processor that can be used: {one_line(error)}") from None


def _image_processor(model: Any, folder: Path) -> Any:
    """The one that lies beside the weights; None where there is none."""
    if not (folder / IMAGE_PROCESSOR_NAME).is_file():
        return None
    try:
        return type(model.image_processor()).from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder} has no image processor that can be used: {one_line(error)}") from None


def _strict(kind: type[PreTrainedModel], folder: Path, dtype: torch.dtype | None, **options: Any) -> Any:
    """from_pretrained without its leniency: every tensor found, none left over, all of the right shape."""
    open_checkpoint(folder)  # says in one line what is damaged
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be loaded: {one_line(error)}") from None
    for what, words in (
        ("missing_keys", "are missing"),
        ("unexpected_keys", "have no place in this model"),
        ("mismatched_keys", "are of another shape"),
    ):
        if names := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[what]):
            raise ModelError(f"the weights in {folder} do not fit: {len(names)} tensors {words} ({names[0]})")
    model.config._commit_hash = commit_of(folder)
    return model
