"""What each kind of look shows of a model: panels for a figure, and the numbers in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from stepwell.look.activation import activations
from stepwell.look.choice import Heads
from stepwell.look.components import colours, principal_components
from stepwell.look.encoder_rows import encoder_rows
from stepwell.look.numbers import listed
from stepwell.look.panels import Curve, Panel
from stepwell.look.read_from import read_from, told
from stepwell.look.sampling import sampled
from stepwell.look.spectrum import spectrum
from stepwell.look.subject import Point, Subject, holds
from stepwell.look.trace import ask_and_trace
from stepwell.look.where import heat_map
from stepwell.structures import FeatureMap

__all__ = [
    "Shown",
    "show_activation",
    "show_answer",
    "show_components",
    "show_point",
    "show_spectrum",
]

MOST_TOKENS = 7
"""Whose heat is drawn, beside that of the whole answer."""


class Shown(NamedTuple):
    """A figure's title and panels, and its numbers. columns: of panels, None as many as fit."""

    title: str
    panels: list[Panel | Curve]
    numbers: dict[str, Any]
    columns: int | None = None


def show_point(subject: Subject, point: Point, *, layer: int | None = None, head: int | None = None) -> Shown:
    """Where branches read each other for a point, and what the cells of vision transformers take there.
    layer: of these, None is the last; head: of both, None is all. Raises ValueError for a point that no view
    shows, and for a model with neither.
    """
    if not any(holds(view, point) for view in subject.views):
        raise ValueError(f"no view of {subject.name} shows the point {point[0]:g}, {point[1]:g}")
    reads, rows = sampled(subject, point), encoder_rows(subject, point, layer=layer)
    if not reads and not rows:
        raise ValueError(
            f"{subject.name} has no attention to look at here: neither interactions of branches nor vision "
            "transformers"
        )
    panels: list[Panel | Curve] = []
    told_reads, told_rows = [], []
    for read in reads:
        title = f"interaction {read.interaction}: branch {read.target + 1} reads {read.source + 1}"
        told_reads.append(
            {
                "interaction": read.interaction,
                "unit": read.unit,
                "target": read.target,
                "source": read.source,
                "cell": read.cell,
                "gate": listed(read.gate),
                "places": listed(read.places) if read.places is not None else None,
                "box": listed(read.view.box),
                "weights": listed(read.weights),
            }
        )
        weights = _of_head(read.weights, head)
        if read.places is None:
            heat = Panel(
                title=title, picture=subject.picture, box=read.view.box, heat=weights.mean(0), marks=[point]
            )
            panels.append(heat)
            continue
        panels.append(
            Panel(
                title=title,
                picture=subject.picture,
                points=_of_head(read.places, head).flatten(0, 1),
                weights=weights.flatten(),
                label="weight in its head",
                marks=[point],
            )
        )
    for row in rows:
        title = f"{row.view.name}, layer {row.layer}: attention of the cell"
        values = _of_head(row.row, head).mean(0)
        panels.append(
            Panel(
                title=title,
                picture=subject.picture,
                box=row.view.box,
                heat=values,
                label="weight",
                marks=[point],
            )
        )
        told_rows.append(
            {"view": row.view.name, "layer": row.layer, "cell": row.cell, "box": listed(row.view.box)}
            | {"heads": listed(row.row)}
        )
    numbers = {"point": listed(point), "interactions": told_reads, "self_attention": told_rows}
    return Shown(f"{subject.name}: what is read for a point", panels, numbers)


def _of_head(values: Tensor, head: int | None) -> Tensor:
    """(M, ...) -> those of one head, or all."""
    if head is None:
        return values
    if not 0 <= head < len(values):
        raise ValueError(f"head {head} of {len(values)}, which count from 0")
    return values[head : head + 1]


def show_answer(
    subject: Subject,
    question: str,
    *,
    heads: Heads = "reading",
    layer: int | None = None,
    head: int | None = None,
    max_new_tokens: int = 128,
) -> Shown:
    """Where an answer was read from, as a whole and token by token. Raises ValueError for a model that
    answers no questions, whose attention is not seen, or whose visual tokens have no place in the image.
    """
    assistant = subject.assistant
    if assistant is None:
        raise ValueError(f"{subject.name} answers no questions")
    answer, traced = ask_and_trace(
        assistant,
        subject.picture,
        question,
        region=subject.region,
        max_new_tokens=max_new_tokens,
        heads=heads,
        layer=layer,
        head=head,
    )
    source = read_from(traced)
    if source is None or traced.attention is None:
        raise ValueError(
            f"where {subject.name} read from cannot be told: its language model computes attention by other "
            "means than torch's scaled_dot_product_attention, or its visual tokens have no place"
        )
    layout = traced.layouts[0]
    whole = Panel(
        title=f"{answer!r}, confidence {traced.confidence:.2f}",
        picture=subject.picture,
        box=source.heat.box,
        heat=source.heat.map,
        label="attention, mean of the tokens",
        boxes=[source.box],
    )
    panels: list[Panel | Curve] = [whole]
    heats = []
    for i, (text, box) in enumerate(zip(traced.tokens, source.boxes, strict=True)):
        heat = heat_map(layout, traced.attention[i])
        heats.append(listed(heat.map))
        if box is not None and len(panels) <= MOST_TOKENS:
            panels.append(
                Panel(
                    title=f"{text!r}, probability {float(traced.probabilities[i]):.2f}",
                    picture=subject.picture,
                    box=heat.box,
                    heat=heat.map,
                    label="attention",
                    boxes=[box],
                )
            )
    whose = "mean of heads" if traced.head is None else f"layer {traced.head[0]}, head {traced.head[1]}"
    numbers = {"question": question, "answer": answer, **told(traced, source)}
    numbers["heat"] = {"box": listed(source.heat.box), "answer": listed(source.heat.map), "tokens": heats}
    return Shown(f"{subject.name}: {question} ({whose})", panels, numbers)


def show_spectrum(subjects: Sequence[Subject]) -> Shown:
    """Fourier amplitude of every map, and the radial means of all together."""
    panels: list[Panel | Curve] = []
    lines, numbers = {}, []
    for subject in subjects:
        maps = subject.look()
        for name, one in zip(_names(maps), maps, strict=True):
            found = spectrum(one.map)
            label = _joined(subject, name, len(subjects))
            lines[label] = (found.frequencies.tolist(), found.radial.tolist())
            panels.append(
                Panel(
                    title=label,
                    box=(-0.5, -0.5, 0.5, 0.5),
                    heat=found.amplitude,
                    limits=(float(found.amplitude.min()), float(found.amplitude.max())),
                    label="log amplitude, to frequency 0",
                    axes=("cycles for a cell, across", "cycles for a cell, down"),
                )
            )
            numbers.append(
                {"model": subject.name, "map": name, "stride": listed(float(one.stride))}
                | {"frequencies": listed(found.frequencies), "radial": listed(found.radial)}
                | {"amplitude": listed(found.amplitude)}
            )
    axes = ("cycles for a cell", "log amplitude, to frequency 0")
    curve = Curve(title="radial mean", axes=axes, lines=lines)
    title = f"{', '.join(subject.name for subject in subjects)}: frequencies of the maps"
    return Shown(title, [curve, *panels], {"maps": numbers})


def show_components(subjects: Sequence[Subject]) -> Shown:
    """Maps as colours: a row of panels for each model, its maps side by side. Maps of one width share their
    axes and scale, within a model.
    """
    panels: list[Panel | Curve] = []
    numbers = []
    most = 1
    for subject in subjects:
        maps = subject.look()
        names = _names(maps)
        widths = list(dict.fromkeys(one.map.shape[0] for one in maps))
        shown: dict[int, Panel] = {}
        for width in widths:
            places = [i for i, one in enumerate(maps) if one.map.shape[0] == width]
            found = principal_components([maps[i].map for i in places])
            for i, part, picture in zip(places, found.parts, colours(found), strict=True):
                share = float(found.shares.sum())
                shown[i] = Panel(
                    title=f"{_joined(subject, names[i], len(subjects))}\n{share:.0%} of the variance",
                    box=maps[i].view.box,
                    colours=picture,
                )
                numbers.append(
                    {"model": subject.name, "map": names[i], "box": listed(maps[i].view.box)}
                    | {"shares": listed(found.shares), "components": listed(part)}
                )
        panels += [shown[i] for i in range(len(maps))]
        most = max(most, len(maps))
    title = f"{', '.join(subject.name for subject in subjects)}: principal components of the maps"
    equal = len({len(subject.views) for subject in subjects}) == 1 and most <= 4
    return Shown(title, panels, {"maps": numbers}, most if equal else None)


def show_activation(subject: Subject, word: str, *, question: str | None = None) -> Shown:
    """A word against every level, and against the visual tokens."""
    found = activations(subject, word, question=question)
    panels: list[Panel | Curve] = [
        Panel(
            title=one.name,
            picture=subject.picture,
            box=one.box,
            heat=one.map,
            label=f"cosine to {word!r}",
        )
        for one in found
    ]
    numbers = {
        "token": word,
        "question": question,
        "maps": [{"name": one.name, "box": listed(one.box), "cosine": listed(one.map)} for one in found],
    }
    return Shown(f"{subject.name}: where {word!r} is", panels, numbers)


def _names(maps: Sequence[FeatureMap]) -> list[str]:
    """Of maps, each its own: several views may have one name."""
    names = [f"{one.view.name}, {one.map.shape[-1]} x {one.map.shape[-2]}" for one in maps]
    return [f"{i + 1}: {name}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _joined(subject: Subject, name: str, count: int) -> str:
    return name if count == 1 else f"{subject.name}: {name}"
