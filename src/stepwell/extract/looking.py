"""A model that gives what is wanted of each picture: pictures in, a batch of columns out.

The same for every road to it: it knows neither where pictures come from nor where columns go.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch
from PIL.Image import Image

from stepwell.evaluate.answers import digest_of_networks
from stepwell.export.runtime import runtime_of
from stepwell.extract.columns import as_stored, batch_of
from stepwell.extract.maps import has_maps, maps_of
from stepwell.extract.rows import Opened
from stepwell.extract.wanted import Wanted, What
from stepwell.folders import ModelError, one_line
from stepwell.models.ask import WINDOW, Assistant
from stepwell.models.engine import device_of
from stepwell.models.predicting import Predicts, batch_size_on
from stepwell.ops.memory import is_about_memory
from stepwell.structures import VisionFeatures

__all__ = ["Looker"]

_MOST_PIXELS = 2**26
"""Of the pictures that wait to be looked at: past so many, no more are waited for."""


class Looker:
    """A model of `stepwell.load` that gives what is wanted. Raises ValueError for one that cannot."""

    def __init__(self, model: Any, wanted: Wanted, *, name: str = "the model") -> None:
        self.model, self.wanted = model, wanted
        runs: dict[What, tuple[bool, Callable[[list[Image]], list[Any]], str]] = {
            "features": (isinstance(model, Assistant) or has_maps(model), self._features, "no feature maps"),
            "tokens": (isinstance(model, Assistant), self._tokens, "no visual tokens"),
            "predict": (isinstance(model, Predicts), self._predictions, "no predictions"),
            "ask": (isinstance(model, Assistant), self._answers, "no answers"),
        }
        fits, self._run, lacking = runs[wanted.what]
        if not fits:
            kind, advice = type(model).__name__, _ADVICE[wanted.what]
            raise ValueError(f"{name} gives {lacking}: it is a {kind}; {advice}")
        if wanted.what == "features" and isinstance(model, Predicts) and runtime_of(model):
            raise ValueError(
                f"{name} gives no feature maps on {runtime_of(model)}: its graphs end in predictions"
            )
        if wanted.what == "predict":
            model.choice(threshold=wanted.threshold, max_detections=wanted.max_detections, tiles=wanted.tiles)

    @property
    def batch(self) -> int:
        return self.wanted.batch or batch_size_on(_device_of(self.model))

    def settings(self) -> dict[str, Any]:
        """What the columns hang on, for JSON: neither the batch nor the device is of it."""
        return self.wanted.settings() | _about(self.model)

    def batches(self, pictures: Iterator[Opened]) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Pictures as they come -> columns in the same order, and how many of the rows are bad. Of eight
        batches' worth, those that are alike go through the model together.
        """
        waiting: list[Opened] = []
        pixels = 0
        for picture in pictures:
            waiting.append(picture)
            if picture.image is not None:
                pixels += picture.image.width * picture.image.height
            if len(waiting) == WINDOW * self.batch or pixels >= _MOST_PIXELS:
                yield self._columns(waiting)
                waiting, pixels = [], 0
        if waiting:
            yield self._columns(waiting)

    def _columns(self, pictures: Sequence[Opened]) -> tuple[pa.RecordBatch, int]:
        found = iter(self._looked_at([one.image for one in pictures if one.image is not None]))
        rows = [(one, *((None, one.error) if one.image is None else next(found))) for one in pictures]
        return batch_of(self.wanted.what, rows), sum(bool(error) for _, _, error in rows)

    def _looked_at(self, images: list[Image]) -> list[tuple[Any, str]]:
        """Of each picture what is wanted, or why it cannot be given: then it is looked at by itself."""
        if not images:
            return []
        try:
            return [(found, "") for found in self._run(images)]
        except ModelError:
            raise  # no picture's fault
        except Exception as error:
            if not isinstance(error, ValueError | OSError) and not is_about_memory(error):
                raise
            if len(images) == 1:
                reason = "not enough memory to look at it" if is_about_memory(error) else one_line(error)
                return [(None, reason)]
        return [one for image in images for one in self._looked_at([image])]

    def _encoded(self, images: list[Image]) -> list[VisionFeatures]:
        encoded: list[VisionFeatures] = self.model.encode_many(images, batch_size=self.batch)
        return encoded

    def _tokens(self, images: list[Image]) -> list[Any]:
        return [as_stored(one.tokens, self.wanted.store) for one in self._encoded(images)]

    def _features(self, images: list[Image]) -> list[Any]:
        if has_maps(self.model):
            maps = maps_of(self.model, images, batch=self.batch)
        else:
            maps = [one.maps for one in self._encoded(images)]
        return [
            [
                {"name": view.name, "stride": stride, "box": list(view.box)}
                | as_stored(numbers, self.wanted.store)
                for numbers, view, stride in of_image
            ]
            for of_image in maps
        ]

    def _predictions(self, images: list[Image]) -> list[Any]:
        found = self.model.predict(
            images,
            threshold=self.wanted.threshold,
            max_detections=self.wanted.max_detections,
            tiles=self.wanted.tiles,
            batch=self.batch,
        )
        return [json.dumps(one.to_dict(), ensure_ascii=False) for one in found]

    def _answers(self, images: list[Image]) -> list[Any]:
        answers: list[Any] = self.model.ask_many(
            [(image, self.wanted.question) for image in images],
            max_new_tokens=self.wanted.max_new_tokens,
            batch_size=self.batch,
        )
        return answers


_ADVICE: dict[What, str] = {
    "features": "take an assistant, a backbone, a detector or a segmenter",
    "tokens": "take an assistant",
    "predict": "take a detector, a segmenter or a classifier",
    "ask": "take an assistant",
}


def _device_of(model: Any) -> torch.device:
    if isinstance(model, Assistant):
        return next(model.engine.networks[0].parameters()).device
    device: torch.device = device_of(model)
    return device


def _about(model: Any) -> dict[str, Any]:
    """Alike for the same weights and settings, wherever they lie."""
    runtime = runtime_of(model)
    if isinstance(model, Assistant):
        networks = list(model.engine.networks)
        about = {
            "geometry": str(model.engine.geometry),
            "template": _digest(model.engine.chat_template),
            "boxes_are_regions": str(model.boxes_are_regions),
        }
    else:
        networks = [model]
        config = json.loads(model.config.to_json_string(use_diff=False))
        for place in ("_name_or_path", "transformers_version"):  # a model that has been moved is the same
            config.pop(place, None)
        processor = model.image_processor().to_json_string()
        about = {"config": _digest(json.dumps(config)), "processor": _digest(processor)}
    dtype = str(next(networks[0].parameters()).dtype).removeprefix("torch.")
    if runtime is not None:
        about["runtime"] = runtime
    return {"weights": digest_of_networks(networks), "dtype": dtype, **about}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
