"""What a detector, segmenter or classifier scored: as JSON, as Markdown, as a few lines, and as figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from stepwell.evaluate.charts import draw_confusion, draw_precision
from stepwell.evaluate.class_names import ClassMatch
from stepwell.evaluate.classification import ClassificationResult
from stepwell.evaluate.drawing import can_draw
from stepwell.evaluate.kinds import Task
from stepwell.evaluate.report import Middle, as_markdown
from stepwell.evaluate.rows import BadRow
from stepwell.evaluate.scoring import RESAMPLES
from stepwell.evaluate.segmentation import SegmentationResult
from stepwell.evaluate.tasks import Result
from stepwell.flops.text import aligned
from stepwell.folders import write_whole

__all__ = [
    "PerceptionReport",
    "perception_as_json",
    "perception_as_markdown",
    "perception_as_table",
    "write_perception_report",
]

_OTHERS = "(no class of the data)"
_MOST_FAULTS = 20


@dataclass(frozen=True, kw_only=True)
class PerceptionReport:
    """images: looked at, those that could not be read among them. faults: of the data, which are left out.
    seconds: of an image. about: the model, the data and the settings.
    """

    task: Task
    result: Result
    classes: ClassMatch
    images: int
    bad_images: list[BadRow]
    remarks: list[str]
    faults: list[str]
    seconds: Middle | None
    about: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


class _Table(NamedTuple):
    heads: list[str]
    rows: list[list[str]]


def write_perception_report(folder: Path, report: PerceptionReport) -> None:
    """scores.json and report.md; and, where matplotlib is, pr_curve.png or confusion.png."""
    write_whole(folder / "scores.json", perception_as_json(report))
    write_whole(folder / "report.md", perception_as_markdown(report))
    if not can_draw():
        return
    result, rows = report.result, report.classes.names
    if isinstance(result, Mapping):
        draw_precision(folder / "pr_curve.png", {kind: one.precision for kind, one in result.items()})
    else:
        columns = [*rows, _OTHERS][: result.confusion.shape[1]]
        draw_confusion(folder / "confusion.png", result.confusion, rows, columns)


def perception_as_json(report: PerceptionReport) -> str:
    """One object. Scores are 0 to 1, null where there is nothing to score; intervals are of 95 %, over
    resamples of the images.
    """
    result = report.result
    if isinstance(result, Mapping):
        scores: dict[str, Any] = {kind: asdict(one) for kind, one in result.items()}
    else:
        scores = asdict(result) | {"confusion": result.confusion.tolist()}
    entry = {
        "task": report.task,
        "scores": scores,
        "images": report.images,
        "bad_images": [bad._asdict() for bad in report.bad_images],
        "remarks": report.remarks,
        "faults": report.faults,
        "seconds": report.seconds and report.seconds._asdict(),
        **report.about,
        "date": report.date,
        "versions": report.versions,
    }
    return json.dumps(entry, indent=2)


def perception_as_table(report: PerceptionReport) -> str:
    """A few lines for a screen."""
    return "\n".join([aligned(*_overall(report.result)), *_remarks(report)])


def perception_as_markdown(report: PerceptionReport) -> str:
    settings = {**report.about["settings"], "batch_size": report.about["batch_size"]}
    commit, split = report.about["model"]["commit"], report.about["split"]
    lines = [
        f"# Scores of {report.task}",
        "",
        f"- Model: {report.about['model']['name']}{f', commit {commit}' if commit else ''}",
        f"- Data: {report.about['data']}{f', split {split}' if split else ''}, {report.images} images",
        f"- Date: {report.date}",
        f"- Versions: {', '.join(f'{name} {number}' for name, number in report.versions.items())}",
        "",
        *as_markdown(*_overall(report.result)),
        "",
        *as_markdown(*_by_class(report.result)),
        "",
        *(f"- {remark}" for remark in _remarks(report)),
        *(f"  - {bad.where}: {bad.reason}" for bad in report.bad_images),
        *(f"- Left out of the data: {fault}" for fault in report.faults[:_MOST_FAULTS]),
        "",
        *as_markdown(["setting", "value"], [[name, json.dumps(value)] for name, value in settings.items()]),
    ]
    return "\n".join(lines) + "\n"


def _overall(result: Result) -> _Table:
    if isinstance(result, Mapping):
        heads = ["of", "AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AR"]
        return _Table(
            heads,
            [
                [kind, *(_number(getattr(one, name.lower().replace(" ", "_"))) for name in heads[1:])]
                for kind, one in result.items()
            ],
        )
    heads = ["score", "value", "95 % interval"]
    if isinstance(result, SegmentationResult):
        return _Table(
            heads,
            [
                ["mean IoU", _number(result.mean_iou), _interval(result.interval)],
                ["mean accuracy", _number(result.mean_accuracy), "-"],
                ["pixel accuracy", _number(result.pixel_accuracy), "-"],
            ],
        )
    of_top1, of_top_k = result.intervals or (None, None)
    return _Table(
        heads,
        [
            ["top-1", _number(result.top1), _interval(of_top1)],
            [f"top-{result.k}", _number(result.top_k), _interval(of_top_k)],
        ],
    )


def _by_class(result: Result) -> _Table:
    if isinstance(result, Mapping):
        kinds = [*result]
        heads = ["class", "objects", *(f"{name} of {kind}" for kind in kinds for name in ("AP", "AP50"))]
        rows = []
        for name, one in result["boxes"].classes.items():
            of_kinds = [result[kind].classes[name] for kind in kinds]
            scores = [_number(value) for of_kind in of_kinds for value in (of_kind.ap, of_kind.ap50)]
            rows.append([name, str(one.objects), *scores])
        return _Table(heads, rows)
    if isinstance(result, SegmentationResult):
        return _Table(
            ["class", "pixels", "IoU", "accuracy"],
            [
                [name, str(one.pixels), _number(one.iou), _number(one.accuracy)]
                for name, one in result.classes.items()
            ],
        )
    return _Table(
        ["class", "images", "top-1"],
        [[name, str(one.images), _number(one.top1)] for name, one in result.classes.items()],
    )


def _remarks(report: PerceptionReport) -> list[str]:
    lines, result = [*report.remarks], report.result
    if not isinstance(result, Mapping):
        lines.append(f"Intervals: percentiles of {RESAMPLES} resamples of the {result.images} images")
    if isinstance(result, ClassificationResult) and result.k < 5:
        lines.append(f"There are {result.k} classes, so top-{result.k} stands for top-5")
    if report.seconds is not None:
        lines.append(
            f"Seconds an image: mean {report.seconds.mean:.2f}, median {report.seconds.median:.2f}, in "
            f"batches of {report.about['batch_size']}"
        )
    if not can_draw():
        lines.append("No figures, which need matplotlib: pip install 'stepwell[eval]'")
    if report.bad_images:
        lines.append(f"Bad images: {len(report.bad_images)} of {report.images}, which are in no score")
    if report.faults:
        lines.append(f"Faults of the data: {len(report.faults)}, which are left out")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else "{:.4f} to {:.4f}".format(*bounds)
