"""What a perception source holds, before a minute of training is spent: pictures, classes, sizes, and what is
left out.

Every sample is looked at: maps of labels are decoded, of pictures only the headers are read. Sizes are
(height, width) in pixels, and are told smallest, median and largest by area.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from stepwell.data.classes import class_names
from stepwell.data.image_folder import LabelledImage
from stepwell.data.label_maps import IGNORED, LabelledPixels
from stepwell.data.objects import AnnotatedImage
from stepwell.data.sample import BadSample, Source, read
from stepwell.images.limits import ImageLimits
from stepwell.images.open import image_size
from stepwell.language.characters import well_formed
from stepwell.structures import Size

__all__ = ["ClassCount", "LabelledSource", "Sizes", "Summary", "counted", "short_name", "summary"]

_LISTED = 40  # classes in the text
_LONGEST = 40  # characters of a name


class LabelledSource(Source, Protocol):
    """A source of annotated images, labelled pixels or labelled images."""

    classes: Any
    """Names in the order of labels, or a ClassList of them."""
    limits: ImageLimits
    """Of image files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCount:
    """What a source has of one class. objects: without crowds. pixels: of maps of labels."""

    name: str
    pictures: int
    objects: int = 0
    pixels: int = 0


class Sizes(NamedTuple):
    """(height, width) each."""

    smallest: tuple[float, float]
    median: tuple[float, float]
    largest: tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """kind: "objects", "pixels" or "images", which is what has classes. empty: pictures without an object or
    a labelled pixel. unnamed: objects of no category. faults: what is left out, each where it is and why.
    """

    kind: str
    pictures: int
    empty: int
    classes: tuple[ClassCount, ...]
    objects: int = 0
    unnamed: int = 0
    masks: int = 0  # objects that have one
    crowds: int = 0
    ignored: int = 0  # pixels of no class
    picture_sizes: Sizes | None
    object_sizes: Sizes | None
    faults: tuple[tuple[str, str], ...]

    def fields(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def text(self) -> str:
        """Lines for people, without the faults but for their number."""
        parts = [self._heading(), *_table(self._class_rows())]
        if len(self.classes) > _LISTED:
            parts.append(f"and {len(self.classes) - _LISTED} more classes")
        lacking = [short_name(entry.name) for entry in self.classes if not entry.pixels]
        if self.kind == "pixels" and lacking and self.ignored:
            parts.append(
                f"no pixel is {lacking[0]}, and some are ignored: where the maps store a class as 255, list "
                "the classes by number, with another ignore_index"
            )
        sizes = {"picture size": self.picture_sizes, "object size": self.object_sizes}
        told = [(name, *map(_words, found)) for name, found in sizes.items() if found is not None]
        parts += _table([("", *Sizes._fields), *told]) if told else []
        count = len(self.faults)
        return "\n".join([*parts, f"left out: {count:,}" if count else "nothing is left out"])

    def _heading(self) -> str:
        parts = [counted(self.pictures, "picture")]
        if self.empty:
            parts.append(f"{self.empty:,} of them empty")
        if self.kind == "objects":
            parts.append(counted(self.objects, "object"))
            parts += [f"{self.masks:,} with masks"] if self.masks else []
            parts += [f"{self.unnamed:,} of no category"] if self.unnamed else []
            parts += [counted(self.crowds, "crowd")] if self.crowds else []
        return ", ".join([*parts, counted(len(self.classes), "class", "classes")])

    def _class_rows(self) -> list[tuple[str, ...]]:
        listed = self.classes[:_LISTED]
        names = [short_name(entry.name) for entry in listed]
        columns = [["pictures", *(f"{entry.pictures:,}" for entry in listed)]]
        if self.kind == "objects":
            columns.append(["objects", *(f"{entry.objects:,}" for entry in listed)])
        elif self.kind == "pixels":
            total = max(1, self.ignored + sum(entry.pixels for entry in self.classes))
            names.append("(ignored)")
            pixels = [*(entry.pixels for entry in listed), self.ignored]
            columns = [[*columns[0], ""], ["pixels", *(f"{100 * count / total:.1f} %" for count in pixels)]]
        return list(zip(["class", *names], *columns, strict=True))


class _Look(NamedTuple):
    """What one sample holds."""

    kind: str
    size: Size
    labels: Sequence[int | None] = ()  # of its objects, or its own
    sizes: Sequence[tuple[float, float]] = ()  # of its objects
    masks: int = 0
    crowds: int = 0
    pixels: Counter[int] = Counter()


def summary(source: LabelledSource, *, progress: Callable[[int, int], None] | None = None) -> Summary:
    """progress: called with how many samples have been looked at, and how many there are."""
    faults = list(getattr(source, "faults", ()))
    looks: list[_Look] = []
    for index in range(len(source)):
        look = read([source], 0, index, partial(_look, limits=source.limits))
        if isinstance(look, BadSample):
            faults.append((look.where, look.reason))
        else:
            looks.append(look)
        if progress is not None:
            progress(index + 1, len(source))
    pictures, objects, pixels = Counter[Any](), Counter[Any](), Counter[Any]()
    for look in looks:
        pictures.update({*look.labels, *look.pixels})
        objects.update(look.labels)
        pixels.update(look.pixels)
    kind = looks[0].kind if looks else "images"
    return Summary(
        kind=kind,
        pictures=len(looks),
        empty=sum(not look.labels and not look.pixels.keys() - {IGNORED} for look in looks),
        classes=tuple(
            ClassCount(
                name=name,
                pictures=pictures[label],
                objects=objects[label] if kind == "objects" else 0,
                pixels=pixels[label],
            )
            for label, name in enumerate(class_names(source.classes))
        ),
        objects=sum(objects.values()) if kind == "objects" else 0,
        unnamed=objects[None],
        masks=sum(look.masks for look in looks),
        crowds=sum(look.crowds for look in looks),
        ignored=pixels[IGNORED],
        picture_sizes=_sizes([look.size for look in looks]),
        object_sizes=_sizes([size for look in looks for size in look.sizes]),
        faults=tuple(faults),
    )


def short_name(name: str) -> str:
    """Of a class, which a stranger may have named, on one line and not too long."""
    line = well_formed(" ".join(name.split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def counted(count: int, one: str, more: str | None = None) -> str:
    """A number of things in words: 1 object, 2 objects."""
    return f"{count:,} {one if count == 1 else more or f'{one}s'}"


def _look(sample: Any, *, limits: ImageLimits) -> _Look:
    if isinstance(sample, AnnotatedImage):
        things = [thing for thing in sample.annotations if not thing.is_crowd]
        return _Look(
            kind="objects",
            size=sample.size,
            labels=[thing.label for thing in things],
            sizes=[(thing.box[3] - thing.box[1], thing.box[2] - thing.box[0]) for thing in things],
            masks=sum(thing.mask is not None for thing in things),
            crowds=len(sample.annotations) - len(things),
        )
    if isinstance(sample, LabelledPixels):
        counts = np.bincount(sample.labels.reshape(-1))
        height, width = sample.labels.shape
        pixels = Counter({label: int(counts[label]) for label in np.flatnonzero(counts).tolist()})
        return _Look(kind="pixels", size=(height, width), pixels=pixels)
    if isinstance(sample, LabelledImage):
        return _Look(kind="images", size=image_size(sample.image, limits=limits), labels=[sample.label])
    raise TypeError(f"a {type(sample).__name__} is no sample of detectors, segmenters or classifiers")


def _sizes(sizes: Sequence[tuple[float, float]]) -> Sizes | None:
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return Sizes(ordered[0], ordered[len(ordered) // 2], ordered[-1]) if ordered else None


def _words(size: tuple[float, float]) -> str:
    """Width x height; fractions of small ones count."""
    return " x ".join(f"{side:.3g}" if side < 100 else f"{side:.0f}" for side in reversed(size))


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Names at the left, numbers at the right of their columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
