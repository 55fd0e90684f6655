"""What becomes of every tensor of a checkpoint, told by name before anything is written.

The strict rule of conversion: every source tensor is used, renamed or dropped for a reason, every tensor of
ours is made, and shapes agree. Shapes are checked by running the key tables' transforms on tensors without
memory, so a list of names and shapes is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepwell.keys.engine import Plan

__all__ = ["Report", "WrongShape", "compare"]

Shape = tuple[int, ...]
SHOWN = 8  # names listed per heading; the JSON form has all


@dataclass(frozen=True, slots=True)
class WrongShape:
    """`found` is None where the source tensors do not even fit together."""

    expected: Shape
    found: Shape | None


@dataclass(kw_only=True)
class Report:
    """Names of a checkpoint (theirs) against names of a model (ours)."""

    name: str
    used: list[str] = field(default_factory=list)  # same name in both
    renamed: dict[str, str] = field(default_factory=dict)  # theirs -> ours; joined tensors share one of ours
    dropped: dict[str, str] = field(default_factory=dict)  # theirs -> why
    missing: list[str] = field(default_factory=list)  # ours, and nothing makes it
    absent: dict[str, str] = field(
        default_factory=dict
    )  # ours, not in such a checkpoint -> what stands there
    unknown: list[str] = field(default_factory=list)  # theirs, and no rule takes it
    wrong_shape: dict[str, WrongShape] = field(default_factory=dict)  # ours
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unknown or self.wrong_shape)

    def json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def complaint(self) -> str:
        """One line: what stands in the way. Empty when nothing does."""
        parts = []
        if self.wrong_shape:
            name, wrong = next(iter(self.wrong_shape.items()))
            example = f"{name}: {_dims(wrong.found)} for {_dims(wrong.expected)}"
            parts.append(f"{len(self.wrong_shape)} of another shape ({example})")
        for names, what in ((self.missing, "missing"), (self.unknown, "unknown")):
            if names:
                parts.append(f"{len(names)} {what} ({names[0]})")
        return f"the tensors are not those of {self.name}: {', '.join(parts)}" if parts else ""

    def text(self) -> str:
        """Several lines: a count per heading, and the names where there is something to look at."""
        lines = [
            f"{self.name}: {'every tensor has its place' if self.ok else 'NOT this model'}",
            f"  used         {len(self.used)}",
            f"  renamed      {len(self.renamed)}",
        ]
        lines += _by_reason("dropped", self.dropped)
        lines += _listed("missing", self.missing)
        lines += _by_reason("absent", self.absent) if self.absent else []
        lines += _listed("unknown", self.unknown)
        lines += _listed(
            "wrong shape",
            [f"{n}: expected {_dims(w.expected)}, got {_dims(w.found)}" for n, w in self.wrong_shape.items()],
        )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def compare(
    name: str, plan: Plan, theirs: Mapping[str, Shape], ours: Mapping[str, Shape], absent: Mapping[str, str]
) -> Report:
    """plan: what becomes of `theirs` (names and shapes); ours: names and shapes of the model.

    absent: names of ours that such a checkpoint never holds -> what stands there instead.
    """
    report = Report(name=name, dropped=dict(plan.dropped), unknown=sorted(plan.unknown))
    for target in plan.targets.values():
        if target.name not in ours:
            report.unknown.extend(target.sources)
            continue
        for source in target.sources:
            if source == target.name:
                report.used.append(source)
            else:
                report.renamed[source] = target.name
        found = _shape_after(target.transform, [theirs[source] for source in target.sources])
        if found != ours[target.name]:
            report.wrong_shape[target.name] = WrongShape(ours[target.name], found)
    for target_name in ours:
        if target_name not in plan.targets:
            if target_name in absent:
                report.absent[target_name] = absent[target_name]
            else:
                report.missing.append(target_name)
    return report


def _shape_after(how: Any, shapes: list[Shape]) -> Shape | None:
    parts = [torch.empty(shape, device="meta") for shape in shapes]
    try:
        made: Tensor = how(parts)
    except (RuntimeError, ValueError, IndexError):
        return None
    return tuple(made.shape)


def _listed(heading: str, items: list[str]) -> list[str]:
    shown = [f"    {item}" for item in items[:SHOWN]]
    rest = [f"    ... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return [f"  {heading:<12} {len(items)}", *shown, *rest]


def _by_reason(heading: str, items: Mapping[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in items.items():
        reasons.setdefault(reason, []).append(name)
    lines = [f"    {reason}: {_some(names)}" for reason, names in reasons.items()]
    return [f"  {heading:<12} {len(items)}", *lines]


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _dims(shape: Shape | None) -> str:
    if shape is None:
        return "parts that do not fit together"
    return "x".join(map(str, shape)) or "scalar"
