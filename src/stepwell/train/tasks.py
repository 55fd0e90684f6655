"""TASKS: what a recipe can train, by the name of its `task`. A new task adds its line here.

The loop (train/run.py) knows a task by this protocol alone: how its module is built, its batches made, what
its losses are means over, and how its result is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stepwell.data.mixture import Mixture
    from stepwell.data.sample import Source
    from stepwell.train.examination import Examination
    from stepwell.train.recipe import Recipe

__all__ = ["TASKS", "JudgedByLosses", "Task", "find_task", "sources_of", "where"]

TASKS = {
    "chat": "stepwell.train.chat:ChatTask",
    "classify": "stepwell.train.classify:ClassifyTask",
    "detect": "stepwell.train.detect:DetectTask",
    "reader": "stepwell.reader.task:ReaderTask",
    "segment": "stepwell.train.segment:SegmentTask",
    "upsampler": "stepwell.train.upsampler:UpsamplerTask",
}
"""Modules and classes, imported when a recipe asks for them."""


class Task(Protocol):
    """One stage of a recipe, as its task sees it."""

    recipe: ClassVar[type[Recipe]]
    """The fields of the task's recipes; a field that the task does not use is not among them."""

    stage: Any
    """Its fields."""

    learning: Sequence[str]
    """Parts that learn in this stage."""

    frozen: Sequence[str]
    """Parts of those that do not."""

    losses: Mapping[str, float]
    """Weights of the losses that the module gives in this stage."""

    scores: Sequence[str]
    """What the module gives beside the stage's losses while it is evaluated, by name, each a mean."""

    def __init__(self, recipe: Any, stage: Any) -> None: ...

    @classmethod
    def configuration(cls, recipe: Any) -> Any:
        """The configuration of the model that the recipe trains, for `stepwell flops`."""
        ...

    def build(self) -> nn.Module:
        """What is trained, with its starting weights: a module whose forward takes a batch and gives the
        stage's losses by name, each a mean. The next stage begins with this one's state dict.
        """
        ...

    def outline(self) -> nn.Module:
        """What `build` gives, on the meta device: without weights."""
        ...

    def record(self) -> Mapping[str, Any]:
        """What of the stage's data its weights hang on, beside the recipe and how many samples there are: as
        JSON.
        """
        ...

    def introduction(self) -> str:
        """What a reader of the log should know of the stage before it begins; "" for nothing."""
        ...

    def parts(self, module: nn.Module) -> Mapping[str, str]:
        """Names of parts, as a stage's `train` writes them -> prefixes of the module's parameters."""
        ...

    def source(self, data: Any) -> Source:
        """The samples of one entry of a stage's `data`. Raises FileNotFoundError for a missing file."""
        ...

    def order(self, samples: Mixture, *, batches: int, seed: int) -> Sequence[int] | None:
        """The indices of all samples of the stage in the order in which they are drawn, the same for the same
        seed; None is that of the mixture, by chance. batches: of a step of the optimiser, over all processes.
        """
        ...

    def prepare(self, sample: Any) -> Any:
        """A sample of a source, decoded and rendered. Raises for one that cannot be used, which is then left
        out or refused, as the recipe says: all that may go wrong with a sample goes wrong here.
        """
        ...

    def collate(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Prepared samples -> a batch: tensors, and lists and dicts of them."""
        ...

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor | int]:
        """How many items each of the stage's losses and scores is the mean of: the batches of a step, in all
        processes, are weighed as if they were one.
        """
        ...

    def examination(self, module: nn.Module) -> Examination | None:
        """What a module is judged by on the stage's validation data; None: its losses and `scores`."""
        ...

    def report(self, model: Path, folder: Path) -> None:
        """Writes what is to be told of the finished model into the run's folder."""
        ...

    def save(self, weights: Path, folder: Path) -> None:
        """The model of a stage's weights, without that stage's geometry, as a folder that `stepwell.load`
        takes.
        """
        ...


class JudgedByLosses:
    """What a task is that judges a model by its losses, and has nothing to tell of it."""

    frozen: Sequence[str] = ()

    def record(self) -> Mapping[str, Any]:
        return {}

    def introduction(self) -> str:
        return ""

    def examination(self, module: nn.Module) -> None:
        return None

    def report(self, model: Path, folder: Path) -> None:
        return None


def where(data: Any) -> str:
    """An entry of a stage's data, as people know it: by its file or folder, or by its kind."""
    return str(next((value for _, value in data if isinstance(value, Path)), data.kind))


def sources_of(task: Task, field: str) -> list[Source]:
    """Of the entries of a stage's `data` or `validation`. Raises ValueError for one that holds nothing."""
    sources = []
    for data in getattr(task.stage, field):
        sources.append(task.source(data))
        if not len(sources[-1]):
            raise ValueError(f"stages.{task.stage.name}.{field}: {where(data)} holds no sample")
    return sources


def find_task(name: str) -> type[Task]:
    """Raises ValueError naming the tasks that there are."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose from {', '.join(TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    task: type[Task] = getattr(import_module(module), attribute)
    return task
