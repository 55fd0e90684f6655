"""A golden file: one case recorded from official code, and what a check of it answers.

A safetensors file holds tensors `param.*`, `in.*`, `out.*` and one metadata entry, `json`; a table is a JSON
file with its `kind` and mostly `settings` at the top level. A *case* is a function that builds our module
from the settings, gives it the recorded parameters through the key tables, runs it and returns what it
computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stepwell.keys.engine import Rule, plan

M = TypeVar("M", bound=nn.Module)

__all__ = [
    "Case",
    "Record",
    "Required",
    "TableCheck",
    "Unsupported",
    "check_required",
    "checked",
    "read_record",
]

Required = Mapping[str, Any]
"""Key of the settings -> a tuple of the values that we have, or a Required for an object."""


class Unsupported(Exception):
    """Raised by a case for settings that we do not have yet; the message says which."""


def check_required(settings: Mapping[str, Any], required: Required, where: str = "") -> None:
    """Raises Unsupported naming a key whose value is none of ours; keys that are absent are not looked at."""
    for key, ours in required.items():
        if key not in settings:
            continue
        value = settings[key]
        if isinstance(ours, Mapping):
            check_required(value, ours, f"{where}{key}.")
        elif value not in ours:
            known = " or ".join(map(repr, ours))
            raise Unsupported(f"{where}{key} {value!r}: ours is {known}")


@dataclass(frozen=True, slots=True)
class TableCheck:
    """What a case answers about a table: the parts it compared exactly, those it left out, what differed.

    by_others: what a named program made that is a library to us, none of our code: program -> parts and keys.
    """

    parts: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    by_others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One recorded case. Tensors are named without `param.`, `in.` or `out.`; only tables have a `table`."""

    path: Path
    system: str
    kind: str
    case: str
    version: str
    settings: dict[str, Any]
    tolerance: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    params_without_influence: tuple[str, ...] = ()
    table: dict[str, Any] = field(default_factory=dict)

    def limits(self, output: str) -> tuple[float, float]:
        """(rtol, atol) of one output."""
        atol = self.tolerance["atol"]
        return float(self.tolerance["rtol"]), float(atol[output] if isinstance(atol, dict) else atol)

    def converted(self, rules: Iterable[Rule]) -> dict[str, Tensor]:
        """The recorded parameters under our names.

        Raises ValueError naming those that no rule takes, unless the record says they change nothing.
        """
        renaming = plan(self.params, rules)
        if lost := sorted(set(renaming.unknown) - set(self.params_without_influence)):
            raise ValueError(f"{len(lost)} parameters have no place here: {', '.join(lost[:8])}")
        return {name: target.make(self.params.__getitem__) for name, target in renaming.targets.items()}

    def load_into(self, module: M, rules: Iterable[Rule]) -> M:
        """`module` in eval mode with the recorded parameters, loaded strictly."""
        module.load_state_dict(self.converted(rules), strict=True)
        return module.eval()


Case = Callable[[Record], Mapping[str, Tensor] | TableCheck]
"""Our outputs by name for a record of tensors; a TableCheck for a table."""


def checked(case: Case, required: Mapping[str, Required]) -> Case:
    """The case, after a look at what its kind requires, without gradients."""

    def run(record: Record) -> Mapping[str, Tensor] | TableCheck:
        check_required(record.settings, required[record.kind])
        with torch.no_grad():
            return case(record)

    return run


def read_record(path: Path) -> Record | None:
    """The record in a file, None where the file holds none. Raises ValueError when it cannot be read."""
    try:
        return _read_table(path) if path.suffix == ".json" else _read_tensors(path)
    except (OSError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path}: not a readable golden file ({type(error).__name__}: {error})") from error


def _read_table(path: Path) -> Record | None:
    table = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or "kind" not in table:
        return None
    parts = {k: v for k, v in table.items() if k not in ("system", "kind", "case", "version", "settings")}
    return Record(
        path=path,
        system=table.get("system", ""),
        kind=table["kind"],
        case=table.get("case", path.stem),
        version=table.get("version", ""),
        settings=table.get("settings", {}),
        table=parts,
    )


def _read_tensors(path: Path) -> Record | None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if "json" not in metadata:
            return None
        facts = json.loads(metadata["json"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def group(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    return Record(
        path=path,
        system=facts["system"],
        kind=facts["kind"],
        case=facts["case"],
        version=facts["version"],
        settings=facts["settings"],
        tolerance=facts["tolerance"],
        params=group("param."),
        inputs=group("in."),
        outputs=group("out."),
        params_without_influence=tuple(facts.get("params_without_influence", ())),
    )
