"""The configuration of an assistant, as transformers keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from stepwell.language.template import find_template
from stepwell.models.settings import PlainConfig, VisionConfig, vision_json, vision_settings

__all__ = ["StepwellConfig", "refuse_unknown"]


class StepwellConfig(PreTrainedConfig):
    """Any vision system and any causal language model of transformers.

    `vision_config` is one of the `VisionConfig` kinds or its JSON, `text_config` a transformers
    configuration or its JSON. `template` names a chat template of the language room, None means the
    tokenizer's own. Raises ValueError for keys that neither this class nor PreTrainedConfig knows.
    """

    model_type = "stepwell"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: dict[str, Any] | VisionConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        *,
        image_token_id: int = 0,
        template: str | None = None,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("separators", None):  # folders of 0.1 say that they have none
            raise ValueError(
                "StepwellConfig knows no separators; the layout of the vision system tells them now"
            )
        refuse_unknown(kwargs, type(self).__name__)
        self.vision_config = vision_json(PlainConfig() if vision_config is None else vision_config)
        self.text_config = _text_config(text_config)
        self.image_token_id = image_token_id
        self.template = template if template is None else find_template(template).name
        if tie_word_embeddings is None:
            tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def vision(self) -> VisionConfig:
        """`vision_config` as the dataclass of its kind."""
        return vision_settings(self.vision_config)


# Keys that from_pretrained and save_pretrained hand to a configuration beside its own fields.
_SET_BY_TRANSFORMERS = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "attn_implementation",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "quantization_config",
        "torch_dtype",
        "use_cache",
    }
)


def refuse_unknown(keys: Iterable[str], owner: str) -> None:
    """Raises ValueError for keys that PreTrainedConfig, which keeps anything it is given, does not know."""
    known = {*PreTrainedConfig().to_dict(), *_SET_BY_TRANSFORMERS}
    if unknown := sorted(key for key in keys if key not in known):
        raise ValueError(f"{owner} knows no {', '.join(map(repr, unknown))}; check the spelling")


def _text_config(config: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    if config is None:
        return AutoConfig.for_model("llama")
    if isinstance(config, PreTrainedConfig):
        return config
    if "model_type" not in config:
        raise ValueError("text_config needs a model_type, such as 'llama' or 'qwen2'")
    known = AutoConfig.for_model(config["model_type"]).to_dict()
    for key in config.keys() - known.keys():  # keys of other versions pass, slips of the pen do not
        if meant := get_close_matches(key, known, n=1, cutoff=0.85):
            raise ValueError(f"text_config knows no {key!r}; did you mean {meant[0]!r}?")
    return AutoConfig.for_model(**config)
