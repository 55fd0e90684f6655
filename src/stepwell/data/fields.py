"""Kinds of fields that recipes and their data share: strict models, and numbers within bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Positive", "Rate", "Share", "Strict"]

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]


class Strict(BaseModel):
    """Fields that are not declared are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
