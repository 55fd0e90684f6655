"""`stepwell look`: what is looked at, the figure of it and its numbers. In Python `look(...)` gives both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import Image

from stepwell.look.choice import Heads, What, check_look
from stepwell.look.numbers import write_numbers
from stepwell.look.panels import draw_panels
from stepwell.look.shown import (
    Shown,
    show_activation,
    show_answer,
    show_components,
    show_point,
    show_spectrum,
)
from stepwell.look.subject import Subject, subject
from stepwell.look.windows import show_views, show_windows, write_view_figure

__all__ = ["Looked", "look"]


class Looked(NamedTuple):
    """numbers: as they are in the JSON beside a figure."""

    shown: Shown
    subjects: list[Subject]
    numbers: dict[str, Any]

    def write(self, path: Path) -> None:
        """The figure, and its numbers as JSON beside it. Raises ImportError without matplotlib, which the
        views of an assistant do without.
        """
        if self.numbers["what"] == "views":
            write_view_figure(path, self.subjects[0], self.shown)
        else:
            draw_panels(path, self.shown.title, self.shown.panels, columns=self.shown.columns)
        write_numbers(path, self.numbers)


def look(
    models: Sequence[tuple[str, Any]],
    picture: Image,
    what: What,
    *,
    point: Sequence[float] | None = None,
    question: str | None = None,
    token: str | None = None,
    region: Sequence[float] | None = None,
    layer: int | None = None,
    head: int | None = None,
    heads: Heads = "reading",
    max_new_tokens: int = 128,
) -> Looked:
    """models: names with what `stepwell.load` loads; several for a spectrum and for components. picture: as
    `stepwell.open_image` opens it. point: in fractions of its sides; region: in pixels. layer, head: of
    attention; of an answer's the language model's, among which `heads` chooses.

    Raises ValueError as `check_look` does, for a point outside the views, a token that is not in the question
    or the vocabulary, and for what a model does not have.
    """
    check_look(what, models=len(models), point=point, question=question, token=token, layer=layer, head=head)
    subjects = [subject(model, picture, name=name, region=region) for name, model in models]
    first = subjects[0]
    shows: dict[What, Callable[[], Shown]] = {
        "attention": lambda: _attention(first, point, question, layer, head, heads, max_new_tokens),
        "spectrum": lambda: show_spectrum(subjects),
        "pca": lambda: show_components(subjects),
        "activation": lambda: show_activation(first, str(token), question=question),
        "windows": lambda: show_windows(first),
        "views": lambda: show_views(first),
    }
    shown = shows[what]()
    about: dict[str, Any] = {
        "what": what,
        "models": [name for name, _ in models],
        "title": shown.title,
        "picture": {"width": picture.width, "height": picture.height},
    }
    if first.region is not None:
        about["region"] = list(first.region)
    return Looked(shown, subjects, about | shown.numbers)


def _attention(
    subject: Subject,
    point: Sequence[float] | None,
    question: str | None,
    layer: int | None,
    head: int | None,
    heads: Heads,
    max_new_tokens: int,
) -> Shown:
    if question is not None:
        return show_answer(
            subject, question, heads=heads, layer=layer, head=head, max_new_tokens=max_new_tokens
        )
    assert point is not None
    place = point[0] * subject.picture.width, point[1] * subject.picture.height
    return show_point(subject, place, layer=layer, head=head)
