"""`stepwell compare`: systems, trained by recipes or there already, on the same questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepwell.commands.loading import MaxNewTokens, check_model, quieten, short_name
from stepwell.commands.printing import refuse_bad, show_progress
from stepwell.commands.question_options import Images, MetricName, NoRegion, Suffix
from stepwell.commands.train import check_training
from stepwell.folders import find_folder

if TYPE_CHECKING:
    from stepwell.evaluate.compare import System

__all__ = ["compare"]

ANSWERING = ("chat", "reader")
"""Tasks whose models answer questions."""


def compare(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...", help="Recipes, by name or as files; or models, as folders or reader_tiny."
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="FILE",
            help='Lines of {"image", "question", "answers", "type"}.',
            dir_okay=False,
        ),
    ],
    metric: Annotated[MetricName, typer.Option(help="How answers are scored.")] = "reading",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", file_okay=False, help="[default: comparisons/DATA-METRIC]"),
    ] = None,
    images: Images = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Override a field of every recipe; may be repeated."),
    ] = None,
    suffix: Suffix = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", min=1, help="Together.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows, from the first. [default: all]")] = None,
    no_region: NoRegion = False,
    device: Annotated[
        str | None, typer.Option(help="To ask on: cpu, cuda, mps. Training takes a GPU where there is one.")
    ] = None,
) -> None:
    """Train systems by their recipes, ask them all the same, and set scores beside costs in a table and a
    plot; run again, it goes on where it stopped.
    """
    if not data.is_file():
        raise ValueError(f"no such file: {data}")
    compared = [_system(text, tuple(overrides or ())) for text in systems]
    for system in compared:
        check_model(system.model, device)
    if metric == "cider":
        from stepwell.evaluate.captions import check_cider

        check_cider()
    train: Callable[..., Path] | None = None
    if overrides and not any(system.recipe for system in compared):
        raise ValueError("--set is of recipes, and models alone are compared; leave it out")
    if any(system.recipe for system in compared):
        check_training()
        from stepwell.train import run as training

        train = training.train
    quieten()

    from stepwell.evaluate.compare import as_tables
    from stepwell.evaluate.compare import compare as run
    from stepwell.evaluate.curve import draw_compared
    from stepwell.evaluate.drawing import check_drawing
    from stepwell.weights.load import load

    check_drawing("a comparison")
    folder = output or Path("comparisons") / f"{data.stem}-{metric}"
    found = run(
        compared,
        data,
        metric=metric,
        output=folder,
        load=load,
        train=train,
        device=device,
        images=images,
        suffix=suffix,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        limit=limit,
        whole_images=no_region,
        progress=show_progress,
    )
    draw_compared(folder / "compare.png", found, metric=metric)
    print(f"{as_tables(metric, found)}\n{folder / 'compare.md'}")
    bad = [each.name for each in found if each.report.bad_rows]
    if len(bad) > 1:
        raise ValueError(
            f"rows are bad and in no score of {', '.join(bad)}; {folder / 'compare.md'} counts them"
        )
    for each in found:
        report = each.report
        refuse_bad("rows", report.bad_rows, report.rows, folder / each.name / "report.md")


def _system(text: str, overrides: tuple[str, ...]) -> System:
    """Raises ValueError for what is neither the recipe of an assistant nor a model."""
    from stepwell.evaluate.compare import System
    from stepwell.train.recipe import load_recipe
    from stepwell.train.shipped import is_recipe

    if not Path(text).is_file() and find_folder(text) is not None:  # reader_tiny is a model and a recipe
        return System(short_name(text), model=text)
    if not is_recipe(text):
        raise ValueError(f"no recipe and no model folder: {text}; `stepwell list recipes` names recipes")
    recipe = load_recipe(text, overrides)
    if recipe.task not in ANSWERING:
        raise ValueError(f"recipe {text} is of the task {recipe.task}, whose models answer no questions")
    return System(recipe.name, recipe=text, overrides=overrides)
