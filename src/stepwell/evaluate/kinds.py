"""Models that are scored on what they find in images, by what their folders say. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

__all__ = ["TASKS", "Task"]

Task = Literal["detection", "segmentation", "classification"]

TASKS: Mapping[str, Task] = {
    "stepwell_detector": "detection",
    "stepwell_segmenter": "segmentation",
    "stepwell_classifier": "classification",
}
"""By the model_type of a folder's config.json."""
