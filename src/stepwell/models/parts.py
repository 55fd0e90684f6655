"""Parts of a model start from weights of others: encoders, a language model with its head, anything of ours.

Every training of the three papers starts so: from published encoders and a published language model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from stepwell.encoders.convnext import ConvNeXt
from stepwell.encoders.pretrained import find_weights, load_encoder_weights
from stepwell.encoders.resnet import ResNet
from stepwell.encoders.timm_encoder import TimmEncoder
from stepwell.encoders.vit import VisionTransformer
from stepwell.folders import ModelError, commit_of, one_line, read_config
from stepwell.fuse.upsample import InversePyramid
from stepwell.keys.checkpoint import Checkpoint, Tensors, TensorSource, open_checkpoint
from stepwell.keys.engine import AS_IT_IS, Drop, Rename, Rule, plan
from stepwell.keys.fill import fill
from stepwell.keys.report import Report
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.loading_bar import no_loading_bar
from stepwell.models.register import MODELS
from stepwell.models.upsampler import StepwellUpsamplerConfig, refuse_other_upsampler

__all__ = ["load_parts"]

LANGUAGE = "language"


def load_parts(
    model: PreTrainedModel,
    weights: Mapping[str, str | Path],
    *,
    parts: Mapping[str, str] | None = None,
    revisions: Mapping[str, str] = {},
) -> dict[str, Report]:
    """Fill parts of a model, one of ours, with weights of others; -> what became of every tensor, by part.

    weights: names of parts -> where they start. An encoder (`vision.branches.0`) starts as
    `load_encoder_weights` says. `language` starts from a folder, a file or a name on the hub of a causal
    language model of transformers. Any part starts from a model folder of ours, or from a file of its own
    tensors (.safetensors, .pth, .bin); an up-sampler from the folder that its training left. parts: names ->
    prefixes of the model's parameters, by default `model.parts`. revisions: of parts that start from a name
    on the hub, a commit, branch or tag; each report says which commit it was.

    Raises ValueError for a part that there is not, for a revision of what is on this machine, and for weights
    that do not fit (FitError, with the report), FileNotFoundError, HubError, CheckpointError.
    """
    parts = model.parts if parts is None else parts
    reports = {}
    if unknown := sorted(revisions.keys() - weights.keys()):
        raise ValueError(f"revisions.{unknown[0]}: weights name no such part")
    # The largest last, and what is within a part behind the part.
    order = sorted(weights, key=lambda part: (part.startswith(LANGUAGE), part.count("."), part))
    for part, source in ((part, weights[part]) for part in order):
        try:
            module = _submodule(model, part, parts)
            reports[part] = _load_part(model, module, part, str(source), parts, revisions.get(part))
        except ValueError as error:
            error.args = (f"parts.{part}: {' '.join(str(error).split())}",)
            raise
    return reports


def _submodule(model: nn.Module, part: str, parts: Mapping[str, str]) -> nn.Module:
    if part == LANGUAGE and part in parts:
        return nn.ModuleDict({"model": model.get_submodule(parts[part]), "lm_head": _head(model)})
    matches = [name for name in parts if part == name or part.startswith(f"{name}.")]
    name = max(matches, key=len, default="")
    try:
        return model.get_submodule(parts[name] + part.removeprefix(name))
    except (AttributeError, KeyError):
        there = sorted(part for part, place in parts.items() if _has(model, place))
        raise ValueError(f"the model has no such part; its parts are {', '.join(there)}") from None


def _has(model: nn.Module, place: str) -> bool:
    try:
        return isinstance(model.get_submodule(place), nn.Module)
    except AttributeError:
        return False


def _load_part(
    model: PreTrainedModel,
    module: nn.Module,
    part: str,
    source: str,
    parts: Mapping[str, str],
    revision: str | None,
) -> Report:
    path = find_weights(source, revision)
    kind = str(read_config(path).get("model_type")) if path.is_dir() else None
    is_upsampler = kind == StepwellUpsamplerConfig.model_type  # a part already
    if is_upsampler and isinstance(module, InversePyramid):
        refuse_other_upsampler(module, StepwellUpsamplerConfig.from_pretrained(path))
    if kind in MODELS and not is_upsampler:
        report = _from_ours(module, open_checkpoint(path), source, _prefixes(part, parts))
    elif part == LANGUAGE:
        report = _from_causal(model, module, path, source)
    elif isinstance(module, VisionTransformer | ConvNeXt | ResNet | TimmEncoder):
        report = load_encoder_weights(module, source, revision=revision)
    else:
        tensors = open_checkpoint(path)
        report = fill(module, plan(tensors.shapes, [AS_IT_IS]), tensors, name=source)
    report.commit = commit_of(path)
    return report


def _prefixes(part: str, parts: Mapping[str, str]) -> dict[str, str]:
    """Of a part's tensors in a whole model -> in `_submodule`."""
    if part == LANGUAGE:
        return {f"{parts[part]}.": "model.", "lm_head.": "lm_head."}
    name = max((name for name in parts if part == name or part.startswith(f"{name}.")), key=len)
    return {f"{parts[name]}{part.removeprefix(name)}.": ""}


def _from_ours(module: nn.Module, tensors: Checkpoint, source: str, prefixes: Mapping[str, str]) -> Report:
    rules: list[Rule] = [
        Rename(rf"{re.escape(theirs)}(.+)", rf"{ours}\1") for theirs, ours in prefixes.items()
    ]
    rules.append(Drop(r".+", "of other parts"))
    return fill(module, plan(tensors.shapes, rules), tensors, name=source, absent=_tied(module))


def _from_causal(model: PreTrainedModel, module: nn.Module, path: Path, source: str) -> Report:
    """The tensors of a causal language model, under the names of its own class."""
    if path.is_file():
        with torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(model.config.text_config, trust_remote_code=False)
        tensors: TensorSource = open_checkpoint(path)
    else:
        causal = _causal(path, source)
        tensors = Tensors(causal.state_dict())
    names = {id(submodule): name for name, submodule in causal.named_modules()}
    base, head = names[id(causal.base_model)], names[id(causal.get_output_embeddings())]
    rules: list[Rule] = [
        Rename(rf"{re.escape(head)}\.(.+)", r"lm_head.\1"),
        Drop(r".*rotary_emb\.inv_freq", "computed from the position"),
        Rename(rf"{re.escape(base)}\.(.+)", r"model.\1"),
    ]
    return fill(module, plan(tensors.shapes, rules), tensors, name=source, absent=_tied(module))


def _causal(folder: Path, source: str) -> PreTrainedModel:
    """Raises ModelError for what is none, and for one that would have to invent tensors or leave some out."""
    try:
        with no_loading_bar():
            causal, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:  # any language model's own code, a damaged file
        raise ModelError(f"{source} gives no causal language model: {one_line(error)}") from None
    for what, words in (("missing_keys", "missing"), ("unexpected_keys", "unknown")):
        if names := sorted(info[what]):
            raise ModelError(f"{source} does not fit: {len(names)} {words} ({names[0]})")
    return cast(PreTrainedModel, causal)


def _head(model: Any) -> nn.Module:
    assert isinstance(model, StepwellForConditionalGeneration)
    return model.get_output_embeddings()


def _tied(module: nn.Module) -> dict[str, str]:
    """Names of the head's tensors that are the embedding's too."""
    state = module.state_dict(keep_vars=True)
    seen: dict[int, str] = {}
    for name, tensor in state.items():
        seen.setdefault(id(tensor), name)
    return {name: f"is {seen[id(t)]}" for name, t in state.items() if seen[id(t)] != name}
