"""Task `classify`: a class for every image, from folders of images.

DeiT, arXiv 2012.12877, and DeiT III, arXiv 2204.07118, as PIIP (arXiv 2501.07783, section IV-C) uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torchvision.transforms import v2

from stepwell.data.entries import ClassifyData
from stepwell.data.fields import Share
from stepwell.data.image_folder import LabelledImage
from stepwell.evaluate.tasks import ClassificationTask
from stepwell.models.dense import ClassifierSettings
from stepwell.models.perception import PyramidClassifierConfig, PyramidForImageClassification
from stepwell.models.vision import validated
from stepwell.train.augment import ClassifyAugment, DeiTAugment
from stepwell.train.examination import Examination
from stepwell.train.perception import (
    PerceptionRecipe,
    PerceptionStage,
    PerceptionTask,
    Training,
    normalised,
)

__all__ = ["ClassifierTraining", "ClassifyRecipe", "ClassifyStage", "ClassifyTask"]

Loss = Literal["cross_entropy", "binary"]
_SEED = "seed"  # of what a batch does by chance
_FAR = 2**62


class ClassifyStage(PerceptionStage):
    """mixup, cutmix: alpha of the share in which two images of a batch are mixed, 0 for never; with both, one
    of them by even chance. label_smoothing: of the targets. loss: "binary" asks for every class whether any
    of an image is of it (DeiT III). repeats: how often each of the `batch` images comes in a batch, changed
    otherwise each time (arXiv 1901.09335).
    """

    data: Annotated[tuple[ClassifyData, ...], Field(min_length=1)]
    validation: Annotated[tuple[ClassifyData, ...], Field(max_length=1)] = ()
    augment: ClassifyAugment = DeiTAugment()
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Share = 0.0
    loss: Loss = "cross_entropy"
    repeats: Annotated[int, Field(gt=0)] = 1
    best_by: Literal["top1", "top5"] = "top1"

    @model_validator(mode="after")
    def _smooths_what_is_learnt(self) -> Self:
        if self.loss == "binary" and self.label_smoothing:
            raise ValueError("label_smoothing is of the loss cross_entropy; with loss: binary set it to 0")
        return self


class ClassifyRecipe(PerceptionRecipe):
    task: Literal["classify"] = "classify"
    stages: Annotated[tuple[ClassifyStage, ...], Field(min_length=1)]


class ClassifierTraining(Training):
    """Against the shares in which classes are in an image."""

    loss: Loss = "cross_entropy"
    label_smoothing = 0.0

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """`pixel_values`; `shares` (B, K), which add up to 1."""
        logits, shares = self.model(pixel_values=batch["pixel_values"]).logits.float(), batch["shares"]
        if self.loss == "binary":
            return {"classes": F.binary_cross_entropy_with_logits(logits, (shares > 0).to(logits.dtype))}
        return {"classes": F.cross_entropy(logits, shares, label_smoothing=self.label_smoothing)}


class ClassifyTask(PerceptionTask):
    recipe = ClassifyRecipe
    model_class = PyramidForImageClassification
    training = ClassifierTraining
    published = "classification"

    def __init__(self, recipe: Any, stage: Any) -> None:
        super().__init__(recipe, stage)
        if stage.validation and stage.best_by == "top5" and len(self.classes) < 5:
            raise ValueError(
                f"stages.{stage.name}.best_by: top5 needs five classes or more, here are {len(self.classes)}"
            )

    @classmethod
    def new_config(cls, settings: dict[str, Any], names: dict[str, Any]) -> PyramidClassifierConfig:
        for field in ("head", "images"):
            if settings[field]:
                raise ValueError(f"model.{field}: a classifier's is said in model.backbone")
        pyramid = validated(ClassifierSettings, settings["backbone"], "model.backbone")
        return PyramidClassifierConfig(pyramid, **names)

    def build(self) -> Any:
        module: Any = super().build()
        module.loss, module.label_smoothing = self.stage.loss, self.stage.label_smoothing
        return module

    def loss_names(self) -> Sequence[str]:
        return ("classes",)

    def augmentation(self) -> Any:
        self.mix = _mix(self.stage.mixup, self.stage.cutmix, len(self.classes))
        return self.stage.augment.build(self.config.settings.image_side)

    def sample(self, sample: LabelledImage, classes: Sequence[int]) -> dict[str, Any]:
        return {"image": self.opened(sample.image), "label": classes[sample.label]}

    def prepare(self, sample: Any) -> dict[str, Any]:
        """Its `label`, its `images`, each by other chances, and a seed for what its batch does by chance."""
        image, label = (self.sample(*sample)[name] for name in ("image", "label"))
        images = [normalised(self.augment(image), self.processor) for _ in range(self.stage.repeats)]
        return {"images": images, "label": label, _SEED: int(torch.randint(_FAR, ()))}

    def collate(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Images of one place stand far from one another: neighbours are mixed."""
        copies = range(self.stage.repeats)
        pixels = torch.stack([sample["images"][k] for k in copies for sample in samples])
        labels = torch.tensor([sample["label"] for _ in copies for sample in samples])
        if self.mix is None:
            return {"pixel_values": pixels, "shares": F.one_hot(labels, len(self.classes)).float()}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(samples[0][_SEED])
            mixed, shares = self.mix(pixels, labels)
        return {"pixel_values": mixed, "shares": shares}

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor | int]:
        return {"classes": len(batch["shares"])}

    def examined(self, model: Any, source: Any) -> Examination:
        return Examination(ClassificationTask(model, self.processor, source), self.stage.best_by)


def _mix(mixup: float, cutmix: float, num_classes: int) -> Any:
    kinds = [
        kind(alpha=alpha, num_classes=num_classes)
        for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        if alpha
    ]
    return v2.RandomChoice(kinds) if kinds else None
