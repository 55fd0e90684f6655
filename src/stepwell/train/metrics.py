"""What a stage measured, as a table beside its weights: metrics.csv."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

__all__ = ["METRICS", "MetricsFile"]

METRICS = "metrics.csv"
_HEADER = ("step", "epoch", "metric", "value")
_OF_THE_RUN = ("epoch", "step", "total_flos", "train_")


class MetricsFile(TrainerCallback):
    """A row for every number that is logged: step, epoch, name, value; eval_ is of the validation data.

    A stage that goes on behind a checkpoint leaves out what was written behind it before.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        rows: list[list[str]] = []
        if self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                whole = [row for row in csv.reader(file) if len(row) == len(_HEADER) and row[0].isdecimal()]
            rows = [row for row in whole if int(row[0]) <= state.global_step]
        part = self.path.with_suffix(".part")
        with part.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([_HEADER, *rows])
        part.replace(self.path)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        epoch = round(float(logs.get("epoch", state.epoch or 0)), 4)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(
                (state.global_step, epoch, name, value)
                for name, value in logs.items()
                if isinstance(value, int | float) and not name.startswith(_OF_THE_RUN)
            )
