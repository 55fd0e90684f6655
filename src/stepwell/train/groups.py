"""Which parameters learn, how fast, and with what decay, by the names of a model's parts.

A part is a dotted name as a reader of a recipe would say it (`vision.branches.0`, `projector`, `language`);
`parts` maps the names that a task and its model know to prefixes of parameters. The longest prefix names a
parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

__all__ = ["freeze_all_but", "parameter_groups", "part_of"]


def part_of(name: str, parts: Mapping[str, str]) -> str:
    """A parameter's name -> its name by parts; itself where it belongs to none."""
    matches = [(prefix, part) for part, prefix in parts.items() if _within(name, prefix)]
    prefix, part = max(matches, key=lambda match: len(match[0]), default=(name, name))
    return part + name.removeprefix(prefix)


def freeze_all_but(module: nn.Module, learning: Sequence[str], parts: Mapping[str, str]) -> None:
    """Parameters of the parts in `learning` learn, all others do not. Raises ValueError for one that has
    none.
    """
    names = {name: part_of(name, parts) for name, _ in module.named_parameters()}
    _refuse_unknown(learning, names.values(), "of the model")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(_within(names[name], part) for part in learning))


def parameter_groups(
    module: nn.Module,
    parts: Mapping[str, str],
    *,
    lr: float,
    part_lrs: Mapping[str, float],
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: every parameter that learns is in exactly one.

    part_lrs gives parts a rate of their own, the longest matching name counts. No weight decay on norms,
    biases, gates and scales. Raises ValueError for a rate of what does not learn.
    """
    learning = {part_of(name, parts): p for name, p in module.named_parameters() if p.requires_grad}
    _refuse_unknown(part_lrs, learning, "of the model that learns")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in learning.items():
        matches = [part for part in part_lrs if _within(name, part)]
        rate = part_lrs[max(matches, key=len)] if matches else lr
        decay = weight_decay if parameter.ndim > 1 else 0.0  # norms, biases, gates and scales are vectors
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def _refuse_unknown(parts: Iterable[str], names: Collection[str], whose: str) -> None:
    for part in parts:
        if not any(_within(name, part) for name in names):
            known = sorted({name.split(".")[0] for name in names})
            raise ValueError(f"no part {whose} is called {part!r}; its parts are {', '.join(known)}")


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
