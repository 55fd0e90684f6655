"""A detector, segmenter or classifier on data with known answers: run in batches, what it finds kept as it
comes, then scored.

from stepwell.evaluate.perception import evaluate_perception
report = evaluate_perception(stepwell.load("my_detector"), "val.json", "out")
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TextIO

from PIL.Image import Image
from transformers import PreTrainedConfig, PreTrainedModel

from stepwell.evaluate.answers import digest_of_networks, open_run
from stepwell.evaluate.beside import draw_best_and_worst
from stepwell.evaluate.perception_data import digest_of
from stepwell.evaluate.perception_report import PerceptionReport, write_perception_report
from stepwell.evaluate.report import middle_of, versions_here
from stepwell.evaluate.rows import BadRow
from stepwell.evaluate.run import Progress
from stepwell.evaluate.tasks import DetectionTask, PerceptionTask, task_of
from stepwell.folders import one_line, write_whole
from stepwell.images.limits import DEFAULT_LIMITS, TILED_LIMITS, ImageLimits
from stepwell.images.open import open_image
from stepwell.models.engine import device_of
from stepwell.models.predicting import batch_size_on
from stepwell.views.tiling import Tiles

__all__ = ["FOUND", "FoundFile", "evaluate_perception", "score_task"]

FOUND = "found.jsonl"


def evaluate_perception(
    model: PreTrainedModel,
    data: str | Path,
    output: str | Path,
    *,
    processor: Any = None,
    images: str | Path | None = None,
    split: str | None = None,
    classes: str | Path | None = None,
    max_detections: int | None = None,
    threshold: float | None = None,
    tiles: Tiles | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    limits: ImageLimits | None = None,
    pictures: int = 0,
    name: str | None = None,
    progress: Progress | None = None,
) -> PerceptionReport:
    """Runs a model over data, scores what it finds, and writes all of it to a folder, with its figures.

    A run that was stopped goes on where it was, also to a larger `limit`. data, images, split, classes: as
    `data_of` takes them (data/entries.py). processor: by default the model's own. max_detections: of an
    image, found and scored; None is the head's own number, 100 for most. threshold: what scores no higher is
    not found; None: all that the head finds. tiles: how images are cut to be looked at; None: they are seen
    whole. batch_size: images, or tiles of one, that go through the network together, by default 1 on a CPU
    and 8 elsewhere. limit: images, from the first. limits: of image files, by default those of `predict`.
    pictures: how many of the best and of the worst are drawn beside their truth. name: of the model, in the
    report.
    Images that cannot be read are in `bad_images`, and in no score. Raises ValueError for data that do not
    suit the model or its classes, and for a folder that holds a run with other settings; ImportError for
    libraries that are missing.
    """
    task = task_of(
        model,
        processor or model.image_processor(),
        Path(data),
        images=None if images is None else Path(images),
        split=split,
        classes=None if classes is None else Path(classes),
        threshold=threshold,
        max_detections=max_detections,
        tiles=tiles,
    )
    return score_task(
        task,
        output,
        data=data,
        split=split,
        batch_size=batch_size,
        limit=limit,
        limits=limits,
        pictures=pictures,
        name=name,
        progress=progress,
    )


def score_task(
    task: PerceptionTask[Any],
    output: str | Path,
    *,
    data: str | Path,
    split: str | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    limits: ImageLimits | None = None,
    pictures: int = 0,
    name: str | None = None,
    progress: Progress | None = None,
) -> PerceptionReport:
    """As `evaluate_perception`, a model on data that are open already; data: where they come from."""
    model = task.network
    batch_size = batch_size_on(device_of(model)) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    task.tiles_together = batch_size
    limits = limits or (DEFAULT_LIMITS if task.tiles is None else TILED_LIMITS)
    task.source.limits = limits
    entries = range(len(task.source))[:limit]
    settings = _settings_of(task)
    with FoundFile(Path(output), settings) as file:
        step = batch_size if task.tiles is None else 1  # images that are open at a time
        bad = _find(task, entries, file, step, limits, progress)
    kept = {entry: file.found[entry] for entry in entries if entry in file.found}
    faults: list[tuple[str, str]] = getattr(task.source, "faults", [])
    report = PerceptionReport(
        task=task.name,
        result=task.result({entry: found for entry, (found, _) in kept.items()}),
        classes=task.classes,
        images=len(entries),
        bad_images=sorted(bad),
        remarks=task.remarks(),
        faults=[f"{where}: {reason}" for where, reason in faults],
        seconds=middle_of(seconds for _, seconds in kept.values()),
        about={
            "model": {
                "name": name or model.name_or_path,
                "commit": getattr(model.config, "_commit_hash", None),
            },
            "data": str(data),
            "split": split or getattr(task.source, "split", None),
            "limit": limit,
            "batch_size": batch_size,
            "settings": settings,
        },
        versions=versions_here(),
    )
    write_perception_report(Path(output), report)
    if pictures:
        draw_best_and_worst(
            Path(output), task, {entry: found for entry, (found, _) in kept.items()}, pictures
        )
    return report


class FoundFile:
    """What a model found in images, by entry of the data, and the seconds it took; a context in which more is
    added. The folder holds one run: settings.json, and a line of found.jsonl for every image.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Raises ValueError where the folder holds a run with other settings."""
        open_run(folder, settings)
        self.path = folder / FOUND
        self.found: dict[int, tuple[Any, float]] = {}
        for line in self.path.read_text("utf-8", errors="replace").split("\n") if self.path.is_file() else []:
            try:
                fields = json.loads(line)
                self.found[int(fields["entry"])] = fields["found"], float(fields["seconds"])
            except (ValueError, TypeError, KeyError):  # cut off when the run was killed: it is done again
                continue
        write_whole(self.path, "".join(_line(entry, *found) for entry, found in self.found.items()))

    def __enter__(self) -> Self:
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, entry: int, found: Any, seconds: float) -> None:
        """On the disk when this returns, as far as a killed process goes."""
        self._file.write(_line(entry, found, seconds))
        self._file.flush()
        self.found[entry] = found, seconds


def _line(entry: int, found: Any, seconds: float) -> str:
    return json.dumps({"entry": entry, "found": found, "seconds": round(seconds, 4)}) + "\n"


def _settings_of(task: PerceptionTask[Any]) -> dict[str, Any]:
    """What is found hangs on these."""
    parameter = next(task.network.parameters())
    settings = {
        "task": task.name,
        "data": digest_of(task.source),
        "weights": digest_of_networks([task.network]),
        "config": _digest(_without_place(task.network.config)),
        "processor": _digest(task.processor.to_json_string()),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
    }
    if isinstance(task, DetectionTask):
        settings |= {"threshold": task.threshold, "max_detections": task.max_detections}
    if task.tiles is not None:
        settings["tiles"] = asdict(task.tiles)
    if task.network.runtime is not None:
        settings["runtime"] = task.network.runtime
    return settings


def _without_place(config: PreTrainedConfig) -> str:
    """A model that has been moved is the same."""
    fields = json.loads(config.to_json_string(use_diff=False))
    fields.pop("_name_or_path", None)
    return json.dumps(fields)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _find(
    task: PerceptionTask[Any],
    entries: Sequence[int],
    file: FoundFile,
    batch_size: int,
    limits: ImageLimits,
    progress: Progress | None,
) -> list[BadRow]:
    """Runs what is not yet found; returns the images that cannot be read."""
    pending = [entry for entry in entries if entry not in file.found]
    bad: list[BadRow] = []
    for start in range(0, len(pending), batch_size):
        opened: dict[int, Image] = {}
        for entry in pending[start : start + batch_size]:
            try:
                opened[entry] = open_image(task.image(entry), limits=limits)
            except (ValueError, OSError) as error:
                bad.append(BadRow(entry, task.source.where(entry), one_line(error)))
        if opened:
            began = time.perf_counter()
            found = task.found([*opened], [*opened.values()])
            seconds = (time.perf_counter() - began) / len(opened)
            for entry, record in zip(opened, found, strict=True):
                file.add(entry, record, seconds)
        if progress is not None:
            progress(len(entries) - len(pending) + min(start + batch_size, len(pending)), len(entries))
    return bad
