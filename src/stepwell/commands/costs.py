"""`stepwell flops` and `stepwell plan`: what a model costs, and which sizes a budget allows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["flops", "plan"]


AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def flops(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A model folder, a recipe, or the name of a published model."),
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Rebuild the PIIP paper's cost tables.")] = False,
    size: Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", help="[default: square]")] = None,
    as_json: AsJson = False,
) -> None:
    """Count what a model costs, as the papers count and as it is."""
    if paper == (config is not None):
        raise ValueError("name a model, or take --paper" if config is None else "--paper takes no model")
    if paper and size is not None:
        raise ValueError("--paper takes no --size: its tables name their own")
    from stepwell.flops.text import parse_size

    pixels = None if size is None else parse_size(size)
    from stepwell.flops import report, tables

    if config is None:
        print(tables.paper_table(as_json=as_json))
        return
    costs = report.report(_subject(config), size=pixels)
    print(report.report_as_json(costs) if as_json else report.report_as_table(costs))


def _subject(config: str) -> Any:
    """What a folder, a recipe or a published name stands for. A folder goes before a recipe of its name, and
    a published model, of which everything is known here, before a shipped recipe.
    """
    from stepwell.flops.report import find_subject, subject_of
    from stepwell.models.published.papers import find_published
    from stepwell.train.shipped import recipe_names

    path = Path(config).expanduser()
    is_recipe = path.is_file() or (config in recipe_names() and find_published(config) is None)
    if path.is_dir() or not is_recipe:
        return find_subject(config)
    from stepwell.train.recipe import load_recipe
    from stepwell.train.tasks import find_task

    recipe = load_recipe(path)
    return subject_of(find_task(recipe.task).configuration(recipe), config)


def plan(
    branches: Annotated[str, typer.Option(metavar="FAMILY:SIZES", help="As clip:L+convnext_clip:B.")],
    budget_gflops: Annotated[float, typer.Option(help="In 1e9 multiply-accumulates, as the papers count.")],
    step: Annotated[int | None, typer.Option(min=1, help="Sizes are its multiples. [default: 112]")] = None,
    aspect: Annotated[str, typer.Option(metavar="WIDTH:HEIGHT", help="Of the images.")] = "1:1",
    slack: Annotated[float, typer.Option(min=0, help="Share of the budget that may be exceeded.")] = 0.01,
    interactions: Annotated[int, typer.Option(min=0, help="Between neighbouring branches.")] = 12,
    smallest: Annotated[int | None, typer.Option(min=1, help="Of branch 1.")] = None,
    windows: Annotated[int | None, typer.Option(min=0, help="0: none. [default: as published]")] = None,
    as_json: AsJson = False,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print as models of chat recipes.")] = False,
) -> None:
    """List the best image sizes for several encoders in a budget."""
    if as_json and as_yaml:
        raise ValueError("--json and --yaml exclude each other")

    from stepwell.flops import plan as planner

    plans = planner.plan(
        branches,
        budget_gflops,
        step=step,
        aspect=aspect,
        slack=slack,
        smallest=smallest,
        interactions=interactions,
        windows=windows,
    )
    if as_json:
        print(planner.plans_as_json(plans))
    else:
        print(planner.plans_as_yaml(plans) if as_yaml else planner.plans_as_table(plans))
