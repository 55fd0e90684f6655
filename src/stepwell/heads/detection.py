"""What every detection head is: maps of a backbone -> losses while it learns, detections when it has learnt.

Letters: B batch, C width of a map, (h, w) its grid, n objects of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from stepwell.ops.double import AnyMap
from stepwell.structures import Extent, FoundObjects, Objects

__all__ = ["DetectionHead"]


class DetectionHead(nn.Module, ABC):
    """Neck and heads behind a backbone of any strides.

    Layers run in the precision of their parameters; boxes, scores and losses in single precision at least.
    Models go through `forward`, so that what is hooked to a module, such as weights that are fetched from a
    disk, is there. config: the settings that it was built from.
    """

    config: Any

    @property
    def max_detections(self) -> int:
        """That are found in an image."""
        config = self.config
        count: int = config.selection.num if hasattr(config, "selection") else config.max_detections
        return count

    @contextmanager
    def finding(self, count: int) -> Iterator[None]:
        """Meanwhile `count` objects are found in an image at most."""
        kept = self.config
        if hasattr(kept, "selection"):
            self.config = replace(kept, selection=replace(kept.selection, num=count))
        else:
            self.config = replace(kept, max_detections=count)
        try:
            yield
        finally:
            self.config = kept

    def forward(
        self,
        maps: Sequence[AnyMap],
        extents: Sequence[Extent],
        objects: Sequence[Objects] | None = None,
    ) -> dict[str, Tensor] | list[FoundObjects]:
        """`losses` where objects are given, else `detect`."""
        return self.detect(maps, extents) if objects is None else self.losses(maps, extents, objects)

    @abstractmethod
    def losses(
        self, maps: Sequence[AnyMap], extents: Sequence[Extent], objects: Sequence[Objects]
    ) -> dict[str, Tensor]:
        """maps: (B, C, h, w), finest first; one extent and one set of objects, maybe empty, per image.
        Scalars with their weights in them: the loss is their sum.
        """

    def detect(self, maps: Sequence[AnyMap], extents: Sequence[Extent]) -> list[FoundObjects]:
        """What is in each image, best first, clipped to its valid part."""
        return self.choose(self.score(maps, extents), extents)

    @abstractmethod
    def score(self, maps: Sequence[AnyMap], extents: Sequence[Extent]) -> tuple[Tensor, ...]:
        """The part of detecting whose tensors have sizes that follow from the images' alone."""

    @abstractmethod
    def choose(self, scored: Sequence[Tensor], extents: Sequence[Extent]) -> list[FoundObjects]:
        """The rest of it, on what `score` gives."""
