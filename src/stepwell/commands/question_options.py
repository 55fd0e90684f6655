"""Options of the commands that score answers to questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["Images", "MetricName", "NoRegion", "Suffix"]

MetricName = Literal["exact", "anls", "reading", "vqa", "relaxed", "choice", "pope", "iou", "cider"]

Images = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", exists=True, file_okay=False, help="Of image paths. [default: the data's]"
    ),
]
Suffix = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="A line behind every question; SHORT and LETTER are LLaVA's."),
]
NoRegion = Annotated[
    bool,
    typer.Option("--no-region", help="Show images whole, whatever region a row has, or tells in words."),
]
