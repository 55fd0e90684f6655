"""Low-rank adapters on parts of an assistant: LoRA (Hu et al., arXiv 2106.09685), by peft.

A part with adapters keeps its weights; two small matrices beside every linear layer learn in their place.
Merged, they are gone into the weights, and nobody needs peft.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

__all__ = ["adapted_layers", "add_adapters", "lora_config", "merge_adapters", "save_adapters"]

_ADAPTER = "default"  # peft's name of the one that there is
_SAVED = "base_model.model."  # before every name in a file of peft's


def lora_config(
    model: Any,
    parts: Sequence[str] = ("language",),
    *,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    whole: Sequence[str] = ("projector",),
) -> Any:
    """A configuration for `peft.get_peft_model(model, config)`: adapters on all linear layers of the language
    model, of the encoders, or of both.

    model: a StepwellForConditionalGeneration. parts: "language", "vision". rank: of the adapters, which are
    weighed by alpha / rank. whole: parts, by the names that recipes use, that learn in full, and are saved
    with the adapters. Raises ValueError for other parts, ImportError where peft is missing.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ImportError('adapters need peft: pip install "stepwell[train]"') from None
    names = adapted_layers(model, parts)
    if missing := sorted(set(whole) - set(model.parts)):
        raise ValueError(f"the model has no part {missing[0]!r}; it has {', '.join(model.parts)}")
    within = [
        place for part, place in model.parts.items() for own in whole if f"{part}.".startswith(f"{own}.")
    ]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="|".join(map(re.escape, names)),  # a list would match by the ends of names
        modules_to_save=_callable(model, _outermost(within)) or None,
    )


def adapted_layers(model: Any, parts: Sequence[str]) -> list[str]:
    """Names of the linear layers of `parts`, "language" and "vision". Raises ValueError for other parts."""
    places = {"language": ["model.language_model"], "vision": _encoders(model)}
    unknown = sorted(set(parts) - places.keys())
    if unknown or not parts:
        raise ValueError(f"adapters go on language, vision or both, got {', '.join(unknown) or 'nothing'}")
    prefixes = tuple(f"{place}." for part in parts for place in places[part])
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefixes)
    ]


def _outermost(names: Sequence[str]) -> list[str]:
    """Of modules, those that are in no other."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _callable(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Of modules, those that are called; what a list holds in its place, since peft copies no list."""
    found: list[str] = []
    for name in names:
        module = model.get_submodule(name)
        inner = [f"{name}.{child}" for child, _ in module.named_children()]
        found += inner if isinstance(module, nn.ModuleList | nn.ModuleDict) else [name]
    return found


def _encoders(model: Any) -> list[str]:
    """Names of the modules."""
    encoders = {id(encoder) for encoder in model.model.vision.encoders}
    return [name for name, module in model.named_modules() if id(module) in encoders]


def add_adapters(model: nn.Module, config: Any) -> None:
    """Into the model, in place; its other parameters keep their names but for those that are adapted. What
    is whole stays as it is.
    """
    from peft import inject_adapter_in_model

    sizes = {f"is_loaded_in_{bits}bit": True for bits in (4, 8)}  # peft asks before it looks at layers
    vars(model).update(sizes)
    inject_adapter_in_model(replace(config, modules_to_save=None), model)
    for name in sizes:
        delattr(model, name)


def save_adapters(model: nn.Module, config: Any, folder: Path, *, base: str) -> None:
    """What `peft.PeftModel.from_pretrained(base, folder)` loads. base: a folder or a name on the hub."""
    whole = tuple(f"{name}." for name in config.modules_to_save or ())
    tensors = {
        _SAVED + name.replace(f".{_ADAPTER}.", "."): tensor.clone().contiguous()  # tied ones are two here
        for name, tensor in model.state_dict().items()
        if ".lora_" in name or name.startswith(whole)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)


def merge_adapters(model: nn.Module) -> None:
    """Into the weights, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge(safe_merge=True)
        model.set_submodule(name, module.get_base_layer())
