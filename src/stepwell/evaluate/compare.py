"""Several systems on the same questions: scores, and what they cost, side by side.

Each is trained by its recipe, unless it is a model already, and asked in a process of its own, so that its
peak of memory is its own. Each is a run of its own (evaluate/run.py) in a folder named after it: a comparison
that was stopped goes on.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from stepwell.evaluate.answers import ANSWERS
from stepwell.evaluate.costs import VisionCosts, vision_costs, vision_of
from stepwell.evaluate.report import Report, as_interval, as_markdown
from stepwell.evaluate.run import evaluate
from stepwell.evaluate.scoring import METRICS, Scores
from stepwell.flops.text import aligned, number
from stepwell.folders import write_whole
from stepwell.models.ask import Assistant, as_assistant

__all__ = ["Compared", "System", "as_tables", "compare", "measured", "measures_of"]

_Found = TypeVar("_Found")

MEMORY = "memory.json"


class System(NamedTuple):
    """recipe: that trains it, with `overrides`; or model: a folder or a name. One of both is None."""

    name: str
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One system. kind: of its vision; parameters: of all of it; gibibytes: the largest memory of the process
    that answered, or of its GPU where it has one; None where the machine does not tell it.
    """

    name: str
    kind: str
    parameters: int
    report: Report
    costs: VisionCosts
    gibibytes: float | None


def compare(
    systems: Sequence[System],
    data: str | Path,
    *,
    metric: str,
    output: str | Path,
    load: Callable[..., Any],
    train: Callable[..., Path] | None = None,
    device: str | None = None,
    tell: Callable[[str], object] = print,
    **options: Any,
) -> list[Compared]:
    """Trains and evaluates all systems, and writes compare.json and compare.md; evaluate/curve.py draws them.

    load, train: `stepwell.load` and `stepwell.train.run.train`, or functions of a module that do alike;
    models alone need no `train`. options: of `evaluate`. tell: is called with a line for each that is begun.
    Raises ValueError for systems of one name or of no origin, RuntimeError where a process that trains or
    answers is gone, and what training and evaluating raise.
    """
    names = [system.name for system in systems]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two systems are called {twice[0]}; give one of them another name")
    for system in systems:
        if (system.recipe is None) == (system.model is None):
            raise ValueError(f"system {system.name} has either a recipe or a model: give one of both")
        if system.recipe is not None and train is None:
            raise ValueError(f"system {system.name} has to be trained: give train")
    output = Path(output)
    compared = []
    for system in systems:
        model = system.model
        if system.recipe is not None and train is not None:
            tell(f"{system.name}: training {system.recipe}")
            model = str(_apart(train, system.recipe, system.overrides))
        tell(f"{system.name}: asking {model}")
        options_of = {"metric": metric, "output": output / system.name, **options}
        compared.append(_apart(_asked, load, system.name, model, data, device, options_of))
    write_whole(output / "compare.json", json.dumps([_as_json(each) for each in compared], indent=2))
    write_whole(output / "compare.md", _as_page(metric, compared))
    return compared


def _apart(run: Callable[..., _Found], *arguments: Any) -> _Found:
    """In a process that has done nothing before, and does nothing after."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(run, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError(
                "the process that did the work is gone, as where memory runs out; run again, the comparison "
                "goes on where it stopped"
            ) from None


def _asked(
    load: Callable[..., Any],
    name: str,
    model: str,
    data: str | Path,
    device: str | None,
    options: dict[str, Any],
) -> Compared:
    assistant = as_assistant(load(model, device=device), model)
    folder: Path = options["output"]
    before = _answers_in(folder)
    report = evaluate(assistant, data, name=name, **options)
    gibibytes = _largest_memory(assistant)
    if _answers_in(folder) > before:
        gibibytes = max(filter(None, (gibibytes, _kept_memory(folder))), default=None)
        write_whole(folder / MEMORY, json.dumps({"gibibytes": gibibytes}))
    return Compared(
        name=name,
        kind=vision_of(assistant).kind,
        parameters=sum(parameter.numel() for parameter in assistant.model.parameters()),
        report=report,
        costs=vision_costs(assistant, report.seen),
        gibibytes=_kept_memory(folder),
    )


def _answers_in(folder: Path) -> int:
    file = folder / ANSWERS
    return file.read_text("utf-8", errors="replace").count("\n") if file.is_file() else 0


def _kept_memory(folder: Path) -> float | None:
    """The largest of all processes that answered in this folder."""
    file = folder / MEMORY
    kept: float | None = json.loads(file.read_text("utf-8"))["gibibytes"] if file.is_file() else None
    return kept


def _largest_memory(assistant: Assistant) -> float | None:
    """Of this process until now, in GiB."""
    import torch

    device = next(assistant.model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, whose ru_maxrss begins with that of the process that began this one
        (kibibytes,) = re.findall(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        return int(kibibytes) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _as_json(system: Compared) -> dict[str, Any]:
    report = system.report
    types = {kind: {"score": scores.score, **asdict(scores)} for kind, scores in report.types.items()}
    return {
        "name": system.name,
        "kind": system.kind,
        "parameters": system.parameters,
        **system.costs._asdict(),
        "visual_tokens": report.visual_tokens and report.visual_tokens.mean,
        "seconds": report.seconds and report.seconds.mean,
        "gibibytes": system.gibibytes,
        "score": report.scores and report.scores.score,
        "all": report.scores and asdict(report.scores),
        "types": types,
        "bad_rows": len(report.bad_rows),
    }


_COSTS = [
    *("system", "kind", "parameters M", "vision GFLOPs", "as papers count", "visual tokens"),
    *("seconds a question", "GiB", "bad rows"),
]


def as_tables(metric: str, systems: Sequence[Compared]) -> str:
    """Lines for a screen: what the systems cost, and each measure of the metric by type of question."""
    return "\n\n".join(
        "\n".join([*([name] if name else []), aligned(heads, rows)])
        for name, heads, rows in _tables(metric, systems)
    )


def _tables(metric: str, systems: Sequence[Compared]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Name, heads and rows."""
    kinds = sorted({kind for system in systems for kind in system.report.types})
    tables = [("", _COSTS, [_cost_row(system) for system in systems])]
    for i, measure in enumerate(measures_of(metric)):
        interval = ["95 % interval"] if i == 0 else []
        heads = ["system", "questions", "all", *interval, *(" ".join(kind.split()) for kind in kinds)]
        rows = [_score_row(system, measure, kinds, has_interval=i == 0) for system in systems]
        tables.append((measure, heads, rows))
    return tables


def measures_of(metric: str) -> list[str]:
    """The names of what a metric tells; of one number, its own name."""
    names = [*METRICS[metric].measures]
    return names if names[1:] else [metric]


def measured(scores: Scores, measure: str) -> float:
    """Of one of `measures_of`."""
    return scores.measures.get(measure, scores.score)


def _cost_row(system: Compared) -> list[str]:
    report = system.report
    return [
        system.name,
        system.kind,
        f"{system.parameters / 1e6:.2f}",
        number(system.costs.true_gflops, 2),
        number(system.costs.paper_gflops, 2),
        number(report.visual_tokens and report.visual_tokens.mean, 1),
        number(report.seconds and report.seconds.mean, 3),
        number(system.gibibytes, 2),
        str(len(report.bad_rows)),
    ]


def _score_row(system: Compared, measure: str, kinds: Sequence[str], *, has_interval: bool) -> list[str]:
    """The interval is that of the first measure."""
    scores, types = system.report.scores, system.report.types
    interval = "-" if scores is None else as_interval(scores)
    return [
        system.name,
        "0" if scores is None else str(scores.questions),
        number(None if scores is None else measured(scores, measure), 4),
        *([interval] if has_interval else []),
        *(number(measured(types[kind], measure) if kind in types else None, 4) for kind in kinds),
    ]


def _as_page(metric: str, systems: Sequence[Compared]) -> str:
    lines = [f"# {METRICS[metric].about}, by system", ""]
    for name, heads, rows in _tables(metric, systems):
        lines += [*([f"## {name}", ""] if name else []), *as_markdown(heads, rows), ""]
    lines.append(
        "GFLOPs and visual tokens are means over images and regions that were looked at, seconds over "
        "questions; bad rows are in no score; GiB is the largest memory of the process, or GPU, that "
        "answered. Vision GFLOPs are all floating-point operations of the vision system, two a "
        "multiply-accumulate; the papers count the multiply-accumulates of branches and their interactions. "
        "The folder of each system has its report."
    )
    return "\n".join(lines) + "\n"
