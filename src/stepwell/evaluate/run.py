"""A model on a file of questions: asked in batches, its answers kept as they come, then scored.

from stepwell.evaluate.run import evaluate
report = evaluate(stepwell.load(), "questions.jsonl", metric="anls", output="out")
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepwell.evaluate.answers import Answer, AnswersFile, digest_of_file, digest_of_weights
from stepwell.evaluate.captions import check_cider
from stepwell.evaluate.choices import with_choices
from stepwell.evaluate.report import Report, build_report, write_report
from stepwell.evaluate.rows import BadRow, Row, read_rows
from stepwell.evaluate.scoring import METRICS, check_row
from stepwell.folders import one_line
from stepwell.models.ask import Assistant
from stepwell.models.ask_file import QuestionLine, answer_lines

__all__ = ["SUFFIXES", "Progress", "evaluate"]

SUFFIXES: Mapping[str, str] = {
    "SHORT": "Answer the question using a single word or phrase.",
    "LETTER": "Answer with the option's letter from the given choices directly.",
}
"""LLaVA-1.5's, by name."""

Progress = Callable[[int, int], object]
"""Called with the number of rows that are done, and of all."""


def evaluate(
    model: Assistant,
    data: str | Path,
    *,
    metric: str,
    output: str | Path,
    images: str | Path | None = None,
    suffix: str | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    limit: int | None = None,
    official: bool = False,
    whole_images: bool = False,
    name: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Asks every row of a file (evaluate/rows.py), scores the answers, and writes all of it to a folder.

    A run that was stopped goes on where it was, also to a larger `limit`. images: the folder that image paths
    start from, by default the file's or the one above. suffix: a line behind every question, or the name of
    one of SUFFIXES. official: score as the official code does, with its bugs. whole_images: nothing is looked
    at closely, whatever region a row has or tells. name: of the model, in the report. Rows that are bad are
    in `bad_rows`, and in no score. Raises ValueError for a metric that is none, and for a folder that holds a
    run with other settings.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose from {', '.join(METRICS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if metric == "cider":
        check_cider()
    data, suffix = Path(data), SUFFIXES.get(suffix or "", suffix)
    rows, bad = _sorted_out(read_rows(data, images=images, limit=limit), metric, official)
    if whole_images:
        model = copy(model)
        model.boxes_are_regions = False
        rows = [replace(row, regions=()) for row in rows]
    settings = {
        "metric": metric,
        "official": official,
        "whole_images": whole_images,
        "suffix": suffix,
        "max_new_tokens": max_new_tokens,
        "data": digest_of_file(data),
        "images": str(Path(images or data.parent).absolute()),
        **_settings_of(model),
    }
    with AnswersFile(Path(output), settings) as file:
        bad += _ask(model, rows, file, suffix, max_new_tokens, batch_size, progress)
    report = build_report(
        metric,
        [(row, file.answers[row.entry]) for row in rows if row.entry in file.answers],
        sorted(bad),
        official=official,
        about={
            "model": {"name": name or repr(model), "commit": model.commit},
            "data": str(data),
            "limit": limit,
            "batch_size": batch_size,
            "settings": settings,
        },
    )
    write_report(Path(output), report)
    return report


def _sorted_out(read: Sequence[Row | BadRow], metric: str, official: bool) -> tuple[list[Row], list[BadRow]]:
    rows: list[Row] = []
    bad: list[BadRow] = []
    for row in read:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            check_row(metric, row, official=official)
            rows.append(row)
        except (ValueError, ZeroDivisionError) as error:
            bad.append(BadRow(row.entry, row.where, one_line(error)))
    return rows, bad


def _settings_of(model: Assistant) -> dict[str, Any]:
    """What answers hang on."""
    parameter = next(model.engine.networks[0].parameters())
    return {
        "weights": digest_of_weights(model),
        "geometry": str(model.engine.geometry),
        "template": hashlib.sha256(model.engine.chat_template.encode()).hexdigest()[:16],
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "boxes_are_regions": model.boxes_are_regions,
    }


def _ask(
    model: Assistant,
    rows: Sequence[Row],
    file: AnswersFile,
    suffix: str | None,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None,
) -> list[BadRow]:
    """Asks what has no answer yet; returns the rows that could not be asked."""
    pending = [row for row in rows if row.entry not in file.answers]
    done = len(rows) - len(pending)
    bad: list[BadRow] = []
    for start in range(0, len(pending), batch_size):
        batch = pending[start : start + batch_size]
        lines = [
            QuestionLine({"question": question}, [(row.images, question)], row.regions)
            for row, question in ((row, _question(row, suffix)) for row in batch)
        ]
        began = time.perf_counter()
        answered = list(answer_lines(model, lines, max_new_tokens=max_new_tokens, batch_size=batch_size))
        seconds = (time.perf_counter() - began) / len(batch)
        for row, line, fields in zip(batch, lines, answered, strict=True):
            if "error" in fields:
                bad.append(BadRow(row.entry, row.where, fields["error"]))
            else:
                file.add(_answer(model, row, line, fields["answer"], seconds))
        if progress is not None:
            progress(done + start + len(batch), len(rows))
    return bad


def _question(row: Row, suffix: str | None) -> str:
    question = with_choices(row.question, row.choices)
    return f"{question}\n{suffix}" if suffix else question


def _answer(model: Assistant, row: Row, line: QuestionLine, prediction: str, seconds: float) -> Answer:
    (question,) = line.asked_of(model)
    layouts = model.layouts(question)
    return Answer(
        entry=row.entry,
        question_id=row.question_id,
        image=list(row.names),
        question=question[1],
        answers=list(row.answers),
        prediction=prediction,
        seconds=round(seconds, 4),
        visual_tokens=[layout.num_visual for layout in layouts],
        image_sizes=[layout.image_size for layout in layouts],
        regions=[layout.region for layout in layouts],
    )
