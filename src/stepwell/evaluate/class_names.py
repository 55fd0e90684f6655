"""The classes of a model and those of data, brought together by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["ClassMatch", "match_classes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMatch:
    """names: of the data, in the order of its labels. places: label of the model -> label of the data, or
    len(names) for a class that the data lack. others: the names of those. unknown: names of the data that the
    model lacks, and the data have nothing of.
    """

    names: tuple[str, ...]
    places: tuple[int, ...]
    others: tuple[str, ...]
    unknown: tuple[str, ...] = ()


def match_classes(
    of_model: Sequence[str], of_data: Sequence[str], *, used: Collection[int] | None = None
) -> ClassMatch:
    """Names in the order of labels. used: the labels that there is something of in the data; None: all.

    Raises ValueError where the model does not know a class that is used, and for such a class that is named
    twice: of a class that is compared with another no score would tell.
    """
    names, known = tuple(of_data), tuple(of_model)
    of_use = [name for label, name in enumerate(names) if used is None or label in used]
    for who, given in (("the data", of_use), ("the model", known)):
        twice = [name for name, count in Counter(given).items() if count > 1 and name in of_use]
        if twice:
            raise ValueError(f"{who} names the class {twice[0]!r} twice, and classes are compared by name")
    if unknown := [name for name in of_use if name not in known]:
        raise ValueError(
            f"the model does not know {_some(unknown)} of the data; it knows {_some(known)}. Name the data's "
            "classes as the model's id2label does, or train the model on these"
        )
    place = {name: label for label, name in enumerate(names)}
    place |= {names[label]: label for label in used or ()}  # of a name that stands twice, the one of use
    return ClassMatch(
        names=names,
        places=tuple(place.get(name, len(names)) for name in known),
        others=tuple(name for name in known if name not in place),
        unknown=tuple(name for name in names if name not in known),
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
