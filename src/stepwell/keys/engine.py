"""Key tables: how the tensors of another code base become ours, as data.

A table is a list of rules tried in order against every source name; the first that matches takes the name.
Every name is renamed, joined with others, or dropped for a stated reason; what no rule takes is *unknown*,
and that is an error. A plan holds names only, so it can be made from a manifest and carried out tensor by
tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from torch import Tensor

__all__ = [
    "AS_IT_IS",
    "Drop",
    "Join",
    "Plan",
    "Prefix",
    "Rename",
    "Replacement",
    "Rule",
    "Target",
    "Transform",
    "convert",
    "plan",
]

Replacement = str | Callable[[re.Match[str]], str]
Transform = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Rename:
    """Source names that match `pattern` (re.fullmatch) become `to`, or each of them; `transform` may change
    the tensor.
    """

    pattern: str
    to: Replacement | tuple[str, ...]
    transform: Callable[[Tensor], Tensor] | None = None


AS_IT_IS = Rename(r".+", r"\g<0>")
"""For tensors that have our names already."""


@dataclass(frozen=True, slots=True)
class Join:
    """Several source tensors make one of ours: `transform` gets the parts in the order of `patterns`."""

    patterns: tuple[str, ...]
    to: Replacement
    transform: Transform


@dataclass(frozen=True, slots=True)
class Drop:
    """Source names that have no place here, and why."""

    pattern: str
    reason: str


@dataclass(frozen=True, slots=True)
class Prefix:
    """Rules for tensors under `source` (a regex) there and under `target` (plain text) here."""

    source: str
    target: str
    rules: Sequence[Rule]


Rule = Rename | Join | Drop | Prefix


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of ours: which source tensors it is made of, and how."""

    name: str
    sources: tuple[str, ...]
    transform: Transform

    def make(self, read: Callable[[str], Tensor]) -> Tensor:
        return self.transform([read(source) for source in self.sources])


@dataclass(slots=True)
class Plan:
    targets: dict[str, Target] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


_compiled = cache(re.compile)  # a pyramid has more patterns than re keeps by itself


def plan(names: Iterable[str], rules: Iterable[Rule]) -> Plan:
    """Source names -> what becomes of each. Raises ValueError when two sources claim one target."""
    result, rules = Plan(), tuple(rules)
    joins: dict[str, tuple[Join, dict[int, str]]] = {}
    for name in names:
        match _match(name, rules):
            case None:
                result.unknown.append(name)
            case Drop() as rule, _, _:
                result.dropped[name] = rule.reason
            case Join() as rule, to, part:
                assert isinstance(to, str)
                sources = joins.setdefault(to, (rule, {}))[1]
                if part in sources:
                    raise ValueError(f"{sources[part]!r} and {name!r} would both be part {part} of {to!r}")
                sources[part] = name
            case rule, to, _:
                for target in to if isinstance(to, tuple) else (to,):
                    _add(result, Target(target, (name,), _of_one(rule.transform)))
    for to, (join, sources) in joins.items():
        if len(sources) == len(join.patterns):
            _add(result, Target(to, tuple(sources[part] for part in sorted(sources)), join.transform))
        else:
            result.unknown.extend(sources.values())
    return result


class _Match(NamedTuple):
    rule: Rename | Join | Drop
    to: str | tuple[str, ...]  # empty for Drop
    part: int  # which pattern of a Join


def _match(name: str, rules: Sequence[Rule]) -> _Match | None:
    """The first rule that takes a name."""
    for rule in rules:
        if isinstance(rule, Prefix):
            prefix = _compiled(rule.source).match(name)
            if prefix and (inner := _match(name[prefix.end() :], rule.rules)):
                return inner._replace(to=_under(rule.target, inner.to))
            continue
        for part, pattern in enumerate(rule.patterns if isinstance(rule, Join) else (rule.pattern,)):
            if match := _compiled(pattern).fullmatch(name):
                return _Match(rule, "" if isinstance(rule, Drop) else _substitute(match, rule.to), part)
    return None


def _substitute(match: re.Match[str], to: Replacement | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(to, tuple):
        return tuple(match.expand(one) for one in to)
    return match.expand(to) if isinstance(to, str) else to(match)


def _under(prefix: str, to: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return tuple(prefix + one for one in to) if isinstance(to, tuple) else prefix + to


def _of_one(transform: Callable[[Tensor], Tensor] | None) -> Transform:
    return lambda tensors: tensors[0] if transform is None else transform(tensors[0])


def _add(result: Plan, target: Target) -> None:
    if target.name in result.targets:
        other = result.targets[target.name].sources
        raise ValueError(f"{target.sources} and {other} would both become {target.name!r}")
    result.targets[target.name] = target


def convert(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Their state dict -> ours. Raises ValueError naming tensors that no rule takes."""
    result = plan(state, rules)
    if result.unknown:
        some = ", ".join(sorted(result.unknown)[:8])
        raise ValueError(f"{len(result.unknown)} tensors have no place here: {some}")
    return {name: target.make(state.__getitem__) for name, target in result.targets.items()}
