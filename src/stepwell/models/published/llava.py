"""LLaVA-1.5, arXiv 2310.03744, and LLaVA-NeXT: the baselines, and where training may start.

Each was released twice, as transformers has it (llava-hf) and in the layout of LLaVA's own code; a name takes
both layouts. They are the same model but for LLaVA-NeXT's grids of tiles: a list of [336, 672] and others
holds widths first in LLaVA's code, which the models were trained with, and heights first in transformers.
So of two grids that fit alike the one takes the first and the other the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stepwell.keys.engine import Prefix, Rule
from stepwell.keys.llava import LANGUAGE_MODEL, TRANSFORMERS_LANGUAGE_MODEL, vision_rules
from stepwell.models.anyres import LLAVA_GRIDS, AnyResConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.published.published import (
    LLAMA3_8B,
    MISTRAL_7B,
    VICUNA_7B,
    VICUNA_13B,
    Published,
    clip_rules,
)

__all__ = ["LLAVA"]

TURNED = tuple((cols, rows) for rows, cols in LLAVA_GRIDS)


def _rules(settings: PlainConfig) -> list[Rule]:
    vision = vision_rules(clip_rules(settings.encoder, settings.arguments))
    return [Prefix("", "model.vision.", vision), *TRANSFORMERS_LANGUAGE_MODEL, *LANGUAGE_MODEL]


def _releases() -> Iterator[Published]:
    one_view, as_transformers, as_llava = (
        PlainConfig(),
        AnyResConfig(grids=TURNED),
        AnyResConfig(floor="float"),
    )
    turned = "the grids of tiles as transformers reads them, turned against LLaVA's own"
    models: tuple[tuple[str, str, str, Mapping[str, Any], str], ...] = (
        ("llava_1_5_7b", "llava-1.5-7b-hf", "liuhaotian/llava-v1.5-7b", VICUNA_7B, "vicuna_v1"),
        ("llava_1_5_13b", "llava-1.5-13b-hf", "liuhaotian/llava-v1.5-13b", VICUNA_13B, "vicuna_v1"),
        (
            "llava_next_vicuna_7b",
            "llava-v1.6-vicuna-7b-hf",
            "liuhaotian/llava-v1.6-vicuna-7b",
            VICUNA_7B,
            "vicuna_v1",
        ),
        (
            "llava_next_vicuna_13b",
            "llava-v1.6-vicuna-13b-hf",
            "liuhaotian/llava-v1.6-vicuna-13b",
            VICUNA_13B,
            "vicuna_v1",
        ),
        (
            "llava_next_mistral_7b",
            "llava-v1.6-mistral-7b-hf",
            "liuhaotian/llava-v1.6-mistral-7b",
            MISTRAL_7B,
            "mistral",
        ),
        (
            "llava_next_llama3_8b",
            "llama3-llava-next-8b-hf",
            "lmms-lab/llama3-llava-next-8b",
            LLAMA3_8B,
            "llama3_next",
        ),
    )
    for name, of_transformers, of_llava, text_config, template in models:
        has_tiles = name.startswith("llava_next")
        for suffix, repository, settings, quirk in (
            ("", f"llava-hf/{of_transformers}", as_transformers if has_tiles else one_view, turned),
            ("_original", of_llava, as_llava if has_tiles else one_view, ""),
        ):
            yield Published(
                name=name + suffix,
                task="chat",
                settings=settings,
                rules=_rules,
                text_config=text_config,
                template=template,
                repository=repository,
                quirk=quirk if has_tiles else "",
            )


LLAVA: tuple[Published, ...] = (*_releases(),)
