"""Options of the commands that look at pictures in tiles, as `stepwell.Tiles` takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stepwell.views.tiling import Tiles

__all__ = ["InTiles", "TileOverlap", "TileScale", "TileSize", "tiles_of"]

InTiles = Annotated[
    bool, typer.Option("--tiles", help="Cut pictures into overlapping tiles; up to 150 million pixels.")
]
TileSize = Annotated[
    int | None, typer.Option(min=2, help="Side of a tile, as the model sees it. [default: the model's]")
]
TileOverlap = Annotated[float | None, typer.Option(help="Share of a tile's side, 0 to 1. [default: 0.25]")]
TileScale = Annotated[
    float | None, typer.Option(help="The model's pixels for one of the picture. [default: 1, native]")
]


def tiles_of(tiles: bool, *, size: int | None, overlap: float | None, scale: float | None) -> Tiles | None:
    """How pictures are cut; None for whole ones. Raises ValueError for what says how and no --tiles."""
    given = {"size": size, "overlap": overlap, "scale": scale}
    given = {name: value for name, value in given.items() if value is not None}
    if not tiles:
        if given:
            raise ValueError(f"--tile-{next(iter(given))} says how tiles are cut; add --tiles")
        return None
    from stepwell.views.tiling import Tiles

    return Tiles(**given)  # type: ignore[arg-type]
