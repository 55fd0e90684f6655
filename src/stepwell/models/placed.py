"""Any vision system whose visual tokens carry a code of the place that they stand for.

Not a paper's part: what the merge of a pyramid may do (fuse/merge.py, `place`), for systems of views, slices
and tiles, so that a language model may find by coordinates what stands in an image. Letters: N visual tokens
of an image, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from stepwell.layers.position import SHORTEST, fraction_position_embedding
from stepwell.models.around import AroundConfig, AroundVision
from stepwell.models.vision import STRICT, VisionSystem
from stepwell.structures import TokenLayout, VisionFeatures

__all__ = ["PlacedConfig", "PlacedVision", "place_codes"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlacedConfig(AroundConfig):
    """place: weight of the codes; place_shortest: their shortest wavelength, as a fraction of a side of the
    image.
    """

    adjustable: ClassVar = frozenset({"place"})

    kind: Literal["placed"] = "placed"
    place: Annotated[float, Field(gt=0)] = 0.2
    place_shortest: Annotated[float, Field(gt=0)] = SHORTEST

    def build(self, out_dim: int) -> PlacedVision:
        if out_dim % 4:
            raise ValueError(f"codes of columns and rows: a width of {out_dim} does not divide by 4")
        return PlacedVision(self.inner.build(out_dim), self)


class PlacedVision(AroundVision):
    """system: whose visual tokens get codes behind its projector."""

    def __init__(self, system: VisionSystem, config: PlacedConfig) -> None:
        super().__init__(system, system.geometry)
        self.config = config

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        return [
            features._replace(tokens=features.tokens + self._codes(features.tokens, layout))
            for features, layout in zip(self.system.encode(inputs, layouts), layouts, strict=True)
        ]

    def _codes(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        codes = place_codes(layout, tokens.shape[1], shortest=self.config.place_shortest)
        return (self.config.place * codes).to(tokens)


def place_codes(layout: TokenLayout, dim: int, *, shortest: float = SHORTEST) -> Tensor:
    """-> (N, dim): codes of the column and row in which each token's cell lies, in fractions of the image's
    sides; zeros for a token without a place.
    """
    height, width = layout.image_size
    count = layout.num_visual
    codes = torch.zeros(count + 1, dim)
    for (left, top, right, bottom), rows in layout.grids:
        tokens = torch.tensor([list(row) for row in rows])
        box = torch.tensor([[left / width, top / height, right / width, bottom / height]])
        size = (tokens.shape[0], tokens.shape[1])
        of_cells = fraction_position_embedding(dim, size, box, shortest=shortest)[0]
        codes[tokens.flatten() % (count + 1)] = of_cells  # those of a cell without a token go last
    return codes[:-1]
