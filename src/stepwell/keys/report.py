"""What becomes of every tensor of a checkpoint, told by name before anything is written.

The strict rule of conversion: every source tensor is used, renamed or dropped for a reason, every tensor of
ours is made, and shapes agree. Shapes are checked by running the key tables' transforms on tensors without
memory, so a list of names and shapes is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from stepwell.keys.engine import Plan, Target

__all__ = ["FitError", "Report", "WrongShape", "compare"]

Shape = tuple[int, ...]
SHOWN = 8  # names listed per heading; the JSON form has all


class FitError(ValueError):
    """Tensors that are not those of the model they were said to be of. One line; `report` has every name."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True, slots=True)
class WrongShape:
    """`got` is None where the source tensors do not even fit together."""

    expected: Shape
    got: Shape | None

    def __str__(self) -> str:
        return f"expected {_dims(self.expected)}, got {_dims(self.got)}"


@dataclass(kw_only=True)
class Report:
    """Names of a checkpoint (theirs) against names of a model (ours)."""

    name: str
    commit: str | None = None  # of the source on the hub, where it came from there
    used: list[str] = field(default_factory=list)  # same name in both
    renamed: dict[str, str] = field(default_factory=dict)  # theirs -> ours; joined tensors share one of ours
    resized: dict[str, str] = field(default_factory=dict)  # ours -> from which shape to which
    dropped: dict[str, str] = field(default_factory=dict)  # theirs -> why
    missing: list[str] = field(default_factory=list)  # ours, and nothing makes it
    absent: dict[str, str] = field(default_factory=dict)  # ours, of another source -> what stands there
    unknown: list[str] = field(default_factory=list)  # theirs, and no rule takes it
    wrong_shape: dict[str, WrongShape] = field(default_factory=dict)  # ours
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unknown or self.wrong_shape)

    @property
    def mismatches(self) -> list[str]:
        return [f"{name}: {shapes}" for name, shapes in self.wrong_shape.items()]

    def json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def complaint(self) -> str:
        """One line: what stands in the way. Empty when nothing does."""
        problems = self.problems()
        return f"the tensors are not those of {self.name}: {problems}" if problems else ""

    def problems(self) -> str:
        """How many tensors have none, and the first of each kind."""
        problems = {
            "of another shape": self.mismatches,
            "missing": self.missing,
            "unknown": self.unknown,
        }
        return ", ".join(f"{len(items)} {what} ({items[0]})" for what, items in problems.items() if items)

    def text(self) -> str:
        """Several lines: a count per heading, and the names where there is something to look at."""
        lines = [f"{self.name}: {'every tensor has its place' if self.ok else 'NOT this model'}"]
        lines += [f"  {'commit':<12} {self.commit}"] if self.commit else []
        for heading, items, details in (
            ("used", self.used, []),
            ("renamed", self.renamed, []),
            ("resized", self.resized, [f"{name}: {sizes}" for name, sizes in self.resized.items()][:SHOWN]),
            ("dropped", self.dropped, _by_reason(self.dropped)),
            ("missing", self.missing, _first(self.missing)),
            ("absent", self.absent, _by_reason(self.absent)),
            ("unknown", self.unknown, _first(self.unknown)),
            ("wrong shape", self.mismatches, _first(self.mismatches)),
        ):
            if items or heading not in ("absent", "resized"):
                lines += [f"  {heading:<12} {len(items)}", *(f"    {detail}" for detail in details)]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def compare(
    name: str, plan: Plan, theirs: Mapping[str, Shape], ours: Mapping[str, Shape], absent: Mapping[str, str]
) -> Report:
    """plan: what becomes of `theirs` (names and shapes); ours: names and shapes of the model.

    absent: names of ours that such a checkpoint never holds -> what stands there instead.
    """
    unmade = [target for target in ours if target not in plan.targets]
    report = Report(
        name=name,
        dropped=dict(plan.dropped),
        unknown=sorted(plan.unknown),
        missing=[target for target in unmade if target not in absent],
        absent={target: absent[target] for target in unmade if target in absent},
    )
    for target in plan.targets.values():
        if target.name not in ours:
            report.unknown.extend(target.sources)
            continue
        for source in target.sources:
            if source == target.name:
                report.used.append(source)
            else:
                report.renamed[source] = target.name
        got = _shape(target, theirs)
        if got != ours[target.name]:
            report.wrong_shape[target.name] = WrongShape(ours[target.name], got)
    return report


def _shape(target: Target, theirs: Mapping[str, Shape]) -> Shape | None:
    try:
        return tuple(target.make(lambda source: torch.empty(theirs[source], device="meta")).shape)
    except (RuntimeError, ValueError, IndexError):
        return None


def _first(items: Sequence[str]) -> list[str]:
    more = [f"... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return [*items[:SHOWN], *more]


def _by_reason(items: Mapping[str, str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in items.items():
        names.setdefault(reason, []).append(name)
    return [
        f"{reason}: {first}" + (f" and {len(others)} more" if others else "")
        for reason, (first, *others) in names.items()
    ]


def _dims(shape: Shape | None) -> str:
    if shape is None:
        return "parts that do not fit together"
    return "x".join(map(str, shape)) or "scalar"
