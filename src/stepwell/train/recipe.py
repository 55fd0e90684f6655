"""Recipes: what to build, on what data, in which stages, as one YAML file that refuses what it does not know.

A recipe may name its `base` (a shipped recipe or a file beside it) and give only the fields that differ;
mappings are merged, everything else replaced. Overrides are `a.b=c`, c in YAML; a number in the path is a
place in a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stepwell.models.settings import VisionConfig, first_complaint
from stepwell.train.shipped import recipe_names

__all__ = [
    "Auxiliary",
    "ConversationData",
    "DataSource",
    "DrawnData",
    "Model",
    "Optimiser",
    "Recipe",
    "Stage",
    "TextLineData",
    "load_recipe",
]

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Range = tuple[float, float]
Part = str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Strict):
    """The model to build: a vision system, a language model's configuration, a tokenizer, a chat template.

    Or `start`: a folder of an earlier model, and nothing else.
    """

    start: Path | None = None
    vision: VisionConfig | None = None
    text: dict[str, Any] | None = None  # a transformers configuration with its model_type
    tokenizer: str = "reader"  # "reader" builds train/tokenizer.py's; else a folder
    template: str | None = None
    start_looking: bool = False  # coordinates and attention begin as train/start.py says

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if (self.start is None) == (self.vision is None or self.text is None):
            raise ValueError("give either start, or vision and text")
        return self


class DrawnData(_Strict):
    """Pages drawn on the fly (data/drawn.py)."""

    kind: Literal["drawn"]
    weight: Annotated[float, Field(gt=0)] = 1.0
    count: Positive = 100_000
    seed: int = 0
    sides: tuple[Positive, Positive] = (320, 320)
    aspect: Range = (1.0, 1.0)
    text: tuple[Positive, Positive] = (12, 28)
    reads: Positive = 16
    page: Literal["mixed", "receipt", "document", "lines"] = "mixed"


class ConversationData(_Strict):
    """A LLaVA training file: a JSON list of pictures and conversations."""

    kind: Literal["conversations"]
    weight: Annotated[float, Field(gt=0)] = 1.0
    path: Path
    images: Path | None = None  # the folder that picture paths start from; None: the file's own


class TextLineData(_Strict):
    """Pictures with transcribed lines in a COCO file, and key fields in a JSONL file."""

    kind: Literal["text_lines"]
    weight: Annotated[float, Field(gt=0)] = 1.0
    path: Path
    images: Path
    fields: Path | None = None
    reads: Positive = 16
    long_side: Positive = 1024
    seed: int = 0


DataSource = Annotated[DrawnData | ConversationData | TextLineData, Field(discriminator="kind")]


class Optimiser(_Strict):
    """AdamW, a warm-up and a decay over the last part of the steps."""

    lr: Annotated[float, Field(gt=0)] = 2e-3
    part_lrs: dict[Part, Annotated[float, Field(gt=0)]] = {}  # by part name; the longest match counts
    betas: tuple[Share, Share] = (0.9, 0.98)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    decay_share: Share = 0.33
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class Auxiliary(_Strict):
    """Losses that exist during training only; weight 0 leaves one out."""

    frames: Annotated[float, Field(ge=0)] = 0.0  # train/line_head.py
    frame_step: Annotated[float, Field(gt=0)] = 4.0  # pixels of the largest view
    pointer: Annotated[float, Field(ge=0)] = 0.0  # train/pointer.py
    pointer_layers: tuple[int, ...] = (1, 2)
    pointer_head: Annotated[int, Field(ge=0)] = 0


class Stage(_Strict):
    """A stretch of training with one set of data, trained parts and learning rates."""

    name: str
    steps: Positive
    batch: Positive = 3
    accumulate: Positive = 1
    train: tuple[Part, ...] = ("vision", "language")
    language_loss: bool = True  # False: only the auxiliary losses, and no language model is run
    sizes: tuple[Positive, ...] | None = (
        None  # sides of the views in this stage, where they are not the model's
    )
    turns: Literal["together", "apart"] = "together"  # a conversation, or every turn as if it was asked alone
    max_length: Positive = 8192  # tokens of a sample; whole turns are left out beyond
    data: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    optimiser: Optimiser = Optimiser()
    auxiliary: Auxiliary = Auxiliary()

    @model_validator(mode="after")
    def _has_a_loss(self) -> Stage:
        if not self.language_loss and not self.auxiliary.frames:
            raise ValueError("a stage without language_loss needs auxiliary.frames above 0")
        return self


class Recipe(_Strict):
    name: str
    model: Model
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    output: Path = Path("runs")
    seed: int = 42
    bf16: bool = True
    save_steps: Positive = 500
    log_steps: Positive = 50
    workers: Annotated[int, Field(ge=0)] = 1
    resume: bool = True  # finished stages and the last checkpoint of an unfinished one are taken up again
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float16"


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by shipped name or path, with `a.b=c` overrides applied.

    Raises FileNotFoundError for no such recipe, ValueError of one line naming the field for a wrong one.
    """
    fields = _read(source, seen=())
    for override in overrides:
        _set(fields, override)
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"recipe {source}: {first_complaint(error)}") from None


def _read(source: str | Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a recipe with those of its bases underneath."""
    if str(source) in seen:
        raise ValueError(f"recipe {source} is its own base: {' -> '.join((*seen, str(source)))}")
    text, folder = _text(source)
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"recipe {source} must be a mapping of fields, got {type(fields).__name__}")
    base = fields.pop("base", None)
    if base is None:
        return fields
    beside = folder / base if folder and (folder / base).is_file() else base
    return _merged(_read(beside, (*seen, str(source))), fields)


def _text(source: str | Path) -> tuple[str, Path | None]:
    path = Path(source)
    if path.is_file():
        return path.read_text("utf-8"), path.parent
    if str(source) in recipe_names():
        return (resources.files("stepwell") / "recipes" / f"{source}.yaml").read_text("utf-8"), None
    raise FileNotFoundError(
        f"no recipe {str(source)!r}: not a file, and not one of {', '.join(recipe_names())}"
    )


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _set(fields: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"an override reads a.b=c, got {override!r}")
    *parents, last = path.split(".")
    place: Any = fields
    for depth, key in enumerate(parents):
        place = _step(place, key, ".".join(parents[: depth + 1]), create=True)
    value = yaml.safe_load(text)
    if isinstance(place, list):
        place[_index(place, last, path)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ValueError(f"--set {path}: {'.'.join(parents)} is a value, it has no fields")


def _step(place: Any, key: str, path: str, *, create: bool) -> Any:
    if isinstance(place, list):
        return place[_index(place, key, path)]
    if isinstance(place, dict):
        return place.setdefault(key, {}) if create else place[key]
    raise ValueError(f"--set {path}: there is nothing to go into")


def _index(place: list[Any], key: str, path: str) -> int:
    """A place in a list: its number, or the `name` or `kind` of the entry."""
    for number, entry in enumerate(place):
        if key == str(number) or (isinstance(entry, dict) and key in (entry.get("name"), entry.get("kind"))):
            return number
    raise ValueError(f"--set {path}: no entry {key!r} in a list of {len(place)}")
