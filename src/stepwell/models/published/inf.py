"""INF-LLaVA, arXiv 2407.16198: the releases, and the paper where it differs.

Both releases are one model, trained on more data for the second. Their inference code makes images of
336x336 large again in front of a model that was trained on sharp ones of 1008x1008; here they are sharp, and
`vision={"small_input": True}` is the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stepwell.encoders.catalogue import encoder_arguments
from stepwell.fuse.dual import PAPER_ENHANCEMENT
from stepwell.keys.backbones import backbone_rules
from stepwell.keys.engine import Prefix, Rule
from stepwell.keys.inf import vision_rules
from stepwell.keys.llava import LANGUAGE_MODEL
from stepwell.models.inf import InfConfig
from stepwell.models.published.published import Published

__all__ = ["INF", "PAPER"]

PAPER = InfConfig(enhancement=PAPER_ENHANCEMENT, low_view="resized", combine="add")
"""The model of the paper, where that says something else than the code does."""

LLAMA3_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128257,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
}
"""Meta-Llama-3-8B-Instruct with a token for padding."""


def _rules(settings: InfConfig) -> list[Rule]:
    arguments = encoder_arguments(settings.encoder, settings.arguments)
    names = {key: arguments[key] for key in ("class_token", "class_slot", "final_norm") if key in arguments}
    tower = backbone_rules("clip", **names)
    return [Prefix("", "model.vision.", vision_rules(tower)), *LANGUAGE_MODEL]


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
            text_config=LLAMA3_8B,
            template="llama3_inf",
            repository=repository,
        )
    yield Published(
        name="inf_paper",
        task="chat",
        settings=PAPER,
        rules=_rules,
        text_config=LLAMA3_8B,
        template="llama3_inf",
        quirk="the model as the paper says; the released code builds another",
    )


INF: tuple[Published, ...] = (*_releases(),)
