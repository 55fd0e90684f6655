"""Kinds of fields that recipes and their data share: strict models, and numbers within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = ["Place", "Positive", "Rate", "Share", "Strict"]

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Place = Annotated[Path, AfterValidator(Path.expanduser)]
"""A path, which may begin with ~, the user's home."""


class Strict(BaseModel):
    """Fields that are not declared are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
