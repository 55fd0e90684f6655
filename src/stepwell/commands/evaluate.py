"""`stepwell evaluate`: a model's answers to a file of questions, scored, at one size or at several; or what
it finds in images for which that is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from stepwell.commands.data_options import ClassesFile, Split
from stepwell.commands.graph_options import Int8, OnRuntime, check_runtime
from stepwell.commands.limits import MaxAspect, MaxBytes, MaxPixels, MaxSeconds, MaxSide, image_limits
from stepwell.commands.loading import (
    Device,
    Dtype,
    MaxNewTokens,
    Revision,
    check_model,
    load_assistant,
    quieten,
)
from stepwell.commands.perception import answers_questions, score_perception
from stepwell.commands.printing import refuse_bad, show_progress
from stepwell.commands.question_options import Images, MetricName, NoRegion, Suffix
from stepwell.commands.tile_options import InTiles, TileOverlap, TileScale, TileSize, tiles_of

__all__ = ["evaluate"]

_OF_QUESTIONS = ("sizes", "suffix", "max_new_tokens", "official", "no_region")
_OF_IMAGES = (
    *("split", "classes", "max_detections", "threshold", "pictures"),
    *("tiles", "tile_size", "tile_overlap", "tile_scale", "runtime", "int8"),
)


def evaluate(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, a hub name, or reader_tiny.")
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help='Lines of {"image", "question", "answers", "type"}; or images, as `stepwell data` takes.',
        ),
    ],
    metric: Annotated[MetricName | None, typer.Option(help="How answers to questions are scored.")] = None,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="336,672", help="Long sides of the largest view, each evaluated and drawn."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            file_okay=False,
            help="[default: evaluations/MODEL/DATA-METRIC, or -TASK, beneath here]",
        ),
    ] = None,
    images: Images = None,
    suffix: Suffix = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "--batch",
            min=1,
            help="Together. [default: 8 questions; 1 image or tile on a CPU, 8 elsewhere]",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows or images, from the first. [default: all]")
    ] = None,
    official: Annotated[
        bool, typer.Option("--official", help="Score as the official code does, with its bugs.")
    ] = False,
    no_region: NoRegion = False,
    classes: ClassesFile = None,
    split: Split = None,
    max_detections: Annotated[
        int | None, typer.Option(min=1, help="Of an image, for detectors. [default: the model's own number]")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="What scores no higher is not found, for detectors.")
    ] = None,
    tiles: InTiles = False,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    tile_scale: TileScale = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="So many of the best and of the worst are drawn beside their truth.")
    ] = 0,
    runtime: OnRuntime = None,
    int8: Int8 = False,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    max_pixels: MaxPixels = None,
    max_side: MaxSide = None,
    max_aspect: MaxAspect = None,
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
) -> None:
    """Score a model on questions, or images, with known answers; run again, it goes on where it stopped."""
    if not data.exists():
        raise ValueError(f"no such file: {data}")
    asks = answers_questions(model, metric)
    _refuse_strange(context, model, _OF_IMAGES if asks else _OF_QUESTIONS)
    check_model(model, device)
    check_runtime(runtime, device, dtype, int8=int8)
    how = tiles_of(tiles, size=tile_size, overlap=tile_overlap, scale=tile_scale)
    limits = image_limits(
        for_tiles=tiles,
        max_pixels=max_pixels,
        max_side=max_side,
        max_aspect=max_aspect,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
    )
    folder = Path("evaluations") / re.sub(r"[^\w.-]+", "--", model)
    if not asks:
        score_perception(
            model,
            data,
            output,
            folder,
            revision=revision,
            device=device,
            dtype=dtype,
            runtime=runtime,
            int8=int8,
            limits=limits,
            images=images,
            split=split,
            classes=classes,
            max_detections=max_detections,
            threshold=threshold,
            tiles=how,
            pictures=pictures,
            batch_size=batch_size,
            limit=limit,
        )
        return
    if not data.is_file():
        raise ValueError(f"{data} is a folder, and questions are a file")
    sides = None if sizes is None else _sizes(sizes)
    folder = output or folder / f"{data.stem}-{metric}"
    options: dict[str, Any] = {
        "metric": metric,
        "output": folder,
        "images": images,
        "suffix": suffix,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size or 8,
        "limit": limit,
        "official": official,
        "whole_images": no_region,
        "name": model,
        "progress": show_progress,
    }
    if sides is not None:
        load = partial(_load, model, device=device, dtype=dtype, revision=revision, limits=limits)
        _sweep(load, data, sides, options)
        return
    assistant = load_assistant(model, revision, device, dtype, limits)

    from stepwell.evaluate.report import report_as_table
    from stepwell.evaluate.run import evaluate

    report = evaluate(assistant, data, **options)
    print(f"{report_as_table(report)}\n{folder / 'report.md'}")
    refuse_bad("rows", report.bad_rows, report.rows, folder / "report.md")


def _refuse_strange(context: typer.Context, model: str, names: Sequence[str]) -> None:
    """Raises ValueError for an option that a model of this kind would not look at."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} says nothing about {model}; leave it out")


def _sizes(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words) or len(set(words)) < len(words):
        raise ValueError(
            f"--sizes are pixels with commas between them, each once, such as 336,672, got {text}"
        )
    return [int(word) for word in words]


def _load(model: str, **options: Any) -> Any:
    from stepwell.models.ask import as_assistant
    from stepwell.weights.load import load

    return as_assistant(load(model, **options), model)


def _sweep(load: Callable[..., Any], data: Path, sizes: list[int], options: dict[str, Any]) -> None:
    quieten()
    from stepwell.evaluate.curve import draw_sweep
    from stepwell.evaluate.drawing import check_drawing
    from stepwell.evaluate.sweep import sweep, sweep_as_table

    check_drawing("a sweep")
    points = sweep(load, data, sizes, **options)
    folder: Path = options["output"]
    print(f"{sweep_as_table(points)}\n{folder / 'sweep.md'}")
    draw_sweep(folder / "sweep.png", points, name=options["metric"])
    for point in points:
        report = point.report
        refuse_bad("rows", report.bad_rows, report.rows, folder / str(point.size) / "report.md")
