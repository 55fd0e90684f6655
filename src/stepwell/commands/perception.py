"""The part of `stepwell evaluate` that scores detectors, segmenters and classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepwell.commands.graph_options import Runtime, load_on_runtime
from stepwell.commands.loading import Precision, quieten
from stepwell.commands.printing import refuse_bad, show_progress
from stepwell.evaluate.kinds import TASKS
from stepwell.folders import find_folder, model_type

if TYPE_CHECKING:
    from stepwell.images.limits import ImageLimits

__all__ = ["answers_questions", "score_perception"]


def answers_questions(model: str, metric: str | None) -> bool:
    """Whether a model is asked questions. One that is not on this machine is where there is a metric.

    Raises ValueError for a metric that the model in a folder has no use for, and for one that it lacks.
    """
    folder = find_folder(model)
    kind = None if folder is None else model_type(folder)
    task = TASKS.get(kind or "")
    if task is not None and metric is not None:
        raise ValueError(f"{model} is a model for {task}, which is scored without --metric")
    if kind is not None and task is None and metric is None:
        raise ValueError(f"{model} is scored on questions: say how with --metric")
    return metric is not None


def score_perception(
    model: str,
    data: Path,
    output: Path | None,
    default: Path,
    *,
    revision: str | None,
    device: str | None,
    dtype: Precision | None,
    runtime: Runtime | None,
    int8: bool,
    limits: ImageLimits | None,
    **options: Any,
) -> None:
    """default: the folder below which an output that is not named lies. options: of `evaluate_perception`.

    Raises ValueError, when all is written, if images could not be read.
    """
    quieten()
    from stepwell.evaluate.perception import evaluate_perception
    from stepwell.evaluate.perception_report import perception_as_table
    from stepwell.models.ask import Assistant
    from stepwell.weights.load import load

    if runtime is None:
        network = load(model, device=device, dtype=dtype, revision=revision)
    else:
        network = load_on_runtime(model, runtime, revision, int8=int8)
    if isinstance(network, Assistant):
        raise ValueError(f"{model} is scored on questions: say how with --metric")
    task = TASKS.get(network.config.model_type)
    if task is None:
        raise ValueError(f"{model} finds nothing that could be scored: it is a {type(network).__name__}")
    named = data.absolute().stem if data.is_file() else data.absolute().name
    folder = output or default / "-".join(filter(None, (named, options["split"], task)))
    report = evaluate_perception(
        network,
        data,
        folder,
        limits=limits,
        name=model,
        progress=show_progress,
        **options,
    )
    print(f"{perception_as_table(report)}\n{folder / 'report.md'}")
    refuse_bad("images", report.bad_images, report.images, folder / "report.md")
