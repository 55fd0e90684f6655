"""A model that is being trained, on validation data: what it finds, image by image, and the scores of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image

from stepwell.data.sample import BadSample
from stepwell.evaluate.classification import ClassificationResult
from stepwell.evaluate.segmentation import SegmentationResult
from stepwell.evaluate.tasks import PerceptionTask, Result
from stepwell.folders import one_line
from stepwell.images.open import open_image

__all__ = ["Examination", "scores_of"]


class Examination:
    """task: a model on data. best: the score by which weights are the best; larger is better."""

    def __init__(self, task: PerceptionTask[Any], best: str) -> None:
        self.task, self.best = task, best

    def __len__(self) -> int:
        return len(self.task.source)

    def found(self, places: Sequence[int]) -> tuple[dict[int, Any], list[BadSample]]:
        """What is found in images, by their places in the data; and those that cannot be used."""
        opened: dict[int, Image] = {}
        bad: list[BadSample] = []
        for place in places:
            try:
                opened[place] = open_image(self.task.image(place), limits=self.task.source.limits)
            except (ValueError, OSError) as error:
                bad.append(BadSample(0, place, self.task.source.where(place), one_line(error)))
        found = self.task.found([*opened], [*opened.values()]) if opened else []
        return dict(zip(opened, found, strict=True)), bad

    def scores(self, found: Mapping[int, Any]) -> dict[str, float]:
        """Of what is found in all images."""
        return scores_of(self.task.result(found))


def scores_of(result: Result) -> dict[str, float]:
    """Those that a training is watched by, 0..1; what the data have none of is 0."""
    if isinstance(result, SegmentationResult):
        named = {"mean_iou": result.mean_iou, "pixel_accuracy": result.pixel_accuracy}
    elif isinstance(result, ClassificationResult):
        named = {"top1": result.top1, f"top{result.k}": result.top_k}
    else:
        named = {
            f"{kind}_{name}": getattr(found, name)
            for kind, found in result.items()
            for name in ("ap", "ap50", "ap75")
        }
    return {name: value or 0.0 for name, value in named.items()}
