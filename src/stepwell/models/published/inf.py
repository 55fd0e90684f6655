"""INF-LLaVA, arXiv 2407.16198: the releases, and the paper where it differs.

Both releases are one model, trained on more data for the second. Their inference code makes images of
336x336 large again in front of a model that was trained on sharp ones of 1008x1008; here they are sharp, and
`vision={"small_input": True}` is the other.
"""

from __future__ import annotations

from collections.abc import Iterator

from stepwell.fuse.dual import PAPER_ENHANCEMENT
from stepwell.keys.engine import Prefix, Rule
from stepwell.keys.inf import vision_rules
from stepwell.keys.llava import LANGUAGE_MODEL
from stepwell.models.inf import InfConfig
from stepwell.models.published.published import LLAMA3_8B, Published, clip_rules

__all__ = ["INF", "PAPER"]

PAPER = InfConfig(enhancement=PAPER_ENHANCEMENT, low_view="resized", combine="add")
"""The model of the paper, where that says something else than the code does."""

LANGUAGE = LLAMA3_8B | {"vocab_size": 128257, "bos_token_id": 128000, "eos_token_id": [128001, 128009]}
"""With a word for padding; either of two words ends an answer."""


def _rules(settings: InfConfig) -> list[Rule]:
    vision = vision_rules(clip_rules(settings.encoder, settings.arguments))
    return [Prefix("", "model.vision.", vision), *LANGUAGE_MODEL]


def _releases() -> Iterator[Published]:
    for name, repository in (
        ("inf_llava", "WeihuangLin/INF-LLaVA-sft"),
        ("inf_star_llava", "WeihuangLin/INF_star-LLaVA-sft"),
    ):
        yield Published(
            name=name,
            task="chat",
            settings=InfConfig(),
            rules=_rules,
            text_config=LANGUAGE,
            template="llama3_inf",
            repository=repository,
        )
    yield Published(
        name="inf_paper",
        task="chat",
        settings=PAPER,
        rules=_rules,
        text_config=LANGUAGE,
        template="llama3_inf",
        quirk="the model as the paper says; the released code builds another",
    )


INF: tuple[Published, ...] = (*_releases(),)
