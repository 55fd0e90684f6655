"""What the tasks `detect`, `segment` and `classify` share: the fields of their recipes, models that start
anew or from trained ones, and scores on validation data.

Random numbers of a sample are torch's, and hang on its place in the run alone (data/mixture.py), so that a
run that resumes sees what it would have seen.
"""

from __future__ import annotations

import copy
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from transformers import PreTrainedConfig

from stepwell.data.classes import class_names
from stepwell.data.fields import Rate
from stepwell.data.mixture import Mixture
from stepwell.data.sample import Source
from stepwell.data.summary import summary
from stepwell.evaluate.perception import score_task
from stepwell.evaluate.perception_data import data_classes
from stepwell.folders import ModelError, check_hub_name, download, find_folder, model_type
from stepwell.images.open import ImageSource, open_image
from stepwell.models.parts import load_parts
from stepwell.train.examination import Examination
from stepwell.train.groups import part_of
from stepwell.train.perception_model import PerceptionModel
from stepwell.train.processes import tell
from stepwell.train.recipe import Recipe, Stage

__all__ = [
    "PerceptionRecipe",
    "PerceptionStage",
    "PerceptionTask",
    "Training",
    "normalised",
    "places_of",
]

SCORES = "scores"
"""The folder of a run's scores."""
PICTURES = 10
"""Of the best and of the worst that are drawn there."""
_MODEL = "model."  # the prefix of the model in the module that is trained


class PerceptionStage(Stage):
    """train: parts that learn, by default all. freeze: parts of those that do not. losses: weights of losses
    by their names, 1 where nothing is said.
    """

    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    losses: Mapping[str, Rate] = {}

    @model_validator(mode="after")
    def _without_geometry(self) -> PerceptionStage:
        if self.vision:
            raise ValueError("vision is of assistants; sizes of images are model.images and augment")
        return self


class PerceptionRecipe(Recipe):
    """bf16: of the backbone; heads and losses stay in single precision."""

    model: PerceptionModel
    stages: Annotated[tuple[PerceptionStage, ...], Field(min_length=1)]
    bf16: bool = False
    log_steps: Annotated[int, Field(gt=0)] = 10


class Training(nn.Module):
    """A model whose forward gives its losses by name."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """What a task's `collate` makes -> means by the names of its `losses`."""
        raise NotImplementedError

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As models of transformers do; those before its version 6 by the old name."""
        enable = getattr(
            self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable
        )
        enable(*args, **kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable


class PerceptionTask(ABC):
    """A stage that trains a model of one kind. Subclasses say which, and what a sample and a batch are."""

    recipe: ClassVar[type[Recipe]]
    model_class: ClassVar[Any]
    training: ClassVar[type[Training]]
    published: ClassVar[str]
    """The task of the published models that may be trained."""
    scores: ClassVar[Sequence[str]] = ()
    fewest: ClassVar[int] = 2
    """Classes that there must be."""

    def __init__(self, recipe: Any, stage: Any) -> None:
        self.settings, self.stage = recipe, stage
        self.limits = recipe.image_limits.build()
        if stage is recipe.stages[0]:
            _opened.cache_clear()  # files may be others than in an earlier training of this process
        self.classes = recipe.model.classes or self._classes_of(recipe.stages[0].data[0])
        if len(self.classes) < self.fewest:
            raise ValueError(
                f"a model of the one class {self.classes[0]!r} would have nothing to tell it from; name two "
                "or more"
            )
        self.config = self.config_of(recipe.model, self.classes)
        with torch.device("meta"):
            model = self.model_class(self.config)
        self.processor: Any = model.image_processor()
        self._parts = {part: _MODEL + prefix for part, prefix in model.parts.items()}
        names = {part_of(_MODEL + name, self._parts) for name, _ in model.named_parameters()}
        self.learning: Sequence[str] = stage.train or sorted({name.split(".")[0] for name in names})
        self.frozen: Sequence[str] = stage.freeze
        self.losses = self._weights()
        self.augment = self.augmentation()

    def _classes_of(self, data: Any) -> tuple[str, ...]:
        """Names of the first data's classes; in the order of the model that the training starts from where
        that has the same, so that its layers that tell classes stay as they are.
        """
        names = tuple(data_classes(self._source(data)))
        if self.settings.model.start is None:
            return names
        known = _known(self.model_class.config_class.from_pretrained(self._start(self.settings.model)))
        return known if sorted(known) == sorted(names) else names

    @classmethod
    def configuration(cls, recipe: Any) -> Any:
        return cls.config_of(recipe.model, recipe.model.classes or ("object",))

    @classmethod
    def config_of(cls, model: PerceptionModel, classes: Sequence[str]) -> PreTrainedConfig:
        """Of the model that is trained. Raises ValueError naming a wrong field."""
        names = _labels(classes)
        if model.start is None:
            return cls.new_config(model.settings(cls.published), names)
        config: Any = cls.model_class.config_class.from_pretrained(cls._start(model), **names)
        if model.images and not hasattr(config, "images"):
            raise ValueError("model.images: this model's branches say how large its images are")
        if model.images:
            config.images = {**config.images, **model.images}
        return config

    @classmethod
    @abstractmethod
    def new_config(cls, settings: dict[str, Any], names: dict[str, Any]) -> PreTrainedConfig:
        """settings: JSON of backbone, head and images."""

    @abstractmethod
    def loss_names(self) -> Sequence[str]:
        """Of the losses that the module gives."""

    @abstractmethod
    def augmentation(self) -> Any:
        """What happens to samples by chance."""

    @abstractmethod
    def sample(self, sample: Any, classes: Sequence[int]) -> dict[str, Any]:
        """-> `image`, (3, H, W) uint8, and what is known of it, as tv_tensors. classes: the label of each of
        its source's.
        """

    @abstractmethod
    def examined(self, model: Any, source: Any) -> Examination:
        """A model on data."""

    def build(self) -> nn.Module:
        settings = self.settings.model
        if settings.start is None:
            model = self.model_class(self.config)
            if self.stage == self.settings.stages[0]:
                for part, report in load_parts(model, settings.sources, revisions=settings.revisions).items():
                    tell(f"{part} from {report.text()}")
        else:
            model = self._started(settings)
        return self.training(model)

    def outline(self) -> nn.Module:
        with torch.device("meta"):
            return self.training(self.model_class(self.config))

    @classmethod
    def _start(cls, settings: PerceptionModel) -> Path:
        """The folder of a whole model. Raises ModelError for one of another kind."""
        assert settings.start is not None
        folder = find_folder(settings.start)
        if folder is None:
            check_hub_name(settings.start)
            folder = download(settings.start, revision=settings.revision)
        elif settings.revision is not None:
            raise ModelError(f"model.revision is of a name on the hub, and {folder} is a folder")
        kind, expected = model_type(folder), cls.model_class.config_class.model_type
        if kind != expected:
            raise ModelError(
                f"model.start: {folder} holds a {kind!r} model, and this task trains {expected!r}"
            )
        return folder

    def _started(self, settings: PerceptionModel) -> Any:
        folder = self._start(settings)
        theirs = self.model_class.config_class.from_pretrained(folder)
        known = _known(theirs)
        model: Any = self.model_class.from_pretrained(
            folder, config=self.config, dtype=torch.float32, ignore_mismatched_sizes=True
        )
        if known == self.classes:
            return model
        if self.stage == self.settings.stages[0]:
            tell(
                f"{settings.start} knows {len(known)} classes, which are not the {len(self.classes)} of the "
                "data: the layers that tell classes start anew"
            )
        fresh = self.model_class(self.config).state_dict()
        model.load_state_dict({name: fresh[name] for name in self._of_classes()}, strict=False)
        return model

    def _of_classes(self) -> list[str]:
        """Names of the tensors that one more class makes larger."""
        shapes = []
        for count in (1, 2):
            config = copy.deepcopy(self.config)
            config.num_labels = count
            with torch.device("meta"):
                tensors = self.model_class(config).state_dict()
            shapes.append({name: tensor.shape for name, tensor in tensors.items()})
        return [name for name, shape in shapes[0].items() if shape != shapes[1][name]]

    def record(self) -> Mapping[str, Any]:
        return {"classes": list(self.classes)}

    def introduction(self) -> str:
        """What the stage's data hold."""
        texts = []
        for role in ("data", "validation"):
            for data in getattr(self.stage, role):
                texts.append(f"{role} of stage {self.stage.name}: {summary(self._source(data)).text()}")
        return "\n".join(texts)

    def parts(self, module: nn.Module) -> Mapping[str, str]:
        return self._parts

    def source(self, data: Any) -> Source:
        source = self._source(data)
        return _Labelled(source, places_of(class_names(source.classes), self.classes))

    def _source(self, data: Any) -> Any:
        source = _opened(data)
        source.limits = self.limits
        return source

    def opened(self, image: ImageSource) -> tv_tensors.Image:
        """Upright, (3, H, W) uint8."""
        pixels = np.array(open_image(image, limits=self.limits))
        return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))

    def order(self, samples: Mixture, *, batches: int, seed: int) -> Sequence[int] | None:
        return None

    def prepare(self, sample: Any) -> dict[str, Any]:
        return self.ready(self.augment(self.sample(*sample)))

    def ready(self, sample: dict[str, Any]) -> dict[str, Any]:
        """What of an augmented sample belongs into a batch."""
        return {**sample, "image": normalised(sample["image"], self.processor)}

    def examination(self, module: nn.Module) -> Examination | None:
        if not self.stage.validation:
            return None
        assert isinstance(module, Training)
        return self.examined(module.model, self._source(self.stage.validation[0]))

    def report(self, model: Path, folder: Path) -> None:
        """Scores of the model in a folder on the last stage's validation data, with figures of them."""
        if self.stage.validation:
            data = self.stage.validation[0]
            device = "cuda" if torch.cuda.is_available() else "cpu"
            network = self.model_class.from_pretrained(model).to(device).eval()
            task = self.examined(network, self._source(data)).task
            shutil.rmtree(folder / SCORES, ignore_errors=True)  # of an earlier training
            score_task(
                task,
                folder / SCORES,
                data=_place(data),
                limits=self.limits,
                pictures=PICTURES,
                name=str(model),
            )

    def save(self, weights: Path, folder: Path) -> None:
        model = self.model_class(self.config)
        tensors = {name.removeprefix(_MODEL): tensor for name, tensor in load_file(weights).items()}
        model.load_state_dict(tensors)
        model.to(getattr(torch, self.settings.save_dtype)).save_pretrained(folder)
        # Stored small, computed in full: CPUs without instructions for half precision are far slower in it.
        model.config.dtype = torch.float32
        model.config.save_pretrained(folder)

    def _weights(self) -> dict[str, float]:
        names, told = self.loss_names(), dict(self.stage.losses)
        if unknown := sorted(told.keys() - set(names)):
            raise ValueError(
                f"stages.{self.stage.name}.losses: there is no {unknown[0]!r}; there are {', '.join(names)}"
            )
        return {name: told.get(name, 1.0) for name in names}


class _Labelled:
    """A source whose samples come with the labels of its classes."""

    def __init__(self, source: Any, labels: Sequence[int]) -> None:
        self.source, self.labels = source, labels
        self.faults: list[tuple[str, str]] = getattr(source, "faults", [])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, Sequence[int]]:
        return self.source[index], self.labels

    def where(self, index: int) -> str:
        where: str = self.source.where(index)
        return where


def places_of(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The place of every name among the classes. Raises ValueError for one that is not there, and for one
    that is there twice: of two classes of a name one would be learned as the other.
    """
    for given in (names, classes):
        if twice := [name for name, count in Counter(given).items() if count > 1]:
            raise ValueError(f"two classes are called {twice[0]!r}, and classes are told by their names")
    if unknown := [name for name in names if name not in classes]:
        raise ValueError(
            f"the data have a class {unknown[0]!r}, which is none of the model's: {', '.join(classes)}"
        )
    return [list(classes).index(name) for name in names]


@lru_cache(maxsize=16)
def _opened(data: Any) -> Any:
    """The source of an entry of the data: the files of large data sets are read once."""
    return data.open()


def normalised(image: Tensor, processor: Any) -> Tensor:
    """(3, H, W) uint8 -> float32, as an image processor has it."""
    values = F.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True)
    return cast(Tensor, F.normalize(values, processor.image_mean, processor.image_std))


def _known(config: Any) -> tuple[str, ...]:
    """The names of a model's classes, in the order of its labels."""
    return tuple(config.id2label[i] for i in range(config.num_labels))


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    """Keywords of a configuration."""
    names = dict(enumerate(classes))
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def _place(data: Any) -> Path:
    """Where an entry of the data lies."""
    named = (getattr(data, name, None) for name in ("annotations", "list", "labels", "path"))
    return next(place for place in named if isinstance(place, Path))
