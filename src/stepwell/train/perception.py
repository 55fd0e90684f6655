"""What the tasks `detect`, `segment` and `classify` share: their models' fields, images of unequal sizes in
one batch, and folders that pipelines take.

Letters: B batch, (H, W) the padded batch in pixels.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import PreTrainedModel

from stepwell.data.mixture import Mixture
from stepwell.data.sample import Source
from stepwell.folders import ModelError, check_hub_name, download, find_folder, model_type
from stepwell.images.open import ImageSource, open_image
from stepwell.models.parts import load_parts
from stepwell.train.groups import part_of
from stepwell.train.recipe import Recipe, Stage
from stepwell.train.strict import Strict

__all__ = ["PerceptionModel", "PerceptionRecipe", "PerceptionStage", "PerceptionTask", "Training"]

MODEL = "model."  # the prefix of the model in the module that is trained


class PerceptionModel(Strict):
    """A backbone and a head with random weights, or a whole model that was trained before.

    start: a folder or owner/name on the hub, of which a commit, branch or tag is the `revision`; where its
    classes are others than the data's, the layers that tell them start anew. backbone: `DenseSettings` of
    ours, or the JSON of a backbone of transformers with its model_type. parts: where parts start
    (models/parts.py); revisions: of those that start from the hub. classes: by default those of the data.
    """

    start: str | None = None
    revision: str | None = None
    backbone: dict[str, Any] | None = None
    head: dict[str, Any] = {}
    images: dict[str, Any] = {}
    parts: dict[str, str] = {}
    revisions: dict[str, str] = {}
    classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> PerceptionModel:
        ignored = sorted(self.model_fields_set - {"start", "revision", "classes", "images"})
        if self.start is not None and ignored:
            raise ValueError(f"start is a whole model; {ignored[0]} beside it would be ignored")
        if self.start is None and self.revision is not None:
            raise ValueError("revision is of a start on the hub, and there is no start")
        if self.start is None and self.backbone is None:
            raise ValueError("give either start or backbone")
        return self


class PerceptionStage(Stage):
    """augment: what happens by chance to images that are learnt from (train/augment.py); images of the
    validation data are prepared as the model's image processor prepares them.
    """

    train: tuple[str, ...] = ("vision", "head")
    losses: Mapping[str, float] = {}

    @model_validator(mode="after")
    def _no_geometry(self) -> PerceptionStage:
        if self.vision:
            raise ValueError("vision: sizes of images are model.images and augment")
        return self


class PerceptionRecipe(Recipe):
    model: PerceptionModel
    stages: Annotated[tuple[PerceptionStage, ...], Field(min_length=1)]


class Training(nn.Module):
    """A model whose forward gives its losses by name."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        return losses_by_name(self.model(**batch).losses)


class PerceptionTask(ABC):
    """A stage that trains a model of one kind. Subclasses say which, and what a sample is."""

    recipe: ClassVar[type[Recipe]]
    auto: ClassVar[type[PreTrainedModel]]

    def __init__(self, recipe: Any, stage: Any) -> None:
        self.settings, self.stage = recipe, stage
        self.learning: tuple[str, ...] = stage.train
        self.augment = stage.augment.build()
        first = recipe.stages[0].data[0].open()
        self.classes: tuple[str, ...] = recipe.model.classes or tuple(first.classes)
        self.processor = self.untrained("meta").image_processor()

    @abstractmethod
    def untrained(self, device: str) -> Any:
        """The model with random weights."""

    @abstractmethod
    def sample(self, sample: Any) -> dict[str, Any]:
        """-> `image`, an uint8 image (3, H, W), and what is known of it, as tv_tensors."""

    @abstractmethod
    def prepared(self, sample: dict[str, Any]) -> dict[str, Any]:
        """What of a sample belongs into a batch; `image` is normalised."""

    def build(self) -> nn.Module:
        settings = self.settings.model
        if settings.start is not None:
            model = self._started(settings.start, settings.revision)
        else:
            model = self.untrained("cpu")
            if self.stage == self.settings.stages[0]:
                for part, report in load_parts(model, settings.parts, revisions=settings.revisions).items():
                    _tell(f"{part} from {report.text()}")
        return Training(model)

    def _started(self, start: str, revision: str | None) -> Any:
        folder = find_folder(start)
        if folder is None:
            check_hub_name(start)
            folder = download(start, revision=revision)
        elif revision is not None:
            raise ModelError(f"model.revision {revision}: {start} is on this machine, as one version")
        kind, expected = model_type(folder), self.auto.config_class.model_type
        if kind != expected:
            raise ModelError(f"model.start: {folder} holds a {kind!r} model, and this task trains {expected!r}")
        theirs = self.auto.config_class.from_pretrained(folder)
        names = tuple(theirs.id2label[i] for i in range(theirs.num_labels))
        if names != self.classes:
            _tell(f"{start} knows {len(names)} classes and the data {len(self.classes)}: their layers start anew")
        return self.auto.from_pretrained(
            folder, dtype=torch.float32, **labels(self.classes), ignore_mismatched_sizes=True
        )

    def parts(self, module: nn.Module) -> Mapping[str, str]:
        assert isinstance(module, Training)
        return {part: MODEL + prefix for part, prefix in module.model.parts.items()}

    def source(self, data: Any) -> Source:
        source: Source = data.open()
        return source

    def order(self, samples: Mixture, *, batches: int, seed: int) -> Sequence[int] | None:
        return None

    def prepare(self, sample: Any) -> dict[str, Any]:
        return self.prepared(self.augment(self.sample(sample)))

    def look(self, sample: Any) -> dict[str, Any]:
        return self.prepared(self.fixed(self.sample(sample)))

    def save(self, weights: Path, folder: Path) -> None:
        model = self.untrained("cpu")
        tensors = {name.removeprefix(MODEL): tensor for name, tensor in load_file(weights).items()}
        model.load_state_dict(tensors)
        model.to(getattr(torch, self.settings.save_dtype)).save_pretrained(folder)


def opened(source: ImageSource) -> tv_tensors.Image:
    """An upright image, (3, H, W) uint8."""
    return tv_tensors.Image(torch.from_numpy(np.array(open_image(source))).permute(2, 0, 1))


def labels(classes: Sequence[str]) -> dict[str, Any]:
    """Keywords of a configuration."""
    names = dict(enumerate(classes))
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def _tell(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
