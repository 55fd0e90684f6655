"""Settings and systems that stand around any other vision system, and change its visual tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic.dataclasses import dataclass
from torch import nn

from stepwell.encoders.encoder import Encoder
from stepwell.models.vision import STRICT, VisionConfig, VisionSystem, settings_json
from stepwell.structures import Geometry

__all__ = ["AroundConfig", "AroundVision"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AroundConfig(VisionConfig):
    """system: the settings of another. Its adjustable fields are this one's too."""

    system: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "system", settings_json(self.inner))

    @property
    def inner(self) -> VisionConfig:
        """The settings of the system that stands within."""
        from stepwell.models.systems import vision_settings  # which knows the kinds around others too

        return vision_settings(self.system)

    @property
    def parts(self) -> Mapping[str, str]:  # type: ignore[override]
        return {name: f"system.{part}" for name, part in self.inner.parts.items()}

    @property
    def largest(self) -> int:
        return self.inner.largest

    def geometry(self) -> Geometry:
        return self.inner.geometry()

    def resized(self, sizes: Sequence[int]) -> Self:
        return self._of(self.inner.resized(sizes))

    def sizes_for(self, largest: int) -> list[int]:
        return self.inner.sizes_for(largest)

    def as_papers_count(self) -> Self:
        return self._of(self.inner.as_papers_count())

    def adjusted(self, changes: Mapping[str, Any]) -> Self:
        own = {name: value for name, value in changes.items() if name in self.adjustable}
        others = {name: value for name, value in changes.items() if name not in self.adjustable}
        settings = VisionConfig.adjusted(self, own)
        return settings._of(settings.inner.adjusted(others))

    def _of(self, inner: VisionConfig) -> Self:
        return dataclasses.replace(self, system=settings_json(inner))


class AroundVision(VisionSystem):
    """system: that stands within. A subclass changes what it encodes."""

    def __init__(self, system: VisionSystem, geometry: Geometry) -> None:
        super().__init__()
        self.system = system
        self.geometry = geometry

    @property
    def projector(self) -> nn.Module:  # type: ignore[override]
        return self.system.projector

    @property
    def encoders(self) -> Sequence[Encoder]:
        return self.system.encoders
