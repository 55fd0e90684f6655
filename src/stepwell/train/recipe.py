"""Recipes: what to build, on what data, in which stages, as one YAML file that refuses what it does not know.

A recipe names its `task` (train/tasks.py), whose own fields it may use; the fields here are those of every
task. It may name its `base` (a shipped recipe or a file beside it) and give only the fields that differ:
mappings are merged, a mapping over a list changes the entries that its keys name, everything else is
replaced. Overrides are `a.b=c`, c in YAML. An entry of a list is named by its number, its `name` or its
`kind`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import copy
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from stepwell.data.fields import Place, Positive, Rate, Share, Strict
from stepwell.data.files import read_text
from stepwell.folders import one_line
from stepwell.images.limits import ImageLimits
from stepwell.models.vision import first_complaint
from stepwell.train.groups import Decayed
from stepwell.train.layer_decay import LayerDecay
from stepwell.train.shipped import recipe_names
from stepwell.train.tasks import find_task

__all__ = [
    "Average",
    "FileName",
    "Limits",
    "Optimiser",
    "Place",
    "Positive",
    "Rate",
    "Recipe",
    "Schedule",
    "Share",
    "Stage",
    "Strict",
    "load_recipe",
    "merged",
]

FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # of one folder: what it is in stays there


class Optimiser(Strict):
    """`name` is one of TrainingArguments' `optim`, or "adam", "nadam" or "lamb"; part_lrs: rates of parts,
    the longest matching name counts; layer_decay: slower rates of layers nearer to the image. decayed: what
    the weight decay is of (train/groups.py). max_grad_norm: 0 clips nothing; clip_steps: how many steps of a
    stage are clipped, from its first on, None is all.
    """

    name: str = "adamw_torch"
    lr: Rate = 2e-3
    part_lrs: dict[str, Rate] = {}
    betas: tuple[Share, Share] = (0.9, 0.98)
    layer_decay: LayerDecay | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    decayed: Decayed = "matrices"
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    clip_steps: Positive | None = None


class Schedule(Strict):
    """`name` is one of TrainingArguments' `lr_scheduler_type`, or of train/schedules.py: step, line,
    epoch_cosine; `arguments` are those of the schedule. warmup_steps: None is 50, or a tenth of a stage of
    less than 500 steps.
    """

    name: str = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    arguments: dict[str, Any] = {}

    def warmup_of(self, steps: int) -> int:
        """Of a stage of so many steps."""
        return min(50, steps // 10) if self.warmup_steps is None else self.warmup_steps


class Average(Strict):
    """decay: of what was averaged before, at a step. ramp: it is (1 + n) / (10 + n) at step n where that is
    less, so that short trainings forget their start. use: whether the average is what is scored and kept;
    else it lies beside it.
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    ramp: bool = True
    use: bool = True


class Stage(Strict):
    """A stretch of training with one set of data, learning parts, losses and rates.

    steps or epochs: how long; an epoch is as many samples as the sources hold together. validation: sources
    like those of `data`, all of whose samples are looked at every `validate_steps` and at the end; None:
    after every epoch (or 100 steps, if those are more) where the stage counts epochs, else every 500 steps.
    keep: the weights that the stage ends with, by default the best on the validation data where there is any.
    vision: changes to the model's geometry in this stage, such as {sizes: [160, 320]} or {max_slices: 1}.
    patience: validations in a row that may be no better than the best before the stage ends; None: any.
    average: of the weights over the steps (train/averaging.py). batch_statistics: norms over batches follow
    those of the stage; false: they keep the statistics that they start with; None: so where the model has a
    start.
    even: every batch of a process has its share of each weighed source, and of neighbours together, rounded
    up or down; else who is drawn is chance.
    losses: weights of the task's losses; one that is not named is not computed. trainer: further fields of
    transformers' TrainingArguments.
    """

    name: FileName
    steps: Positive | None = None
    epochs: Rate | None = None
    batch: Positive = 3
    accumulate: Positive = 1
    even: bool = False
    train: tuple[str, ...]
    vision: dict[str, Any] = {}
    losses: Mapping[Any, Rate]
    data: Any
    validation: Any = ()
    validate_steps: Positive | None = None
    keep: Literal["best", "last"] | None = None
    patience: Positive | None = None
    average: Average | None = None
    batch_statistics: bool | None = None
    optimiser: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    trainer: dict[str, Any] = {}

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        for field in ("keep: best", "patience"):
            if (self.keep == "best" if "best" in field else self.patience) and not self.validation:
                raise ValueError(f"{field} needs validation data to tell")
        if self.even and (self.batch == 1 or any(data.weight is None for data in self.data)):
            raise ValueError(
                "even is of batches of weighed data: give a batch above 1, and every entry a weight"
            )
        return self


class Limits(Strict):
    """Of the files of images, as `stepwell.ImageLimits` has them; None: as there."""

    max_bytes: Rate | None = None
    max_pixels: Rate | None = None
    max_side: Rate | None = None
    max_aspect: Rate | None = None
    max_seconds: Rate | None = None

    def build(self) -> ImageLimits:
        """Raises ValueError as ImageLimits does."""
        return ImageLimits(**self.model_dump(exclude_none=True))


class Recipe(Strict):
    task: str
    name: FileName
    model: Any
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    output: Place = Path("runs")
    seed: int = 42
    bf16: bool = True
    save_steps: Positive = 500
    log_steps: Positive = 50
    workers: Annotated[int, Field(ge=0)] = 1
    bad_samples: Literal["skip", "refuse"] = "skip"  # what becomes of one that cannot be read or learned from
    bad_samples_limit: Annotated[float, Field(ge=0, le=100)] | None = None  # percent of a source; None: any
    image_limits: Limits = Limits()
    resume: bool = True  # finished stages and the last checkpoint of an unfinished one are taken up again
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float16"

    @model_validator(mode="after")
    def _limit_has_its_rule(self) -> Self:
        if self.bad_samples == "refuse" and self.bad_samples_limit is not None:
            raise ValueError("bad_samples_limit is of bad_samples: skip; refuse takes none at all")
        self.image_limits.build()
        return self


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by shipped name or path, with `a.b=c` overrides applied.

    Raises FileNotFoundError for no such recipe, ValueError of one line naming the field for a wrong one.
    """
    fields = _read(source, seen=())
    for override in overrides:
        _set(fields, override)
    task = find_task(fields.get("task", "chat"))
    try:
        return task.recipe.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"recipe {source}: {first_complaint(error)}") from None


def _read(source: str | Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a recipe with those of its bases underneath."""
    if str(source) in seen:
        raise ValueError(f"recipe {source} is its own base: {' -> '.join((*seen, str(source)))}")
    text, folder = _text(source)
    try:
        fields = _yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {source} is not YAML: {one_line(error)}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"recipe {source} must be a mapping of fields, got {type(fields).__name__}")
    base = fields.pop("base", None)
    if base is None:
        return fields
    beside = folder / base if folder and (folder / base).is_file() else base
    whole: dict[str, Any] = merged(_read(beside, (*seen, str(source))), fields, f"recipe {source}")
    return whole


def _text(source: str | Path) -> tuple[str, Path | None]:
    path = Path(source)
    if path.is_file():
        return read_text(path), path.parent
    if str(source) in recipe_names():
        return (resources.files("stepwell") / "recipes" / f"{source}.yaml").read_text("utf-8"), None
    raise FileNotFoundError(
        f"no recipe {str(source)!r}: not a file, and not one of {', '.join(recipe_names())}"
    )


class _Loader(yaml.SafeLoader):
    """YAML whose numbers may be written 1e-6, as YAML 1.2 and people do; PyYAML reads that as a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def merged(base: Any, changes: dict[str, Any], where: str) -> Any:
    """A mapping, or a list some of whose entries are named, with what is changed in it."""
    whole: Any = copy(base)
    for key, value in changes.items():
        place = _index(whole, str(key), where)
        old = whole.get(place) if isinstance(whole, dict) else whole[place]
        is_change = isinstance(old, dict | list) and isinstance(value, dict)
        whole[place] = merged(old, value, where) if is_change else value
    return whole


def _set(fields: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"an override reads a.b=c, got {override!r}")
    *parents, last = path.split(".")
    place: Any = fields
    for key in parents:
        if isinstance(place, dict):
            place.setdefault(key, {})
        place = place[_index(place, key, f"--set {path}")]
    try:
        place[_index(place, last, f"--set {path}")] = _yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {path}: {text!r} is not YAML: {one_line(error)}") from None


def _index(place: Any, key: str, where: str) -> Any:
    """The key of a mapping; of a list, an entry's number, told by that, by its `name` or its `kind`."""
    if isinstance(place, dict):
        return key
    if not isinstance(place, list):
        raise ValueError(f"{where}: there is no {key!r} in the value {place!r}")
    for number, entry in enumerate(place):
        if key == str(number) or (isinstance(entry, dict) and key in (entry.get("name"), entry.get("kind"))):
            return number
    raise ValueError(f"{where}: no entry {key!r} in a list of {len(place)}")
