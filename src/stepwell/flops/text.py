"""Tables in plain text, columns aligned and numbers to the right; and sizes as a person writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["aligned", "number", "parse_size"]


NUMBER = re.compile(r"[-+]?[\d.,]+%?|-|")


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns two spaces apart; a column of numbers, or "-" for none, is set to the right."""
    columns = list(zip(heads, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(map(NUMBER.fullmatch, column[1:])) for column in columns]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def number(value: float | None, digits: int) -> str:
    """ "-" for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def parse_size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT -> (height, width)."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"a size reads WIDTHxHEIGHT, such as 1024x768, not {text}")
    return int(height), int(width)
