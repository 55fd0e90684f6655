"""`model.predict`: what detectors, segmenters and classifiers share. Pictures in, predictions out.

Pictures are whatever `stepwell.open_image` takes. Those that go through the network together come out as each
would alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, overload

import torch
from PIL.Image import Image
from torch import Tensor, nn

from stepwell.images.limits import DEFAULT_LIMITS, TILED_LIMITS, ImageLimits
from stepwell.images.open import ImageSource, open_image
from stepwell.models.engine import device_of
from stepwell.models.predictions import Prediction
from stepwell.ops.finite import check_finite
from stepwell.structures import Size
from stepwell.views.tiling import Tiles

__all__ = ["Choice", "Graph", "Kind", "Predicts", "batch_size_on", "best_first"]

BATCH, BATCH_ON_CPU = 8, 1

Kind = TypeVar("Kind", bound=Prediction)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which of the predictions are wanted. threshold: what scores above it; most: at most so many, the best.
    None leaves it to the kind of model.
    """

    threshold: float | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"a threshold is a score of 0 to 1, got {self.threshold}")
        if self.most is not None and not _is_count(self.most):
            raise ValueError(f"max_detections is a whole number from 1 on, got {self.most!r}")


class Graph(Protocol):
    """What `Predicts.score` computes, run by something else than PyTorch."""

    def __call__(self, pixels: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, ...]: ...


class Predicts(Generic[Kind]):
    """What a model of transformers becomes that says how a batch and how tiles are predicted."""

    kept_processor: Any = None
    """The image processor that lies beside the weights, where `stepwell.load` has opened both."""
    graph: Graph | None = None
    """In place of `score`, where there is one."""
    runtime: str | None = None
    """What runs the graph, such as "onnx int8"."""

    def score(self, pixels: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, ...]:
        """The part of predicting whose tensors have sizes that follow from the images' alone: what can be
        exported. pixels: (B, 3, H, W), padded as the network wants them; sizes: of the images without
        padding.
        """
        raise NotImplementedError

    def scored(self, pixels: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, ...]:
        """`score`, by the graph where there is one."""
        run = self.score if self.graph is None else self.graph
        return run(pixels, sizes)

    @overload
    def predict(
        self,
        images: list[ImageSource] | tuple[ImageSource, ...],
        *,
        threshold: float | None = None,
        max_detections: int | None = None,
        batch: int | None = None,
        tiles: Tiles | None = None,
        limits: ImageLimits | None = None,
    ) -> list[Kind]: ...

    @overload
    def predict(
        self,
        images: ImageSource,
        *,
        threshold: float | None = None,
        max_detections: int | None = None,
        batch: int | None = None,
        tiles: Tiles | None = None,
        limits: ImageLimits | None = None,
    ) -> Kind: ...

    def predict(
        self,
        images: Any,
        *,
        threshold: float | None = None,
        max_detections: int | None = None,
        batch: int | None = None,
        tiles: Tiles | None = None,
        limits: ImageLimits | None = None,
    ) -> Any:
        """A picture -> its prediction; a list or a tuple of pictures -> a list of theirs, in order.

        threshold: of scores, by default 0.5 for objects and none for classes of a picture. max_detections:
        the best so many, by default the model's own number, 100 for most detectors, of a picture or of a
        tile, and 5 classes of a picture. batch: pictures, or tiles, that go through the network together, by
        default 1 on a CPU and 8 elsewhere; so many pictures are open at a time. tiles: cuts each picture into
        tiles, and puts what is found together. limits: of image files, by default those of
        `stepwell.ImageLimits`, and 150 million pixels for tiles.

        Raises ValueError for what a kind of model does not have (thresholds of segmenters, tiles of
        classifiers), and as `open_image` does.
        """
        if tiles is not None and not isinstance(tiles, Tiles):
            raise ValueError(f"tiles are stepwell.Tiles(), with a size, an overlap or a scale, got {tiles!r}")
        if batch is not None and not _is_count(batch):
            raise ValueError(f"a batch is a whole number from 1 on, got {batch!r}")
        choice = self.choice(threshold=threshold, max_detections=max_detections, tiles=tiles)
        together = batch or batch_size_on(device_of(self))
        limits = limits or (DEFAULT_LIMITS if tiles is None else TILED_LIMITS)
        is_list = isinstance(images, list | tuple)
        predictions: list[Kind] = []
        with _evaluating(self), torch.no_grad():  # inference tensors could not be changed in place
            given, step = images if is_list else [images], together if tiles is None else 1
            for first in range(0, len(given), step):
                opened = [open_image(image, limits=limits) for image in given[first : first + step]]
                if tiles is None:
                    predictions += self._predict_batch(opened, choice)
                else:
                    predictions.append(self._predict_tiled(opened[0], tiles, choice, together))
        return predictions if is_list else predictions[0]

    def choice(
        self, *, threshold: float | None = None, max_detections: int | None = None, tiles: Tiles | None = None
    ) -> Choice:
        """What `predict` with these options will give. Raises ValueError as that does, without a
        look at pictures.
        """
        choice = Choice(threshold=threshold, most=max_detections)
        self._check_choice(choice, tiles)
        return choice

    @contextmanager
    def looking_through(self, processor: Any) -> Iterator[None]:
        """Pictures are prepared by this image processor meanwhile."""
        kept, self.kept_processor = self.kept_processor, processor
        try:
            yield
        finally:
            self.kept_processor = kept

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class id."""
        config: Any = self.config  # type: ignore[attr-defined]
        return tuple(str(config.id2label[i]) for i in range(config.num_labels))

    def _check_choice(self, choice: Choice, tiles: Tiles | None) -> None:
        """Raises ValueError for what this kind of model does not have."""

    def _predict_batch(self, images: Sequence[Image], choice: Choice) -> list[Kind]:
        """Of RGB pictures of any sizes."""
        raise NotImplementedError

    def _predict_tiled(self, image: Image, tiles: Tiles, choice: Choice, batch: int) -> Kind:
        """Of one RGB picture, `batch` tiles at a time."""
        raise NotImplementedError

    def _run(self, inputs: Any) -> Any:
        """The output for what the processor has made. Raises ValueError for one that is no number."""
        model: Any = self
        device = device_of(model)
        outputs = model(**{name: value.to(device) for name, value in inputs.items()})
        check_finite(outputs.logits if hasattr(outputs, "logits") else outputs.scores)
        return outputs


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def batch_size_on(device: torch.device) -> int:
    """Pictures that go through a network together where nobody says how many."""
    return BATCH_ON_CPU if device.type == "cpu" else BATCH


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Every module as it is used, not trained; afterwards each as it was before."""
    training: list[nn.Module] = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def best_first(scores: Tensor, most: int | None) -> Tensor:
    """Places (m,) of the best scores (n,), at most so many."""
    order = scores.argsort(descending=True, stable=True)
    return order if most is None else order[:most]
