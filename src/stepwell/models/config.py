"""The configuration of an assistant, as transformers keeps it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from stepwell.folders import FORMAT, check_format
from stepwell.language.template import find_template
from stepwell.models.plain import PlainConfig
from stepwell.models.systems import vision_settings
from stepwell.models.vision import VisionConfig, settings_json

__all__ = ["LOADING", "StepwellConfig", "checked_format", "refuse_other_settings", "refuse_unknown"]


class StepwellConfig(PreTrainedConfig):
    """Any vision system and any causal language model of transformers.

    This configuration owns the settings of a model: the processor beside it is held against it when it is
    loaded. `vision_config` is the settings of a system in models/systems.py or their JSON, `text_config` a
    transformers configuration or its JSON. `template` names a chat template of the language room, None means
    the tokenizer's own. `tie_word_embeddings` is the language model's. Raises ValueError for keys that
    neither this class nor PreTrainedConfig knows.
    """

    model_type = "stepwell"
    sub_configs = {"text_config": AutoConfig}
    # Trainer hands to metrics what is not named here: the logits.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states", "last_hidden_state"]

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
        self.stepwell_format = checked_format(kwargs)
        if kwargs.pop("separators", None):  # folders of 0.1 say that they have none
            raise ValueError(
                "StepwellConfig knows no separators; the layout of the vision system tells them now"
            )
        refuse_unknown(kwargs, type(self).__name__)
        self.vision_config = settings_json(vision_settings(vision_config or PlainConfig()))
        self.text_config = _text_config(text_config)
        if tie_word_embeddings not in (None, self.tie_word_embeddings):
            raise ValueError(
                f"tie_word_embeddings is {tie_word_embeddings}, but text_config.tie_word_embeddings is "
                f"{self.tie_word_embeddings}; set the language model's, it decides"
            )
        self.image_token_id = image_token_id
        self.template = template if template is None else find_template(template).name
        super().__init__(**kwargs)

    @property
    def tie_word_embeddings(self) -> bool:
        """Of the language model, whose configuration says it."""
        return bool(getattr(self.text_config, "tie_word_embeddings", False))

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.text_config.tie_word_embeddings = value

    @property
    def vision(self) -> VisionConfig:
        """`vision_config` as the dataclass of its kind."""
        return vision_settings(self.vision_config)


def checked_format(fields: dict[str, Any]) -> int:
    """Takes `stepwell_format` out of a configuration's fields, and gives the one that it will be saved in.
    Raises ModelError for a newer one.
    """
    check_format(fields)
    fields.pop("stepwell_format", None)
    return FORMAT


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


LOADING = frozenset(
    {
        "_commit_hash",
        "_from_auto",
        "_from_pipeline",
        "backend",
        "cache_dir",
        "code_revision",
        "force_download",
        "local_files_only",
        "proxies",
        "revision",
        "subfolder",
        "token",
        "trust_remote_code",
        "use_fast",
    }
)
"""Keywords of transformers' from_pretrained that say where files are, and how they are read."""


def refuse_other_settings(
    source: StepwellConfig | str | os.PathLike[str], loading: Mapping[str, Any] | None = None, **settings: Any
) -> None:
    """Raises ValueError naming the first setting of a processor that its model's configuration has otherwise.

    source: the configuration, or the folder or name on the hub where its config.json may be; loading: the
    keywords that the processor was loaded with from there.
    """
    if not isinstance(source, StepwellConfig):
        where = {name: value for name, value in (loading or {}).items() if name in LOADING}
        try:
            fields, _ = PreTrainedConfig.get_config_dict(source, **where)
        except OSError:
            return
        if fields.get("model_type") != StepwellConfig.model_type:
            return
        source = StepwellConfig.from_dict(fields)
    for name, value in settings.items():
        if difference := _first_difference(name, getattr(source, name), value):
            field, theirs, ours = difference
            raise ValueError(
                f"{field} is {theirs!r} in the model's config.json and {ours!r} in the processor beside it, "
                "but they must agree; save both from one model"
            )


def _first_difference(name: str, a: Any, b: Any) -> tuple[str, Any, Any] | None:
    """The dotted name of the first leaf in which two JSON values differ, and both leaves."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        pairs = [(f"{name}.{key}", a[key], b[key]) for key in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(f"{name}.{i}", *pair) for i, pair in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else (name, a, b)
    return next(filter(None, (_first_difference(*pair) for pair in pairs)), None)


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
