"""Options that let a command open larger images than by default, as a refusal names them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stepwell.images.limits import ImageLimits

__all__ = ["MaxAspect", "MaxBytes", "MaxPixels", "MaxSeconds", "MaxSide", "image_limits"]

MaxPixels = Annotated[int | None, typer.Option(min=1, help="Of an image. [default: 36 million]")]
MaxSide = Annotated[int | None, typer.Option(min=1, help="Of an image, in pixels. [default: 16384]")]
MaxAspect = Annotated[float | None, typer.Option(min=1, help="Long side over short side. [default: 200]")]
MaxBytes = Annotated[int | None, typer.Option(min=1, help="Of an image's file. [default: 32 million]")]
MaxSeconds = Annotated[float | None, typer.Option(help="Of processor time, to open an image. [default: 5]")]


def image_limits(*, for_tiles: bool = False, **given: float | None) -> ImageLimits:
    """The default limits, or those of pictures in tiles, but for those that are given."""
    from stepwell.images.limits import DEFAULT_LIMITS, TILED_LIMITS

    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(TILED_LIMITS if for_tiles else DEFAULT_LIMITS, **changes)
