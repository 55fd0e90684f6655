"""Figures: whether they can be drawn here, and how they are written."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepwell.folders import whole_file

__all__ = ["can_draw", "check_drawing", "plain", "write_figure"]


def can_draw() -> bool:
    """Whether matplotlib is here."""
    return find_spec("matplotlib") is not None


def check_drawing(what: str) -> None:
    """Raises ImportError, one line, where `what` cannot be drawn."""
    if not can_draw():
        raise ImportError(f"drawing {what} needs matplotlib: pip install 'stepwell[eval]'")


def plain(name: str) -> str:
    """For matplotlib, which takes what stands between two dollars for a formula."""
    return name.replace("$", r"\$")


def write_figure(path: Path, figure: Any) -> None:
    """A matplotlib figure as a file that is there whole, or as it was before."""
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=150)
