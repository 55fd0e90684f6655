"""What is asked of a detector, a segmenter and a classifier, image by image, and what scores come of it.

What a model finds in an image is a small JSON value, which a run keeps; scores are made of these and of the
data. Letters: K classes of the data, (H, W) an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from PIL import Image

from stepwell.data.image_folder import ImageFolder
from stepwell.data.label_maps import IGNORED, LabelMaps
from stepwell.data.objects import AnnotatedImage
from stepwell.data.summary import LabelledSource
from stepwell.evaluate.class_names import ClassMatch, match_classes
from stepwell.evaluate.classification import ClassificationResult, ClassificationScores
from stepwell.evaluate.detection import DetectionResult, DetectionScores, Kind, ScoredObjects, f1_of_boxes
from stepwell.evaluate.kinds import TASKS, Task
from stepwell.evaluate.perception_data import ObjectSource, data_classes, open_data, true_objects, used_labels
from stepwell.evaluate.segmentation import SegmentationResult, SegmentationScores, confusion_of_pixels
from stepwell.models.predictions import TOP, Classification, Detections, Prediction, Segmentation
from stepwell.views.tiling import Tiles

__all__ = [
    "ClassificationTask",
    "DetectionTask",
    "PerceptionTask",
    "Result",
    "SegmentationTask",
    "task_of",
]

S = TypeVar("S", bound=LabelledSource)

DRAWN = 0.5  # what scores above it is drawn

Result = Mapping[Kind, DetectionResult] | SegmentationResult | ClassificationResult


class PerceptionTask(ABC, Generic[S]):
    """A model on data. name: of the task; classes: those of model and data, matched. tiles: how images are
    cut to be looked at, `tiles_together` of one through the network; None: they are seen whole.
    """

    name: Task
    tiles_together: int = 1

    def __init__(self, network: Any, processor: Any, source: S, *, tiles: Tiles | None = None) -> None:
        self.network, self.processor, self.source, self.tiles = network, processor, source, tiles
        self.classes: ClassMatch = match_classes(
            network.class_names, data_classes(source), used=used_labels(source)
        )

    @abstractmethod
    def image(self, index: int) -> Path:
        """Raises ValueError or OSError for an image that cannot be scored."""

    def found(self, indices: Sequence[int], images: Sequence[Image.Image]) -> list[Any]:
        """What the model finds in images, which belong to these entries of the data: a JSON value each."""
        predictions = self.predicted(list(images))
        return [self._record(*pair) for pair in zip(indices, predictions, strict=True)]

    def predicted(self, images: list[Image.Image]) -> Sequence[Prediction]:
        """What the model predicts in images."""
        with self.network.looking_through(self.processor):
            return self._predict(images)

    def shown(self, image: Image.Image) -> Prediction:
        """What is drawn of what the model predicts in an image."""
        return self.predicted([image])[0]

    def _predict(self, images: list[Image.Image]) -> Sequence[Prediction]:
        """Of images that go through the network together, or in tiles."""
        predictions: Sequence[Prediction] = self.network.predict(
            images, batch=self._together(images), tiles=self.tiles
        )
        return predictions

    def _together(self, images: list[Image.Image]) -> int:
        return len(images) if self.tiles is None else self.tiles_together

    @abstractmethod
    def _record(self, index: int, found: Any) -> Any:
        """Of an entry of the data, and what is predicted there."""

    @abstractmethod
    def result(self, found: Mapping[int, Any]) -> Result:
        """found: by entry of the data."""

    @abstractmethod
    def quality(self, index: int, found: Any) -> float:
        """0..1: how well an image is understood, to sort images by."""

    def remarks(self) -> list[str]:
        """What a reader of the scores should know."""
        return [
            f"{text}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for text, names in (
                (
                    f"The model knows {len(self.classes.others)} classes that the data lack",
                    self.classes.others,
                ),
                ("The model does not know these, of which the data have nothing", self.classes.unknown),
            )
            if names
        ]


class DetectionTask(PerceptionTask[ObjectSource]):
    """threshold: scores above it count; max_detections: of an image, None leaves the model's own number."""

    name = "detection"

    def __init__(
        self,
        network: Any,
        processor: Any,
        source: ObjectSource,
        *,
        tiles: Tiles | None = None,
        threshold: float = 0.0,
        max_detections: int | None = None,
    ) -> None:
        super().__init__(network, processor, source, tiles=tiles)
        self.threshold = threshold
        self.max_detections = max_detections or network.head.max_detections
        self.masks: bool = getattr(network.config.head_settings, "masks", False) and source.has_masks

    def image(self, index: int) -> Path:
        image: AnnotatedImage = self.source[index]
        true_objects(image, masks=self.masks)
        return image.path

    def _predict(self, images: list[Image.Image]) -> Sequence[Detections]:
        predictions: Sequence[Detections] = self.network.predict(
            images,
            batch=self._together(images),
            threshold=self.threshold,
            max_detections=self.max_detections,
            tiles=self.tiles,
        )
        return predictions

    def shown(self, image: Image.Image) -> Detections:
        """By the boxes that are drawn `quality` judges."""
        found = cast(Detections, super().shown(image))
        return found.select(found.scores > DRAWN)

    def _record(self, index: int, found: Detections) -> dict[str, Any]:
        """Of classes that the data have."""
        labels = [self.classes.places[label] for label in found.labels.tolist()]
        kept = [i for i, label in enumerate(labels) if label < len(self.classes.names)]
        record: dict[str, Any] = {
            "boxes": found.boxes[kept].double().numpy().round(3).tolist(),
            "scores": found.scores[kept].tolist(),
            "labels": [labels[i] for i in kept],
        }
        if self.masks and found.masks is not None:
            record["masks"] = [found.masks.run_lengths(i) for i in kept]
        return record

    def result(self, found: Mapping[int, Any]) -> Mapping[Kind, DetectionResult]:
        scores = DetectionScores(self.classes.names, masks=self.masks)
        for index, record in found.items():
            scores.add(
                true_objects(self.source[index], masks=self.masks),
                ScoredObjects(
                    boxes=np.array(record["boxes"], float).reshape(-1, 4),
                    scores=np.array(record["scores"], float),
                    labels=np.array(record["labels"], int),
                    masks=record.get("masks"),
                ),
            )
        return scores.result(self.max_detections)

    def quality(self, index: int, found: Any) -> float:
        """F1 of the boxes that are drawn, at an overlap of a half."""
        truth = true_objects(self.source[index], masks=False)
        sure = [i for i, score in enumerate(found["scores"]) if score > DRAWN]
        boxes = np.array([found["boxes"][i] for i in sure], float).reshape(-1, 4)
        return f1_of_boxes(boxes, np.array([found["labels"][i] for i in sure], int), truth)

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

    def __init__(
        self, network: Any, processor: Any, source: LabelMaps, *, tiles: Tiles | None = None
    ) -> None:
        super().__init__(network, processor, source, tiles=tiles)
        names = self.classes.names
        self.shape = len(names), len(names) + bool(self.classes.others)

    def image(self, index: int) -> Path:
        return self.source[index].image

    def _record(self, index: int, found: Segmentation) -> list[list[int]]:
        """[true label, given label, pixels] for those that there are."""
        truth, places = torch.as_tensor(self.source[index].labels), torch.tensor(self.classes.places)
        matrix = confusion_of_pixels(truth, places[found.labels.long()], self.shape, ignored=IGNORED)
        return [[*place, int(matrix[tuple(place)])] for place in matrix.nonzero().tolist()]

    def result(self, found: Mapping[int, Any]) -> SegmentationResult:
        scores = SegmentationScores(self.classes.names, has_others=bool(self.classes.others), ignored=IGNORED)
        for record in found.values():
            matrix = np.zeros(self.shape, np.int64)
            for true, given, pixels in record:
                matrix[true, given] = pixels
            scores.add_matrix(matrix)
        return scores.result()

    def quality(self, index: int, found: Any) -> float:
        """Mean IoU."""
        return self.result({index: found}).mean_iou or 0.0


class ClassificationTask(PerceptionTask[ImageFolder]):
    name = "classification"

    def image(self, index: int) -> Path:
        return self.source[index].image

    def _predict(self, images: list[Image.Image]) -> Sequence[Classification]:
        predictions: Sequence[Classification] = self.network.predict(
            images, batch=len(images), max_detections=TOP
        )
        return predictions

    def _record(self, index: int, found: Classification) -> list[int]:
        """Labels, the best first."""
        return [self.classes.places[label] for label in found.labels.tolist()]

    def result(self, found: Mapping[int, Any]) -> ClassificationResult:
        scores = ClassificationScores(self.classes.names, num_others=len(self.classes.others))
        for index, ranked in found.items():
            scores.add(self.source[index].label, ranked)
        return scores.result()

    def quality(self, index: int, found: Any) -> float:
        """1 / k where the true class is the k-th."""
        label = self.source[index].label
        return 1 / (1 + found.index(label)) if label in found else 0.0


def task_of(
    network: Any,
    processor: Any,
    data: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    classes: Path | None = None,
    threshold: float | None = None,
    max_detections: int | None = None,
    tiles: Tiles | None = None,
) -> PerceptionTask[Any]:
    """The task of a model, on data as `open_data` takes them. Raises ValueError for a model of another kind,
    for what its kind does not have, such as tiles of a classifier, and as `open_data` and `match_classes`.
    """
    name = TASKS.get(network.config.model_type)
    if name is None:
        raise ValueError(f"a {network.config.model_type!r} model has no scores; choose from {sorted(TASKS)}")
    if max_detections is not None and (name != "detection" or max_detections < 1):
        raise ValueError(f"max_detections is of detectors and at least 1, got {max_detections} for {name}")
    if threshold is not None and name != "detection":
        raise ValueError(f"a threshold is of detectors, got {threshold} for {name}")
    if tiles is not None and name == "classification":
        raise ValueError("a classifier looks at whole images, and takes no tiles")
    source = open_data(name, data, images=images, split=split, classes=classes)
    if isinstance(source, LabelMaps):
        return SegmentationTask(network, processor, source, tiles=tiles)
    if isinstance(source, ImageFolder):
        return ClassificationTask(network, processor, source)
    return DetectionTask(
        network,
        processor,
        source,
        tiles=tiles,
        threshold=threshold or 0.0,
        max_detections=max_detections,
    )
