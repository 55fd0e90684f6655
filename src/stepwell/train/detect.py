"""Task `detect`: boxes, and masks where the head has them, from COCO files and YOLO data sets.

PIIP, arXiv 2501.07783, section IV-A and appendix; data as MMDetection reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torchvision import tv_tensors

from stepwell.data.entries import DetectData
from stepwell.data.fields import Positive
from stepwell.data.masks import Numbers
from stepwell.data.mixture import Mixture
from stepwell.data.objects import AnnotatedImage, Annotation
from stepwell.data.sample import read
from stepwell.evaluate.tasks import DetectionTask
from stepwell.heads.dino import DinoConfig
from stepwell.models.dense import DenseSettings
from stepwell.models.dense_config import StepwellDetectorConfig
from stepwell.models.detector import StepwellForObjectDetection
from stepwell.models.vision import validated
from stepwell.structures import Size
from stepwell.train.augment import DetectAugment, JitterAugment
from stepwell.train.examination import Examination
from stepwell.train.mask_planes import pack_masks, unpack_masks
from stepwell.train.perception import PerceptionRecipe, PerceptionStage, PerceptionTask, Training
from stepwell.views.resize import pad_batch

__all__ = [
    "DetectRecipe",
    "DetectStage",
    "DetectTask",
    "DetectorTraining",
    "alike_order",
    "pyramid_or_json",
]

_TWO_STAGES = ("rpn_objectness", "rpn_boxes", "classes", "boxes")
_SETS = ("class", "box", "giou")


class DetectStage(PerceptionStage):
    """data: without crowds, which nobody is asked to tell apart. empty_images: whether images without an
    object are learned from. alike: whether a batch is of wide or of high images alone, which are padded less.
    best_by: those of masks need data in which every object has one. max_detections: of an image of
    the validation data; None is the head's own number.
    """

    data: Annotated[tuple[DetectData, ...], Field(min_length=1)]
    validation: Annotated[tuple[DetectData, ...], Field(max_length=1)] = ()
    augment: DetectAugment = JitterAugment()
    empty_images: bool = True
    alike: bool = True
    best_by: Literal["boxes_ap", "boxes_ap50", "boxes_ap75", "masks_ap", "masks_ap50", "masks_ap75"] = (
        "boxes_ap"
    )
    max_detections: Positive | None = None

    @model_validator(mode="after")
    def _batches_are_made_once(self) -> DetectStage:
        if self.even and self.alike:
            raise ValueError("even batches would be made anew by alike: add alike: false")
        return self


class DetectRecipe(PerceptionRecipe):
    task: Literal["detect"] = "detect"
    stages: Annotated[tuple[DetectStage, ...], Field(min_length=1)]


class DetectorTraining(Training):
    """Losses of all layers and stages of a head are added up by what they are of."""

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """`labels`: masks of objects, where there are any, in planes (train/mask_planes.py)."""
        losses: dict[str, Tensor] = {}
        labels = [_with_masks(of_image) for of_image in batch["labels"]]
        for name, loss in self.model(**batch | {"labels": labels}).losses.items():
            kind = _kind(name)
            losses[kind] = losses[kind] + loss if kind in losses else loss
        return losses


class DetectTask(PerceptionTask):
    recipe = DetectRecipe
    model_class = StepwellForObjectDetection
    training = DetectorTraining
    published = "detection"
    fewest = 1

    def __init__(self, recipe: Any, stage: Any) -> None:
        super().__init__(recipe, stage)
        if stage.validation and stage.best_by.startswith("masks") and not self._masks_are_scored():
            raise ValueError(
                f"stages.{stage.name}.best_by: {stage.best_by} needs a head with masks, and validation data "
                "in which every object has one"
            )

    @classmethod
    def new_config(cls, settings: dict[str, Any], names: dict[str, Any]) -> StepwellDetectorConfig:
        head = {"kind": "rcnn", **settings["head"]}
        backbone = pyramid_or_json(settings["backbone"])
        return StepwellDetectorConfig(backbone, head=head, images=settings["images"], **names)

    def loss_names(self) -> Sequence[str]:
        if isinstance(self.config.head_settings, DinoConfig):
            return _SETS
        return (*_TWO_STAGES, "masks") if self.has_masks else _TWO_STAGES

    @property
    def has_masks(self) -> bool:
        """Whether the head learns masks."""
        return bool(getattr(self.config.head_settings, "masks", False))

    def _masks_are_scored(self) -> bool:
        validation: Any = super().source(self.stage.validation[0])
        return self.has_masks and bool(validation.source.has_masks)

    def augmentation(self) -> Any:
        images = self.config.image_settings
        return self.stage.augment.build((images.long_limit, images.short_limit))

    def sample(self, sample: AnnotatedImage, classes: Sequence[int]) -> dict[str, Any]:
        """`masks` are in planes (train/mask_planes.py). Raises ValueError for an object without a
        mask where the head learns masks.
        """
        things = [(thing, thing.label) for thing in sample.annotations if _teaches(thing)]
        boxes = torch.tensor([thing.box for thing, _ in things], dtype=torch.float32).reshape(-1, 4)
        fields: dict[str, Any] = {
            "image": self.opened(sample.path),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=sample.size),
            "labels": torch.tensor(
                [classes[label] for _, label in things if label is not None], dtype=torch.int64
            ),
        }
        if self.has_masks:
            spans = [_spans(thing) for thing, _ in things]
            fields["masks"] = tv_tensors.Mask(pack_masks(spans, sample.size))
        return fields

    def source(self, data: Any) -> Any:
        source: Any = super().source(data)
        selected: Sequence[int] = range(len(source))
        if not self.stage.empty_images:
            selected = [i for i in selected if read([source], 0, i, _can_teach)]
        if not source.source.num_objects or not selected:
            raise ValueError(f"{_named(data)} has nothing to be learnt from{_first(source.faults)}")
        return source if self.stage.empty_images else _Selected(source, selected)

    def order(self, samples: Mixture, *, batches: int, seed: int) -> list[int] | None:
        """Batches of wide or of high images, in the order in which they are full."""
        if not self.stage.alike or self.stage.batch == 1:
            return None

        @cache
        def is_wide(number: int, place: int) -> bool:
            return bool(read(samples.sources, number, place, _is_wide))

        return alike_order([is_wide(*place) for place in samples.places()], self.stage.batch)

    def collate(self, samples: Sequence[Any]) -> dict[str, Any]:
        pixels, extents = pad_batch([sample["image"] for sample in samples], self.processor.size_divisor)
        mask = torch.zeros(len(pixels), *pixels.shape[-2:], dtype=torch.int64)
        for place, extent in zip(mask, extents, strict=True):
            place[: extent.valid[0], : extent.valid[1]] = 1
        labels = [
            _as_transformers_has_them(sample, extent.valid)
            for sample, extent in zip(samples, extents, strict=True)
        ]
        return {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor | int]:
        return dict.fromkeys(self.losses, len(batch["labels"]))

    def examined(self, model: Any, source: Any) -> Examination:
        task = DetectionTask(model, self.processor, source, max_detections=self.stage.max_detections)
        return Examination(task, self.stage.best_by)


def _named(data: Any) -> Any:
    return data.annotations if data.kind == "coco" else data.path


def _first(faults: Sequence[tuple[str, str]]) -> str:
    """What was left out of a source, in the middle of a sentence."""
    if not faults:
        return ": no image has an object"
    where, reason = faults[0]
    return f"; left out are {len(faults)}, of which the first is {where}: {reason}"


def alike_order(is_wide: Sequence[bool], batch: int) -> list[int]:
    """The indices of all samples, in their order but for those that wait until a batch of their kind is full.
    What is left in the end comes last.
    """
    order: list[int] = []
    waiting: dict[bool, list[int]] = {True: [], False: []}
    for index, wide in enumerate(is_wide):
        waiting[wide].append(index)
        if len(waiting[wide]) == batch:
            order += waiting[wide]
            waiting[wide] = []
    return order + waiting[True] + waiting[False]


def pyramid_or_json(backbone: dict[str, Any]) -> Any:
    """Settings of a pyramid, or the JSON of a backbone of transformers as it is."""
    return backbone if "model_type" in backbone else validated(DenseSettings, backbone, "model.backbone")


def _kind(name: str) -> str:
    """Of a loss such as rpn_boxes, classes_1 of a cascade, or denoising0_box of DINO."""
    stem, _, last = name.rpartition("_")
    if last.isdecimal():
        return stem
    return last if last in _SETS else name


def _is_wide(sample: tuple[AnnotatedImage, Any]) -> bool:
    height, width = sample[0].size
    return width > height


def _can_teach(sample: tuple[AnnotatedImage, Any]) -> bool:
    return any(map(_teaches, sample[0].annotations))


def _teaches(thing: Annotation) -> bool:
    return not thing.is_crowd and thing.label is not None


def _spans(thing: Annotation) -> Numbers:
    if thing.mask is None:
        raise ValueError("an object of it has no mask; a head that learns none has model.head.masks: false")
    return thing.mask.spans()


class _Selected:
    """Some of the samples of a source."""

    def __init__(self, source: Any, places: Sequence[int]) -> None:
        self.source, self.places = source, list(places)
        self.faults: list[tuple[str, str]] = source.faults

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.places[index]]

    def where(self, index: int) -> str:
        where: str = self.source.where(self.places[index])
        return where


def _as_transformers_has_them(sample: dict[str, Any], size: Size) -> dict[str, Tensor]:
    """Labels of an image (H, W): class_labels (n,), boxes (n, 4) as centre and size in parts of it, masks,
    which are in planes still.
    """
    boxes = sample["boxes"].as_subclass(Tensor)
    corners, far = boxes[:, :2], boxes[:, 2:]
    height, width = size
    centres = torch.cat([(corners + far) / 2, far - corners], 1) / boxes.new_tensor([width, height] * 2)
    labels = {"class_labels": sample["labels"], "boxes": centres}
    if "masks" in sample:
        labels["masks"] = sample["masks"].as_subclass(Tensor)
    return labels


def _with_masks(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    if "masks" not in labels:
        return labels
    return labels | {"masks": unpack_masks(labels["masks"], len(labels["class_labels"]))}
