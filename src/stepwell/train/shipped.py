"""Which recipes ship with the package: told without torch, which train/recipe.py imports."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

__all__ = ["is_recipe", "recipe_names"]


def recipe_names() -> list[str]:
    """Their names, as `stepwell train` takes them."""
    files = (entry.name for entry in (resources.files("stepwell") / "recipes").iterdir())
    return sorted(file.removesuffix(".yaml") for file in files if file.endswith(".yaml"))


def is_recipe(text: str) -> bool:
    """Whether it is the name of one of them, or a file."""
    return text in recipe_names() or Path(text).is_file()
