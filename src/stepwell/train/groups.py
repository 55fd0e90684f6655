"""Which parameters learn, how fast, and with what decay, by the names of a model's parts.

Parts are dotted prefixes as a reader of a recipe would say them: `vision`, `vision.branches`,
`vision.branches.0`, `vision.interactions`, `projector`, `language`. No weight decay on norms, biases, gates
and scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

__all__ = ["freeze_all_but", "parameter_groups", "part_of"]


def part_of(name: str) -> str:
    """A parameter's name in a StepwellForConditionalGeneration -> its name by parts."""
    name = name.removeprefix("model.")
    for prefix, part in _PARTS.items():
        if name.startswith(prefix):
            return part + name.removeprefix(prefix)
    return name


_PARTS = {
    "vision.projector.": "projector.",
    "vision.encoder.": "vision.",
    "language_model.": "language.",
    "lm_head.": "language.lm_head.",
}


def freeze_all_but(model: nn.Module, parts: Sequence[str]) -> None:
    """Parameters of the named parts learn, all others do not.

    Raises ValueError for a part that names no parameter; "vision" does not include the projector.
    """
    names = {name: part_of(name) for name, _ in model.named_parameters()}
    for part in parts:
        if not any(_within(name, part) for name in names.values()):
            known = sorted({name.split(".")[0] for name in names.values()})
            raise ValueError(f"no part of the model is called {part!r}; its parts are {', '.join(known)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(_within(names[name], part) for part in parts))


def parameter_groups(
    model: nn.Module, *, lr: float, part_lrs: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimiser: every parameter that learns is in exactly one.

    part_lrs gives parts a rate of their own, the longest matching name counts. Names outside the model's
    parts (such as training-only heads) learn at `lr`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matches = [part for part in part_lrs if _within(part_of(name), part)]
        rate = part_lrs[max(matches, key=len)] if matches else lr
        decay = weight_decay if parameter.ndim > 1 else 0.0  # norms, biases, gates and scales are vectors
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
