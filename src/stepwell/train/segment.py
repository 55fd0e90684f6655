"""Task `segment`: a class for every pixel, from images with maps of labels.

PIIP, arXiv 2501.07783, section IV-B and appendix; data as MMSegmentation reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torchvision import tv_tensors

from stepwell.data.entries import SegmentData
from stepwell.data.label_maps import IGNORED, LabelledPixels
from stepwell.evaluate.tasks import SegmentationTask
from stepwell.models.dense_config import StepwellSegmenterConfig
from stepwell.models.segmenter import StepwellForSemanticSegmentation
from stepwell.train.augment import SegmentCropAugment
from stepwell.train.detect import pyramid_or_json
from stepwell.train.examination import Examination
from stepwell.train.perception import PerceptionRecipe, PerceptionStage, PerceptionTask, Training

__all__ = ["SegmentRecipe", "SegmentStage", "SegmentTask", "SegmenterTraining"]


class SegmentStage(PerceptionStage):
    """augment: crops; images of the validation data are seen whole, or in windows."""

    data: Annotated[tuple[SegmentData, ...], Field(min_length=1)]
    validation: Annotated[tuple[SegmentData, ...], Field(max_length=1)] = ()
    augment: SegmentCropAugment = SegmentCropAugment()
    best_by: Literal["mean_iou", "pixel_accuracy"] = "mean_iou"


class SegmentRecipe(PerceptionRecipe):
    task: Literal["segment"] = "segment"
    stages: Annotated[tuple[SegmentStage, ...], Field(min_length=1)]


class SegmenterTraining(Training):
    """The head's cross-entropies."""

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.model(**batch).losses
        return losses


class SegmentTask(PerceptionTask):
    recipe = SegmentRecipe
    model_class = StepwellForSemanticSegmentation
    training = SegmenterTraining
    published = "segmentation"

    @classmethod
    def new_config(cls, settings: dict[str, Any], names: dict[str, Any]) -> StepwellSegmenterConfig:
        backbone = pyramid_or_json(settings["backbone"])
        return StepwellSegmenterConfig(backbone, head=settings["head"], images=settings["images"], **names)

    def loss_names(self) -> Sequence[str]:
        has_auxiliary = self.config.head_settings.auxiliary_map is not None
        return ("segmentation", "auxiliary") if has_auxiliary else ("segmentation",)

    def augmentation(self) -> Any:
        images = self.config.image_settings
        self.crop = self.stage.augment.crop or images.window or images.short_side
        return self.stage.augment.build(self.crop, images.short_side)

    def sample(self, sample: LabelledPixels, classes: Sequence[int]) -> dict[str, Any]:
        table = np.full(256, IGNORED, np.uint8)
        table[: len(classes)] = classes
        return {"image": self.opened(sample.image), "labels": tv_tensors.Mask(table[sample.labels])}

    def collate(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Padded to the crop at least: zeros beside images, ignored labels beside maps."""
        shapes = [sample["labels"].shape for sample in samples]
        height, width = (max(self.crop, *(shape[axis] for shape in shapes)) for axis in (0, 1))

        def padded(x: Tensor, value: float) -> Tensor:
            return F.pad(
                x.as_subclass(Tensor), (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value
            )

        pixels = torch.stack([padded(sample["image"], 0.0) for sample in samples])
        labels = torch.stack([padded(sample["labels"], IGNORED) for sample in samples])
        return {"pixel_values": pixels, "labels": labels.long()}

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor | int]:
        """Pixels, of which the head's losses are means."""
        labels: Tensor = batch["labels"]
        is_of_all = self.config.head_settings.loss_mean == "all_pixels"
        return dict.fromkeys(self.losses, labels.numel() if is_of_all else (labels != IGNORED).sum())

    def examined(self, model: Any, source: Any) -> Examination:
        return Examination(SegmentationTask(model, self.processor, source), self.stage.best_by)
