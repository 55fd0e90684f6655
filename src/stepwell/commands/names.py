"""`stepwell list`: the names that other commands take, each with what it is.

Recipes are told without torch, the others without transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Annotated, Any, Literal

import typer

from stepwell.commands.printing import print_json

__all__ = ["list_names"]

Kind = Literal["recipes", "published", "encoders"]


def list_names(
    kind: Annotated[
        Kind | None, typer.Argument(metavar="KIND", help="recipes, published or encoders. [default: all]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List recipes, published models and encoders by name."""
    kinds = {name: _KINDS[name]() for name in (_KINDS if kind is None else [kind])}
    if as_json:
        print_json(kinds, indent=2)
        return
    print("\n\n".join(_text(name, entries) for name, entries in kinds.items()))


def _text(kind: Kind, entries: list[dict[str, Any]]) -> str:
    width = max(len(entry["name"]) for entry in entries)
    lines = [f"  {entry['name']:<{width}}  {entry['about']}" for entry in entries]
    return "\n".join([f"{kind}: {_USES[kind]}", *lines])


def _recipes() -> list[dict[str, Any]]:
    """About each, the first line of its file tells: `# stepwell train NAME     hardware and time`."""
    from stepwell.train.shipped import recipe_names

    folder, entries = resources.files("stepwell") / "recipes", []
    for name in recipe_names():
        first_line = (folder / f"{name}.yaml").read_text("utf-8").partition("\n")[0]
        about = first_line.removeprefix(f"# stepwell train {name}").strip()
        entries.append({"name": name, "about": about})
    return entries


def _published() -> list[dict[str, Any]]:
    from stepwell.models.published.papers import PUBLISHED

    return [
        {
            "name": name,
            "about": published.task if published.released else f"{published.task}, not released",
            "task": published.task,
            "released": published.released,
        }
        for name, published in PUBLISHED.items()
    ]


def _encoders() -> list[dict[str, Any]]:
    from stepwell.encoders.catalogue import ENCODERS, encoder_spec

    entries = []
    for name, entry in ENCODERS.items():
        spec = encoder_spec(name)
        about = f"{entry.family}, {spec.depth} layers, width {spec.dim}, stride {spec.stride}"
        fields = {"family": entry.family, "layers": spec.depth, "width": spec.dim, "stride": spec.stride}
        entries.append({"name": name, "about": about, **fields})
    return entries


_KINDS: dict[Kind, Callable[[], list[dict[str, Any]]]] = {
    "recipes": _recipes,
    "published": _published,
    "encoders": _encoders,
}
_USES: dict[Kind, str] = {
    "recipes": "stepwell train NAME",
    "published": "stepwell flops NAME, stepwell convert SOURCE OUT --as NAME",
    "encoders": "stepwell plan --branches NAME+NAME, and `encoder: NAME` in a recipe; there timm:NAME too",
}
