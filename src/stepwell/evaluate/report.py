"""What a run found: scores with intervals, by type of question, and what it cost; as JSON and Markdown."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any, NamedTuple

from stepwell.evaluate.answers import Answer
from stepwell.evaluate.rows import BadRow, Row
from stepwell.evaluate.scoring import METRICS, RESAMPLES, Scores, counts_of, scores_of
from stepwell.flops.text import aligned
from stepwell.folders import write_whole
from stepwell.structures import Region, Size
from stepwell.version import __version__

__all__ = [
    "Middle",
    "Report",
    "as_interval",
    "as_markdown",
    "build_report",
    "middle_of",
    "report_as_json",
    "report_as_markdown",
    "report_as_table",
    "versions_here",
    "write_report",
]

_PACKAGES = ("torch", "transformers", "pillow")


class Middle(NamedTuple):
    mean: float
    median: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """scores: of all questions, None where none was answered; types: by type of question, where there are
    several. visual_tokens: of an image, or of a close look at a region of it; seconds: of a question; seen:
    (height, width) of each such image, and the region.
    about: the model, the data and the settings.
    """

    metric: str
    rows: int
    scores: Scores | None
    types: dict[str, Scores]
    bad_rows: list[BadRow]
    visual_tokens: Middle | None
    seconds: Middle | None
    seen: list[tuple[Size, Region | None]]
    about: Mapping[str, Any]
    date: str
    versions: Mapping[str, str]


def build_report(
    metric: str,
    answered: Sequence[tuple[Row, Answer]],
    bad_rows: list[BadRow],
    *,
    official: bool,
    about: Mapping[str, Any],
) -> Report:
    rows = [row for row, _ in answered]
    scores, types = None, {}
    if answered:
        counts = counts_of(metric, [answer.prediction for _, answer in answered], rows, official=official)
        images, kinds = [row.names for row in rows], [row.type for row in rows]
        scores = scores_of(metric, counts, images, kinds)
        places = defaultdict(list)
        for place, kind in enumerate(kinds):
            places[kind].append(place)
        if len(places) > 1:
            types = {
                kind: scores_of(metric, counts[at], [images[i] for i in at], [kind] * len(at))
                for kind, at in sorted(places.items())
            }
    tokens_of = {
        (name, (size[0], size[1]), region and (region[0], region[1], region[2], region[3])): tokens
        for _, answer in answered
        for name, tokens, size, region in zip(
            answer.image,
            answer.visual_tokens,
            answer.image_sizes,
            answer.regions or [None] * len(answer.image),
            strict=True,
        )
    }
    return Report(
        metric=metric,
        rows=len(answered) + len(bad_rows),
        scores=scores,
        types=types,
        bad_rows=bad_rows,
        visual_tokens=middle_of(tokens_of.values()),
        seconds=middle_of(answer.seconds for _, answer in answered),
        seen=[(size, region) for _, size, region in tokens_of],
        about=about,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions_here(),
    )


def versions_here() -> dict[str, str]:
    """Of Python, of this package and of those that its numbers come from."""
    own = {"python": python_version(), "stepwell": __version__}  # told also where it is not installed
    return own | {name: version(name) for name in _PACKAGES}


def middle_of(values: Iterable[float]) -> Middle | None:
    """None for no values."""
    numbers = list(values)
    return Middle(statistics.fmean(numbers), statistics.median(numbers)) if numbers else None


def write_report(folder: Path, report: Report) -> None:
    """report.json and report.md."""
    write_whole(folder / "report.json", report_as_json(report))
    write_whole(folder / "report.md", report_as_markdown(report))


def report_as_json(report: Report) -> str:
    """One object; the interval is of 95 %, over resamples of the images."""
    entry = {
        "metric": report.metric,
        "score": report.scores and report.scores.score,
        "interval": report.scores and report.scores.interval,
        "all": report.scores and asdict(report.scores),
        "types": {kind: {"score": scores.score, **asdict(scores)} for kind, scores in report.types.items()},
        "rows": report.rows,
        "bad_rows": [bad._asdict() for bad in report.bad_rows],
        "visual_tokens": report.visual_tokens and report.visual_tokens._asdict(),
        "seconds": report.seconds and report.seconds._asdict(),
        **report.about,
        "date": report.date,
        "versions": report.versions,
    }
    return json.dumps(entry, indent=2)


def report_as_table(report: Report) -> str:
    """A few lines for a screen."""
    heads, rows = _table(report)
    return "\n".join([aligned(heads, rows), *_remarks(report)])


def report_as_markdown(report: Report) -> str:
    heads, rows = _table(report)
    settings = {**report.about["settings"], "batch_size": report.about["batch_size"]}
    commit = report.about["model"]["commit"]
    lines = [
        f"# {METRICS[report.metric].about}",
        "",
        f"- Model: {report.about['model']['name']}{f', commit {commit}' if commit else ''}",
        f"- Data: {report.about['data']}, {report.rows} rows",
        f"- Date: {report.date}",
        f"- Versions: {', '.join(f'{name} {number}' for name, number in report.versions.items())}",
        "",
        *as_markdown(heads, rows),
        "",
        *(f"- {remark}" for remark in _remarks(report)),
        *(f"  - {bad.where}: {bad.reason}" for bad in report.bad_rows),
        "",
        *as_markdown(["setting", "value"], [[name, json.dumps(value)] for name, value in settings.items()]),
    ]
    return "\n".join(lines) + "\n"


def as_markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in [heads, ["---"] * len(heads), *rows]]
    return [f"| {' | '.join(line)} |" for line in lines]


def _table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: all questions, and every type."""
    names = [*METRICS[report.metric].measures]
    heads = ["questions of type", "number", names[0] if names[1:] else report.metric, "95 % interval"]
    every = [("all", report.scores)] if report.scores else []
    rows = [
        [" ".join(kind.split()) or "none", str(scores.questions), f"{scores.score:.4f}", as_interval(scores)]
        + [f"{scores.measures[name]:.4f}" for name in names[1:]]
        for kind, scores in [*every, *report.types.items()]
    ]
    return heads + names[1:], rows


def as_interval(scores: Scores) -> str:
    return "-" if scores.interval is None else "{:.4f} to {:.4f}".format(*scores.interval)


def _remarks(report: Report) -> list[str]:
    lines = []
    if report.scores is not None and report.visual_tokens is not None and report.seconds is not None:
        lines.append(
            f"Intervals: percentiles of {RESAMPLES} resamples of the {report.scores.images} images, each "
            "with all of its questions"
        )
        lines.append(
            f"Visual tokens an image: mean {report.visual_tokens.mean:.1f}, median "
            f"{report.visual_tokens.median:g}; seconds a question: mean {report.seconds.mean:.2f}, median "
            f"{report.seconds.median:.2f}, in batches of {report.about['batch_size']}"
        )
    if report.bad_rows:
        lines.append(f"Bad rows: {len(report.bad_rows)} of {report.rows}, which are in no score")
    return lines
