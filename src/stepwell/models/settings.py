"""What a model is made of, as data: the vision systems, told apart by `kind`; dense pyramids; classifiers.

All are frozen pydantic dataclasses: they refuse unknown keys and nonsense when they are made, and they turn
into plain JSON and back. A new vision system adds one dataclass and one member of `VisionConfig`. Nothing
here needs transformers, so that a plan or a count need not wait for it.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from stepwell.encoders.catalogue import check_encoder
from stepwell.encoders.encoder import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Statistics
from stepwell.heads.neck import Resampling
from stepwell.models.piip import check_rising

__all__ = [
    "HALF",
    "SIMPLE",
    "BranchConfig",
    "ClassifierSettings",
    "DenseSettings",
    "InteractionConfig",
    "PiipConfig",
    "PlainConfig",
    "ProjectorConfig",
    "VisionConfig",
    "first_complaint",
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


SIMPLE: tuple[Resampling, ...] = ("up4", "up2", "same", "maxpool2")
HALF: Statistics = (0.5, 0.5, 0.5)
_TINY = (
    BranchConfig(encoder="vit_t", size=224),
)  # transformers makes a config of defaults when it saves one


@dataclass(frozen=True, kw_only=True, config=_strict)
class DenseSettings:
    """A pyramid whose maps leave at several strides; branch 1 is the largest network on the smallest view.

    merge: "dense" (two convolutions in every branch), "stages" (one, and none in branch 1), or "none" for a
    single branch. merge_branches: positions of those that are merged, None for all (Table IX). merge_after:
    the interactions with a merge of their own, beside the last. operations: of the neck, one per map that
    leaves; none where the merged maps leave as they are. neck_norm: "layernorm" in baselines of one branch.
    """

    branches: Annotated[tuple[BranchConfig, ...], Field(min_length=1)] = _TINY
    interaction: InteractionConfig = field(default_factory=InteractionConfig)
    merge: Literal["dense", "stages", "none"] = "dense"
    merge_branches: tuple[int, ...] | None = None
    merge_after: tuple[int, ...] = ()
    operations: tuple[Resampling, ...] = SIMPLE
    neck_norm: Literal["groupnorm", "layernorm"] = "groupnorm"
    mean: Statistics = HALF
    std: Statistics = HALF

    def __post_init__(self) -> None:
        merges = len(self.merge_after) + 1
        if self.operations and merges not in (1, len(self.operations)):
            raise ValueError(f"{len(self.operations)} operations need 1 or as many merges, got {merges}")
        if self.merge == "none" and len(self.branches) > 1:
            raise ValueError(f"merge 'none' is for a single branch, not for {len(self.branches)} branches")
        check_rising(self.merge_after, len(self.branches[0].interactions))
        if self.merge_branches is not None:
            chosen = set(self.merge_branches)
            if not chosen or len(chosen) < len(self.merge_branches):
                raise ValueError(f"merge_branches {self.merge_branches} must name branches, each once")
            if not chosen <= set(range(len(self.branches))):
                raise ValueError(f"merge_branches {self.merge_branches} of {len(self.branches)} branches")


@dataclass(frozen=True, kw_only=True, config=_strict)
class ClassifierSettings:
    """A pyramid with class logits.

    head: "first_patch" or "cls", a head per branch that reads that token; "merge", one on the merged map.
    """

    branches: Annotated[tuple[BranchConfig, ...], Field(min_length=1)] = _TINY
    interaction: InteractionConfig = field(default_factory=InteractionConfig)
    head: Literal["first_patch", "cls", "merge"] = "first_patch"
    mean: Statistics = HALF
    std: Statistics = HALF
