"""`stepwell draw`: a fixed set of drawn pages with their answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepwell.commands.printing import show_progress

__all__ = ["draw"]


def draw(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    count: Annotated[int, typer.Option(min=1, help="Of pages.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of the pages: the same seed draws the same.")] = 0,
    kind: Annotated[
        str, typer.Option(help="mixed, receipt, document, table, form or lines.", metavar="KIND")
    ] = "mixed",
    sides: Annotated[tuple[int, int], typer.Option(metavar="LEAST MOST", help="Long sides, in pixels.")] = (
        800,
        1024,
    ),
    aspect: Annotated[tuple[float, float], typer.Option(metavar="LEAST MOST", help="Height by width.")] = (
        0.8,
        2.4,
    ),
    text: Annotated[tuple[int, int], typer.Option(metavar="LEAST MOST", help="Sizes of text, in pixels.")] = (
        8,
        40,
    ),
    reads: Annotated[int, typer.Option(min=0, help="Questions of a page that read a line.")] = 8,
    worn: Annotated[
        float, typer.Option(min=0, max=1, help="Share of pages that are skewed, faint, noisy or JPEG.")
    ] = 0.5,
    fonts: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder of further typefaces, .ttf or .otf."),
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="With typefaces that our own training never sees among them.")
    ] = False,
    view: Annotated[
        int, typer.Option(min=1, help="Long side of the view by which types of questions tell sizes.")
    ] = 1024,
) -> None:
    """Draw pages whose text is known: images, questions, conversations, boxes of lines, key fields."""
    from stepwell.reader.drawn import DrawnPages
    from stepwell.reader.drawn_set import write_drawn

    pages = DrawnPages(
        count=count,
        seed=seed,
        sides=sides,
        aspect=aspect,
        text=text,
        page=kind,
        fonts=fonts,
        worn=worn,
        held_out=held_out,
    )
    write_drawn(pages, out, reads=reads, view=view, progress=lambda done: show_progress(done, count))
    print(f"drawn: {count} pages in {out}")
