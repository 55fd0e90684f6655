"""`stepwell train`: a recipe, by its name or as a file."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

__all__ = ["check_training", "train"]


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Train nothing; print parts, rates, data, tokens, memory and the first sample."
        ),
    ] = False,
) -> None:
    """Train a model from a recipe."""
    _check_recipe(recipe)
    check_training()
    if dry_run:
        from stepwell.train.dry_run import dry_run as told

        print(told(recipe, overrides or []))
        return

    from stepwell.train.run import train as run

    print(f"trained: {run(recipe, overrides or [])}")


def check_training() -> None:
    """Raises ImportError where nothing can be trained."""
    if find_spec("accelerate") is None:
        raise ImportError("training needs accelerate: pip install 'stepwell[train]'")


def _check_recipe(recipe: str) -> None:
    from stepwell.train.shipped import is_recipe, recipe_names

    if not is_recipe(recipe):
        raise ValueError(f"no recipe {recipe}: not a file, and not one of {', '.join(recipe_names())}")
