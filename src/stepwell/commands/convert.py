"""`stepwell convert`: a released checkpoint becomes a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepwell.commands.printing import print_json
from stepwell.folders import is_url

__all__ = ["convert"]


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A checkpoint, file or folder; with --dry-run a manifest."),
    ],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The new model folder.")] = None,
    as_: Annotated[str, typer.Option("--as", metavar="NAME", help="The published model it is.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only compare names and shapes: SOURCE is a JSON file of them.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where its tokenizer is. [default: beside SOURCE]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with every name.")] = False,
) -> None:
    """Turn a released checkpoint into a model folder."""
    if not as_:
        raise ValueError("say which published model it is: --as NAME")
    if not source.exists():
        hint = " (a URL is not fetched: download it first)" if is_url(str(source)) else ""
        raise ValueError(f"no such file or folder: {source}{hint}")
    if (out is None) != dry_run:
        raise ValueError(
            "--dry-run writes nothing, leave OUT out" if dry_run else "say which folder to write: OUT"
        )

    from stepwell.keys.report import FitError
    from stepwell.weights.convert import convert as run
    from stepwell.weights.convert import dry_run as compare

    try:
        if out is None:
            report = compare(source, as_=as_)
        else:
            report = run(source, out, as_=as_, overwrite=overwrite, tokenizer=tokenizer)
        complaint = report.complaint()
    except FitError as error:
        report, complaint = error.report, str(error)
    if as_json:
        print_json(report.json(), indent=2)
    else:
        print(report.text())
    if complaint:
        raise ValueError(complaint)
