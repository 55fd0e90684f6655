"""Any vision system with fewer visual tokens: neighbours averaged, or some left out by chance.

Not a paper's part. A system's own way to few tokens has to be better than these two. Letters: M visual tokens
of the system, N those that are left, D the language model's width.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from stepwell.models.around import AroundConfig, AroundVision
from stepwell.models.vision import STRICT
from stepwell.structures import (
    Geometry,
    Region,
    Size,
    Statistics,
    TokenGrid,
    TokenLayout,
    TokenRun,
    VisionFeatures,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FewerTokensConfig", "FewerTokensGeometry", "FewerTokensLayout", "FewerTokensVision"]

Reduction = Literal["average", "drop"]
"""Of visual tokens: the mean of so many that lie side by side in a row; or one in so many, by chance."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FewerTokensLayout(TokenLayout):
    """whole: the layout of the system. places: for each of its visual tokens the one that it becomes a part
    of; -1: none.
    """

    whole: TokenLayout
    places: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FewerTokensGeometry(Geometry):
    """The layouts of `system` with one visual token in `factor`, of each run at least one. Which ones are
    dropped depends on the size of the image, the region and the seed alone.
    """

    system: Geometry
    reduction: Reduction
    factor: int
    seed: int

    @property
    def mean(self) -> Statistics:  # type: ignore[override]
        return self.system.mean

    @property
    def std(self) -> Statistics:  # type: ignore[override]
        return self.system.std

    def layout(self, size: Size) -> FewerTokensLayout:
        return self._fewer(self.system.layout(size))

    def close_up(self, size: Size, region: Region) -> FewerTokensLayout:
        return self._fewer(self.system.close_up(size, region))

    def inputs(self, image: Image, layout: TokenLayout) -> list[Tensor]:
        return self.system.inputs(image, layout)

    def views(self, inputs: Sequence[Tensor], layout: TokenLayout) -> list[Tensor]:
        return self.system.views(inputs, layout)

    def _averaged(self, whole: TokenLayout) -> list[int]:
        """Tokens without a place, such as newlines, stay."""
        column = {token: col for _, rows in whole.grids for row in rows for col, token in enumerate(row)}
        places, count = [], 0
        for token in range(whole.num_visual):
            count += column.get(token, 0) % self.factor == 0
            places.append(count - 1)
        return places

    def _dropped(self, whole: TokenLayout) -> list[int]:
        chance = random.Random(f"{self.seed}/{whole.image_size}/{whole.region}")
        places: list[int] = []
        kept = 0
        for run in whole.runs:
            stays = set(chance.sample(range(run.count), math.ceil(run.count / self.factor)))
            for i in range(run.count):
                places.append(kept if i in stays else -1)
                kept += i in stays
        return places

    def _fewer(self, whole: TokenLayout) -> FewerTokensLayout:
        places = self._averaged(whole) if self.reduction == "average" else self._dropped(whole)
        rest = iter(places)
        runs = []
        for run in whole.runs:
            left = {next(rest) for _ in range(run.count)} - {-1}
            runs.append(TokenRun(count=len(left)) if left else run)
        grids = [
            TokenGrid(box, tuple(tuple(places[token] if token >= 0 else -1 for token in row) for row in rows))
            for box, rows in whole.grids
        ]
        same = {field.name: getattr(whole, field.name) for field in dataclasses.fields(TokenLayout)}
        fewer = {"runs": tuple(runs), "grids": tuple(grids), "token_grid": (0, 0)}
        return FewerTokensLayout(**{**same, **fewer}, whole=whole, places=tuple(places))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FewerTokensConfig(AroundConfig):
    """factor: of the system's visual tokens, one in so many is left. seed: of what is dropped."""

    adjustable: ClassVar = frozenset({"factor", "reduction", "seed"})

    kind: Literal["fewer_tokens"] = "fewer_tokens"
    reduction: Reduction = "average"
    factor: Annotated[int, Field(gt=1)] = 2
    seed: int = 0

    def geometry(self) -> FewerTokensGeometry:
        return FewerTokensGeometry(
            system=self.inner.geometry(), reduction=self.reduction, factor=self.factor, seed=self.seed
        )

    def build(self, out_dim: int) -> FewerTokensVision:
        return FewerTokensVision(self.inner.build(out_dim), self.geometry())


class FewerTokensVision(AroundVision):
    """system: whose visual tokens become fewer behind its projector."""

    geometry: FewerTokensGeometry

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        fewer = [layout for layout in layouts if isinstance(layout, FewerTokensLayout)]  # all of them
        found = self.system.encode(inputs, [layout.whole for layout in fewer])
        return [
            VisionFeatures(_means(features.tokens, layout), features.maps, layout)
            for features, layout in zip(found, fewer, strict=True)
        ]


def _means(tokens: Tensor, layout: FewerTokensLayout) -> Tensor:
    """(M, D) -> (N, D)."""
    count = layout.num_visual
    places = torch.tensor(layout.places, device=tokens.device) % (count + 1)  # what is dropped goes last
    means = tokens.new_zeros(count + 1, tokens.shape[1])
    means = means.scatter_reduce(0, places[:, None].expand_as(tokens), tokens, "mean", include_self=False)
    return means[:-1]
