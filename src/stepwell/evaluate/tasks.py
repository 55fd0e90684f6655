"""What is asked of a detector, a segmenter and a classifier, image by image, and what scores come of it.

What a model finds in an image is a small JSON value, which a run keeps; scores are made of these and of the
data. Letters: K classes of the data, (H, W) an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepwell.data.coco import CocoFile
from stepwell.data.image_folder import ImageFolder
from stepwell.data.label_maps import IGNORED, LabelMaps
from stepwell.evaluate.class_names import ClassMatch, match_classes
from stepwell.evaluate.classification import TOP, ClassificationResult, ClassificationScores
from stepwell.evaluate.detection import DetectionResult, DetectionScores, FoundObjects, Kind, encode_mask
from stepwell.evaluate.kinds import TASKS, Task
from stepwell.evaluate.perception_data import (
    Source,
    data_classes,
    have_masks,
    open_data,
    true_objects,
)
from stepwell.evaluate.segmentation import SegmentationResult, SegmentationScores, confusion_of_pixels
from stepwell.models.detection_processor import detections_above
from stepwell.ops.paste import paste
from stepwell.structures import Detections

__all__ = [
    "ClassificationTask",
    "DetectionTask",
    "PerceptionTask",
    "Result",
    "SegmentationTask",
    "task_of",
]

MASK_THRESHOLD = 0.5

S = TypeVar("S", bound=Source)

Result = Mapping[Kind, DetectionResult] | SegmentationResult | ClassificationResult


class PerceptionTask(ABC, Generic[S]):
    """A model on data. name: of the task; classes: those of model and data, matched."""

    name: Task

    def __init__(self, network: Any, processor: Any, source: S) -> None:
        self.network, self.processor, self.source = network, processor, source
        self.classes: ClassMatch = match_classes(network.config.id2label, data_classes(source))

    @abstractmethod
    def image(self, index: int) -> Path:
        """Raises ValueError or OSError for an image that cannot be scored."""

    @torch.inference_mode()
    def found(self, indices: Sequence[int], images: Sequence[Image.Image]) -> list[Any]:
        """What the model finds in images, which belong to these entries of the data: a JSON value each."""
        inputs = self.processor(list(images), return_tensors="pt").to(self.network.device)
        sizes = [(image.height, image.width) for image in images]
        return self._found(indices, self.network(**inputs), sizes)

    @abstractmethod
    def _found(self, indices: Sequence[int], outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Any]: ...

    @abstractmethod
    def result(self, found: Mapping[int, Any]) -> Result:
        """found: by entry of the data."""

    def remarks(self) -> list[str]:
        """What a reader of the scores should know."""
        if not self.classes.others:
            return []
        others = ", ".join(self.classes.others[:5]) + (", ..." if len(self.classes.others) > 5 else "")
        return [f"The model knows {len(self.classes.others)} classes that the data lack: {others}"]


class DetectionTask(PerceptionTask[CocoFile]):
    """threshold: scores above it count; max_detections: of an image, None leaves the model's own number."""

    name = "detection"

    def __init__(
        self,
        network: Any,
        processor: Any,
        source: CocoFile,
        *,
        threshold: float = 0.0,
        max_detections: int | None = None,
    ) -> None:
        super().__init__(network, processor, source)
        self.threshold = threshold
        self.max_detections = max_detections or _limit(network.head.config)
        self.masks = getattr(network.config.head_settings, "masks", False) and have_masks(source)

    def image(self, index: int) -> Path:
        image = self.source[index]
        true_objects(self.source, image, masks=self.masks)
        return image.path

    def found(self, indices: Sequence[int], images: Sequence[Image.Image]) -> list[Any]:
        with _finding(self.network.head, self.max_detections):
            return super().found(indices, images)

    def _found(self, indices: Sequence[int], outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Any]:
        found = detections_above(outputs, self.threshold, sizes)
        return [self._record(one, size) for one, size in zip(found, sizes, strict=True)]

    def _record(self, found: Detections, size: tuple[int, int]) -> dict[str, Any]:
        """Of classes that the data have; masks one at a time: all at once would take gigabytes."""
        labels = [self.classes.places[label] for label in found.labels.tolist()]
        kept = [i for i, label in enumerate(labels) if label < len(self.classes.names)]
        record: dict[str, Any] = {
            "boxes": found.boxes[kept].double().cpu().numpy().round(3).tolist(),
            "scores": found.scores[kept].tolist(),
            "labels": [labels[i] for i in kept],
        }
        if self.masks and found.masks is not None:
            masks = found.masks
            record["masks"] = [
                encode_mask(
                    paste(masks[i : i + 1], found.boxes[i : i + 1], size, threshold=MASK_THRESHOLD)[0]
                    .cpu()
                    .numpy()
                )
                for i in kept
            ]
        return record

    def result(self, found: Mapping[int, Any]) -> Mapping[Kind, DetectionResult]:
        scores = DetectionScores(self.classes.names, masks=self.masks)
        for index, record in found.items():
            scores.add(
                true_objects(self.source, self.source[index], masks=self.masks),
                FoundObjects(
                    boxes=np.array(record["boxes"], float).reshape(-1, 4),
                    scores=np.array(record["scores"], float),
                    labels=np.array(record["labels"], int),
                    masks=record.get("masks"),
                ),
            )
        return scores.result(self.max_detections)

    def remarks(self) -> list[str]:
        masks = getattr(self.network.config.head_settings, "masks", False) and not self.masks
        return [
            *super().remarks(),
            f"At most {self.max_detections} detections an image; crowds count as neither right nor wrong",
            "Without intervals: a bootstrap of AP matches all objects anew for every resample",
            *(["Masks are not scored: not every object of the data has one"] if masks else []),
        ]


class SegmentationTask(PerceptionTask[LabelMaps]):
    name = "segmentation"

    def __init__(self, network: Any, processor: Any, source: LabelMaps) -> None:
        super().__init__(network, processor, source)
        names = self.classes.names
        self.shape = len(names), len(names) + bool(self.classes.others)

    def image(self, index: int) -> Path:
        return self.source[index].image

    def _found(self, indices: Sequence[int], outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Any]:
        maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return [self._record(index, found) for index, found in zip(indices, maps, strict=True)]

    def _record(self, index: int, found: Tensor) -> list[list[int]]:
        """[true label, given label, pixels] for those that there are."""
        truth = torch.as_tensor(self.source[index].labels, device=found.device)
        given = torch.tensor(self.classes.places, device=found.device)[found]
        matrix = confusion_of_pixels(truth, given, self.shape, ignored=IGNORED).cpu()
        return [[*place, int(matrix[tuple(place)])] for place in matrix.nonzero().tolist()]

    def result(self, found: Mapping[int, Any]) -> SegmentationResult:
        scores = SegmentationScores(self.classes.names, has_others=bool(self.classes.others), ignored=IGNORED)
        for record in found.values():
            matrix = np.zeros(self.shape, np.int64)
            for true, given, pixels in record:
                matrix[true, given] = pixels
            scores.add_matrix(matrix)
        return scores.result()


class ClassificationTask(PerceptionTask[ImageFolder]):
    name = "classification"

    def image(self, index: int) -> Path:
        return self.source[index].image

    def _found(self, indices: Sequence[int], outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Any]:
        best = outputs.logits.float().topk(min(TOP, outputs.logits.shape[1])).indices
        return [[self.classes.places[label] for label in of_image] for of_image in best.tolist()]

    def result(self, found: Mapping[int, Any]) -> ClassificationResult:
        scores = ClassificationScores(self.classes.names, num_others=len(self.classes.others))
        for index, ranked in found.items():
            scores.add(self.source[index].label, ranked)
        return scores.result()


def task_of(
    network: Any,
    processor: Any,
    data: Path,
    *,
    images: Path | None = None,
    classes: Path | None = None,
    threshold: float = 0.0,
    max_detections: int | None = None,
) -> PerceptionTask[Any]:
    """The task of a model, on data as `open_data` takes them. Raises ValueError for a model of another kind,
    and as `open_data` and `match_classes`.
    """
    name = TASKS.get(network.config.model_type)
    if name is None:
        raise ValueError(f"a {network.config.model_type!r} model has no scores; choose from {sorted(TASKS)}")
    if max_detections is not None and (name != "detection" or max_detections < 1):
        raise ValueError(f"max_detections is of detectors and at least 1, got {max_detections} for {name}")
    source = open_data(name, data, images=images, classes=classes)
    if isinstance(source, CocoFile):
        return DetectionTask(network, processor, source, threshold=threshold, max_detections=max_detections)
    if isinstance(source, LabelMaps):
        return SegmentationTask(network, processor, source)
    return ClassificationTask(network, processor, source)


def _limit(settings: Any) -> int:
    """How many detections a head finds in an image at most."""
    return cast(int, settings.selection.num if hasattr(settings, "selection") else settings.max_detections)


@contextmanager
def _finding(head: Any, count: int) -> Iterator[None]:
    """The head finds up to `count` objects an image meanwhile."""
    settings = head.config
    if hasattr(settings, "selection"):
        head.config = replace(settings, selection=replace(settings.selection, num=count))
    else:
        head.config = replace(settings, max_detections=count)
    try:
        yield
    finally:
        head.config = settings
