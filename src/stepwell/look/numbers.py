"""Numbers of a figure as JSON: arrays as lists, with as many digits as mean something."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from stepwell.data.files import read_json
from stepwell.folders import write_whole

__all__ = ["check_numbers", "listed", "write_numbers"]

DIGITS = 5


def listed(values: Any) -> Any:
    """A tensor, a sequence or a number -> lists of numbers of five digits; None where there is no number."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    if isinstance(values, list | tuple):
        return [listed(value) for value in values]
    if isinstance(values, float):
        return float(f"{values:.{DIGITS}g}") if math.isfinite(values) else None
    return values


def check_numbers(figure: Path) -> None:
    """Raises ValueError where `write_numbers` would write over a file that it has not written."""
    path = figure.with_suffix(".json")
    if not path.exists():
        return
    try:
        found = read_json(path)
    except (ValueError, OSError):
        found = None
    if not isinstance(found, dict) or not {"what", "models"} <= found.keys():
        raise ValueError(f"the numbers of {figure} would be written over {path}; give it another name")


def write_numbers(figure: Path, numbers: dict[str, Any]) -> Path:
    """Beside a figure, under its name with another ending; there whole, or as it was before."""
    path = figure.with_suffix(".json")
    write_whole(path, json.dumps(numbers, ensure_ascii=False) + "\n")
    return path
