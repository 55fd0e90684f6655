"""What a model is made of, as data: the vision systems, told apart by `kind`, and the configuration of an
assistant.

Vision settings are frozen pydantic dataclasses: they refuse unknown keys and nonsense when they are made,
and they turn into plain JSON and back. A new system adds one dataclass and one member of `VisionConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from difflib import get_close_matches
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from transformers import AutoConfig, PreTrainedConfig

from stepwell.encoders.catalogue import check_encoder
from stepwell.encoders.encoder import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Statistics
from stepwell.language.prompt import find_template

__all__ = [
    "BranchConfig",
    "InteractionConfig",
    "PiipConfig",
    "PlainConfig",
    "ProjectorConfig",
    "StepwellConfig",
    "VisionConfig",
    "first_complaint",
    "refuse_unknown",
    "vision_json",
    "vision_settings",
]

Framing = Literal["aspect", "pad", "crop"]
"""How a picture meets a vision system: its aspect kept; padded to a square; short side resized, centre
cropped.
"""

_strict = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_strict)
class BranchConfig:
    """One encoder of a pyramid. `size` is the side of its square view, or the long side where aspect is
    kept."""

    encoder: str  # a name in encoders/catalogue.py
    size: Annotated[int, Field(gt=0)]
    interactions: tuple[tuple[int, int], ...] = ()  # layers (first, last) run before each interaction
    arguments: dict[str, Any] = field(
        default_factory=dict
    )  # constructor arguments that differ from the catalogue

    def __post_init__(self) -> None:
        expected = 0
        for first, last in self.interactions:
            if first != expected or last < first:
                raise ValueError(
                    f"interactions must be adjoining layer ranges from 0 on, got {self.interactions}"
                )
            expected = last + 1
        check_encoder(self.encoder, self.arguments)


@dataclass(frozen=True, kw_only=True, config=_strict)
class InteractionConfig:
    """PIIP, arXiv 2501.07783, section III-C; the defaults are those of every released configuration."""

    attention: Literal["deformable", "regular"] = "deformable"
    num_heads: Annotated[int, Field(gt=0)] = 16
    num_points: Annotated[int, Field(gt=0)] = 4
    ratio: Annotated[float, Field(gt=0)] = 0.5  # width inside deformable attention / width of the query
    ffn_ratio: Annotated[float, Field(gt=0)] | None = 0.25  # None: no convolutional FFN
    project: bool = True  # linear maps between the widths of two branches
    norm: bool = True
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.4
    directions: str = "adjacent"  # a name in fuse/interaction.py (Table XVII)


@dataclass(frozen=True, kw_only=True, config=_strict)
class ProjectorConfig:
    """PIIP-LLaVA's projector: every branch to one grid, Linear, norm, GELU, Linear, sum."""

    norm: Literal["groupnorm", "layernorm"] = "groupnorm"
    num_groups: Annotated[int, Field(gt=0)] = 32
    hidden_dim: Annotated[int, Field(gt=0)] | None = None  # None: the language model's width
    grid: tuple[int, int] | None = None  # None: the grid of the last branch
    place: Annotated[float, Field(ge=0)] = 0.0  # weight of a code of column and row on every token


@dataclass(frozen=True, kw_only=True, config=_strict)
class PlainConfig:
    """LLaVA-1.5: one view, one encoder, a hidden state, a projector."""

    kind: Literal["plain"] = "plain"
    encoder: str = "clip_l_14_336"
    size: Annotated[int, Field(gt=0)] = 336
    framing: Framing = "pad"
    select_layer: int = -2  # index into the hidden states, the embedding being the first
    projector: str = "mlp2x_gelu"
    mean: Statistics = CLIP_MEAN
    std: Statistics = CLIP_STD
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=_strict)
class PiipConfig:
    """PIIP-LLaVA and its relatives: branch 1 is the largest network on the smallest view; the last gives
    the grid.
    """

    kind: Literal["piip"] = "piip"
    branches: Annotated[tuple[BranchConfig, ...], Field(min_length=1)]
    interaction: InteractionConfig = field(default_factory=InteractionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    framing: Framing = "pad"
    min_cells: Annotated[int, Field(gt=0)] = 1  # framing "aspect": cells of the short side on every branch
    mean: Statistics = IMAGENET_MEAN
    std: Statistics = IMAGENET_STD

    def __post_init__(self) -> None:
        counts = {len(branch.interactions) for branch in self.branches}
        if len(counts) > 1:
            raise ValueError(f"every branch needs the same number of interactions, got {sorted(counts)}")

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(branch.size for branch in self.branches)


VisionConfig = PlainConfig | PiipConfig
"""The closed union of vision systems; a new one is added here."""
_vision: TypeAdapter[VisionConfig] = TypeAdapter(Annotated[VisionConfig, Field(discriminator="kind")])


def vision_settings(data: dict[str, Any] | VisionConfig) -> VisionConfig:
    """A mapping with a `kind` -> the settings of that vision system. Raises ValueError naming the wrong
    field.
    """
    try:
        return _vision.validate_python(data)
    except ValidationError as error:
        if isinstance(data, dict) and "kind" not in data:
            raise ValueError("vision_config needs a kind: 'plain' or 'piip'") from None
        raise ValueError(f"vision_config: {first_complaint(error)}") from None


def vision_json(data: dict[str, Any] | VisionConfig) -> dict[str, Any]:
    """The settings of a vision system as plain JSON, every field written out."""
    return cast(dict[str, Any], _vision.dump_python(vision_settings(data), mode="json"))


def first_complaint(error: ValidationError) -> str:
    """The first thing pydantic found wrong, as one line with the field's dotted name."""
    found = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in found["loc"])
    message = found["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


class StepwellConfig(PreTrainedConfig):
    """Any vision system and any causal language model of transformers.

    `vision_config` is one of the `VisionConfig` kinds or its JSON, `text_config` a transformers
    configuration or its JSON. `template` names a chat template of language/prompt.py, None means the
    tokenizer's own; `separators` maps a layout's separators to text. Raises ValueError for keys that
    neither this class nor PreTrainedConfig knows.
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
        separators: dict[str, str] | None = None,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_unknown(kwargs, type(self).__name__)
        self.vision_config = vision_json(PlainConfig() if vision_config is None else vision_config)
        self.text_config = _text_config(text_config)
        self.image_token_id = image_token_id
        self.template = template if template is None else find_template(template).name
        self.separators = dict(separators or {})
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
