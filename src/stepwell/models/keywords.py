"""Keywords of a forward that nobody reads are refused: a misspelt `labels` would train nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args

import torch
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import TransformersKwargs

__all__ = ["names_of", "refuse_unread"]

_OF_TRANSFORMERS = TransformersKwargs.__annotations__.keys() | FlashAttentionKwargs.__annotations__.keys()
# What processors and transformers hand over, whether or not a language model looks at it.
_HANDED_OVER = {"assistant_masks", "cache_position", "mm_token_type_ids", "token_type_ids", "use_cache"}
# Attention that takes all it needs from a layer; what a server's own wants comes through every forward.
_ATTENTION = ("eager", "sdpa", "flash_attention", "flex_attention")


def refuse_unread(
    model: PreTrainedModel, language_model: PreTrainedModel, keywords: Mapping[str, Any]
) -> None:
    """Raises TypeError, as Python does, for keywords of `model.forward` that nothing below it knows.

    Known is what transformers hands to every model, and what the language model names. Not looked at in a
    compiled graph, and where the attention is none of transformers'.
    """
    if not keywords or torch.compiler.is_compiling():
        return
    if not str(language_model.config._attn_implementation).startswith(_ATTENTION):
        return
    known = _OF_TRANSFORMERS | _HANDED_OVER | names_of(type(language_model).forward)
    for name in sorted(keywords.keys() - known):
        meant = get_close_matches(name, known | names_of(type(model).forward), n=1)
        advice = f"; did you mean {meant[0]!r}?" if meant else ""
        raise TypeError(f"{type(model).__name__} knows no {name!r}{advice}")


@cache
def names_of(function: Callable[..., Any]) -> frozenset[str]:
    """The keywords that a function's signature names, those of a typed **kwargs among them."""
    names: set[str] = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            names.add(name)
        for typed in get_args(parameter.annotation) if parameter.kind is parameter.VAR_KEYWORD else ():
            names |= getattr(typed, "__annotations__", {}).keys()
    return frozenset(names - {"self"})
