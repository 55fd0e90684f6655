"""`stepwell data`: what a data set holds, what is wrong with it, and a sheet of samples. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from stepwell.commands.data_options import ClassesFile, Split
from stepwell.commands.limits import MaxAspect, MaxBytes, MaxPixels, MaxSeconds, MaxSide, image_limits
from stepwell.commands.printing import print_json, show_progress

__all__ = ["data"]

_TOLD = 10  # faults; --json has them all


def data(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A COCO file, a YOLO .yaml, a list of images and label maps, or a folder.",
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="Of a COCO file's images, or those of label maps. [default: looked for]",
        ),
    ] = None,
    split: Split = None,
    classes: ClassesFile = None,
    show: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Draw samples with their boxes, masks or maps."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of the drawing.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    max_pixels: MaxPixels = None,
    max_side: MaxSide = None,
    max_aspect: MaxAspect = None,
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
) -> None:
    """Look through a data set before a training: pictures, classes, sizes, and what is left out."""
    from stepwell.data.entries import data_of
    from stepwell.data.summary import summary

    opened = data_of(source, images=images, split=split, classes=classes).open()
    opened.limits = image_limits(
        max_pixels=max_pixels,
        max_side=max_side,
        max_aspect=max_aspect,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
    )
    if show is not None:
        from stepwell.images.draw import check_target

        check_target(show, _pictures(opened) if show.exists() else ())
    report = summary(opened, progress=show_progress)
    if as_json:
        print_json(report.fields(), indent=2)
    else:
        print(report.text(), flush=True)
    bad = report.faults
    if show is not None:
        from stepwell.data.sheet import draw_samples
        from stepwell.images.draw import save_whole

        sheet = draw_samples(opened, samples=samples, seed=seed)
        save_whole(sheet.image, show)
        known = {where for where, _ in bad}
        bad = (*bad, *(fault for fault in sheet.bad if fault[0] not in known))
    _tell(bad)


def _pictures(opened: Any) -> Iterator[Path]:
    samples = (opened[i] for i in range(len(opened)))
    yield from (sample.path if hasattr(sample, "path") else sample.image for sample in samples)


def _tell(faults: Sequence[tuple[str, str]]) -> None:
    for where, reason in faults[:_TOLD]:
        print(f"left out, {where}: {reason}", file=sys.stderr)
    if len(faults) > _TOLD:
        print(f"and {len(faults) - _TOLD:,} more", file=sys.stderr)
