"""One model at several resolutions: score against size and against what its vision costs.

INF-LLaVA (arXiv 2407.16198), Figure 8, draws benchmarks that way. Each size is a run of its own
(evaluate/run.py) in a folder that is named after it, so that a sweep that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepwell.evaluate.costs import vision_costs, vision_of
from stepwell.evaluate.report import Report, as_interval, as_markdown
from stepwell.evaluate.run import evaluate
from stepwell.evaluate.scoring import METRICS
from stepwell.flops.text import aligned, number
from stepwell.folders import write_whole
from stepwell.models.ask import Assistant
from stepwell.models.vision import VisionConfig

__all__ = ["Point", "sweep", "sweep_as_table"]

Load = Callable[..., Assistant]
"""`stepwell.load` of one model: takes vision={"sizes": [...]}."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size. sizes: sides of the views; paper_gflops: multiply-accumulates in 1e9, as the papers count;
    true_gflops: all operations of the vision system. Both are means over the images.
    """

    size: int
    sizes: list[int]
    report: Report
    paper_gflops: float | None
    true_gflops: float | None


def sweep(
    load: Load, data: str | Path, sizes: Sequence[int], *, metric: str, output: str | Path, **options: Any
) -> list[Point]:
    """`evaluate` with these options at every size, the long side of the largest view; then sweep.json and
    sweep.md. evaluate/curve.py draws the points.

    The views of a pyramid keep their proportions. Raises ValueError, before anything is asked, for a size
    that the model's geometry refuses.
    """
    settings = vision_of(load())
    sides = {size: _sides(settings, size) for size in sorted(sizes)}
    points = [
        _point(load, data, size, views, metric=metric, output=Path(output) / str(size), **options)
        for size, views in sides.items()
    ]
    write_whole(Path(output) / "sweep.json", json.dumps([_as_json(point) for point in points], indent=2))
    write_whole(Path(output) / "sweep.md", _as_page(metric, points))
    return points


def _sides(settings: VisionConfig, size: int) -> list[int]:
    sides = settings.sizes_for(size)
    try:
        settings.adjusted({"sizes": sides}).geometry()
    except ValueError as error:
        raise ValueError(f"size {size} cannot be evaluated: {error}") from None
    return sides


def _point(load: Load, data: str | Path, size: int, views: list[int], **options: Any) -> Point:
    """Leaves no model behind, so that the next has the memory to itself."""
    assistant = load(vision={"sizes": views})
    report = evaluate(assistant, data, **options)
    paper, true = vision_costs(assistant, report.seen)
    return Point(size=size, sizes=views, report=report, paper_gflops=paper, true_gflops=true)


def _as_json(point: Point) -> Mapping[str, Any]:
    scores = point.report.scores
    return {
        "size": point.size,
        "sizes": point.sizes,
        "paper_gflops": point.paper_gflops,
        "true_gflops": point.true_gflops,
        "bad_rows": len(point.report.bad_rows),
        **({} if scores is None else {"score": scores.score, **asdict(scores)}),
    }


_HEADS = [
    *("size", "views", "questions", "score", "95 % interval", "visual tokens", "seconds"),
    *("vision GFLOPs, papers'", "in truth"),
]


def _row(point: Point) -> list[str]:
    report, scores = point.report, point.report.scores
    return [
        str(point.size),
        ", ".join(map(str, point.sizes)),
        "0" if scores is None else str(scores.questions),
        number(None if scores is None else scores.score, 4),
        "-" if scores is None else as_interval(scores),
        number(report.visual_tokens and report.visual_tokens.mean, 1),
        number(report.seconds and report.seconds.mean, 2),
        number(point.paper_gflops, 2),
        number(point.true_gflops, 2),
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def sweep_as_table(points: Sequence[Point]) -> str:
    return aligned(_HEADS, [_row(point) for point in points])


def _as_page(metric: str, points: Sequence[Point]) -> str:
    lines = [
        f"# {METRICS[metric].about}, by size",
        "",
        *as_markdown(_HEADS, [_row(point) for point in points]),
        "",
        "Visual tokens and GFLOPs are means over images, seconds over questions. The papers count the "
        "multiply-accumulates of branches and their interactions; in truth are all floating-point operations "
        "of the vision system, two a multiply-accumulate. The folder of each size has its report.",
    ]
    return "\n".join(lines) + "\n"
