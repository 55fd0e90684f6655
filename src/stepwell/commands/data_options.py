"""Options of the commands that take data sets, as `stepwell.data.entries.data_of` takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["ClassesFile", "Split"]

ClassesFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Of label maps, or of folders of classes. [default: classes.json near]",
    ),
]
Split = Annotated[
    str | None, typer.Option(metavar="NAME", help="Such as train or val. [default: of YOLO, train]")
]
