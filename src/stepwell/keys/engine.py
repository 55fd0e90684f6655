"""Key tables: how the tensors of another code base become ours, as data.

A table is a list of rules tried in order against every source name; the first that matches takes the name.
Every name is renamed, joined with others, or dropped for a stated reason; what no rule takes is *unknown*,
and that is an error. A plan holds names only, so it can be made from a manifest and carried out tensor by
tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import Tensor

__all__ = [
    "Drop",
    "Join",
    "Plan",
    "Rename",
    "Replacement",
    "Rule",
    "Target",
    "Transform",
    "convert",
    "plan",
    "with_prefix",
]

Replacement = str | Callable[[re.Match[str]], str]
Transform = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Rename:
    """Source names that match `pattern` (re.fullmatch) become `to`; `how` may change the tensor."""

    pattern: str
    to: Replacement
    how: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Join:
    """Several source tensors make one of ours: `how` gets the parts in the order of `patterns`."""

    patterns: tuple[str, ...]
    to: Replacement
    how: Transform


@dataclass(frozen=True, slots=True)
class Drop:
    """Source names that have no place here, and why."""

    pattern: str
    reason: str


Rule = Rename | Join | Drop


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of ours: which source tensors it is made of, and how."""

    name: str
    sources: tuple[str, ...]
    how: Transform

    def make(self, read: Callable[[str], Tensor]) -> Tensor:
        return self.how([read(source) for source in self.sources])


@dataclass(slots=True)
class Plan:
    targets: dict[str, Target] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


_compiled = cache(re.compile)  # a pyramid has more patterns than re keeps by itself


def _only(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _substitute(match: re.Match[str], to: Replacement) -> str:
    return match.expand(to) if isinstance(to, str) else to(match)


def plan(names: Iterable[str], rules: Iterable[Rule]) -> Plan:
    """Source names -> what becomes of each. Raises ValueError when two sources claim one target."""
    result, rules = Plan(), list(rules)
    parts: dict[str, tuple[Join, dict[int, str]]] = {}
    for name in names:
        for rule in rules:
            if _take(name, rule, result, parts):
                break
        else:
            result.unknown.append(name)
    for target, (join, found) in parts.items():
        if len(found) == len(join.patterns):
            sources = tuple(found[i] for i in range(len(join.patterns)))
            _add(result, Target(target, sources, join.how))
        else:
            result.unknown.extend(found.values())
    return result


def _take(name: str, rule: Rule, result: Plan, parts: dict[str, tuple[Join, dict[int, str]]]) -> bool:
    if isinstance(rule, Join):
        for i, pattern in enumerate(rule.patterns):
            if match := _compiled(pattern).fullmatch(name):
                parts.setdefault(_substitute(match, rule.to), (rule, {}))[1][i] = name
                return True
        return False
    match = _compiled(rule.pattern).fullmatch(name)
    if match is None:
        return False
    if isinstance(rule, Drop):
        result.dropped[name] = rule.reason
    else:
        how = rule.how
        transform = _only if how is None else lambda tensors: how(tensors[0])
        _add(result, Target(_substitute(match, rule.to), (name,), transform))
    return True


def _add(result: Plan, target: Target) -> None:
    if target.name in result.targets:
        other = result.targets[target.name].sources
        raise ValueError(f"{target.sources} and {other} would both become {target.name!r}")
    result.targets[target.name] = target


def convert(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Their state dict -> ours. Raises ValueError naming tensors that no rule takes."""
    made = plan(state, rules)
    if made.unknown:
        some = ", ".join(sorted(made.unknown)[:8])
        raise ValueError(f"{len(made.unknown)} tensors have no place here: {some}")
    return {name: target.make(state.__getitem__) for name, target in made.targets.items()}


def with_prefix(rules: Iterable[Rule], source: str, target: str) -> list[Rule]:
    """The same rules for tensors under `source` (a regex) there and under `target` (plain text) here."""
    return [_prefixed(rule, source, target) for rule in rules]


def _prefixed(rule: Rule, source: str, target: str) -> Rule:
    if isinstance(rule, Drop):
        return Drop(f"{source}(?:{rule.pattern})", rule.reason)

    def to(match: re.Match[str], rule: Rename | Join = rule) -> str:
        inner = match.string[_prefix_length(source, match.string) :]
        patterns = (rule.pattern,) if isinstance(rule, Rename) else rule.patterns
        found = next(m for p in patterns if (m := _compiled(p).fullmatch(inner)))
        return target + _substitute(found, rule.to)

    if isinstance(rule, Rename):
        return Rename(f"{source}(?:{rule.pattern})", to, rule.how)
    return Join(tuple(f"{source}(?:{pattern})" for pattern in rule.patterns), to, rule.how)


def _prefix_length(source: str, name: str) -> int:
    match = _compiled(source).match(name)
    assert match is not None
    return match.end()
