"""The vision system of a model at several sizes of its views, with the same weights: a request may ask for
smaller ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stepwell.models.engine import TransformersEngine, device_of
from stepwell.models.systems import vision_settings
from stepwell.models.vision import VisionConfig, VisionSystem
from stepwell.structures import Geometry, Region, Size, TokenLayout

__all__ = ["Sight", "choose_sight", "sights_of"]

_SCALES = (0.5, 0.25)


class Sight(NamedTuple):
    """A vision system and the settings that it was built by. scale: of its views' sides, by the model's."""

    scale: float
    settings: VisionConfig
    vision: VisionSystem

    @property
    def geometry(self) -> Geometry:
        return self.vision.geometry


def sights_of(engine: TransformersEngine) -> list[Sight]:
    """The model's own, and those of a half and a quarter that the system can take."""
    own: VisionSystem = engine.model.model.vision
    settings = vision_settings(engine.processor.image_processor.vision_config)
    sights = [Sight(1.0, settings, own)]
    for scale in _SCALES:
        try:
            resized = settings.resized(settings.sizes_for(int(settings.largest * scale)))
            smaller = resized.build(engine.model.config.text_config.hidden_size)
        except ValueError:
            continue  # a size that its strides do not divide
        smaller.to(device_of(engine.model)).load_state_dict(own.state_dict(), assign=True)
        sights.append(Sight(scale, resized, smaller.eval()))
    return sights


def choose_sight(
    sights: Sequence[Sight], size: Size, region: Region | None, *, detail: str, max_pixels: int | None
) -> tuple[Sight, TokenLayout]:
    """The largest that a request allows, and what it makes of an image of `size`; none that makes more tokens
    of it than the first, as smaller slices may. Raises ValueError where `max_pixels` are too few for all.
    """
    allowed = sights[min(1, len(sights) - 1) :] if detail == "low" else sights
    found = [(sight, sight.geometry.layout_of(size, region)) for sight in allowed]
    own = sights[0].geometry.layout_of(size, region)
    found = [pair for pair in found if pair[1].num_visual <= own.num_visual] or [(sights[0], own)]
    fitting = [pair for pair in found if max_pixels is None or pair[1].num_pixels <= max_pixels]
    if not fitting:
        least = min(layout.num_pixels for _, layout in found)
        raise ValueError(f"max_pixels are too few: the smallest views of this image have {least} pixels")
    return fitting[0]
