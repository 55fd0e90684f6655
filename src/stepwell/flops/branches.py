"""How the branches of a pyramid are written in a command: families of the catalogue and their sizes."""

from __future__ import annotations

from stepwell.encoders.catalogue import ENCODERS

__all__ = ["parse_branches"]

SIBLINGS = {"deit": "deit3", "deit3": "deit"}
"""DeiT has no L and DeiT III no T, so the paper mixes the two."""


def parse_branches(text: str) -> list[str]:
    """`deit:B,S,T` or `clip:L + convnext_clip:B` -> encoders of the catalogue, largest network first.

    A family that lacks a size borrows it from its sibling (`deit:L` is DeiT III's). Raises ValueError for
    what the catalogue does not have.
    """
    names = []
    for group in text.lower().split("+"):
        family, colon, sizes = (part.strip() for part in group.partition(":"))
        if not all(size.strip() for size in (sizes if colon else family).split(",")):
            raise ValueError(f"{text!r} lacks a size between its commas or behind them; write deit:B,S,T")
        if not colon:
            names.append(family)
            continue
        for size in sizes.split(","):
            names.append(_encoder(family, size.strip()))
    if unknown := [name for name in names if name not in ENCODERS]:
        raise ValueError(
            f"unknown encoder {unknown[0]!r}; write family:SIZES, such as deit:B,S,T, "
            f"or encoders of the catalogue: {', '.join(sorted(ENCODERS))}"
        )
    return names


def _encoder(family: str, size: str) -> str:
    families = sorted({entry.family for entry in ENCODERS.values()})
    if family not in families:
        raise ValueError(f"unknown family {family!r}; choose from {', '.join(families)}")
    stem, _, suffix = family.partition("_")  # convnext_clip names its encoders convnext_b_clip
    names = [
        f"{member}_{size}" + (f"_{suffix}" if suffix else "") for member in (stem, SIBLINGS.get(stem, stem))
    ]
    for name in names:
        if name in ENCODERS:
            return name
    known = [name for name, entry in ENCODERS.items() if entry.family == family]
    raise ValueError(f"{family} has no size {size.upper()!r}; the catalogue has {', '.join(known)}")
