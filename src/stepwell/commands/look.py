"""`stepwell look`: what a model sees in a picture, as a figure with its numbers beside it.

Nothing imported above imports torch: what needs no model is answered before it is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepwell.commands.limits import MaxAspect, MaxBytes, MaxPixels, MaxSeconds, MaxSide, image_limits
from stepwell.commands.loading import (
    Device,
    Dtype,
    MaxNewTokens,
    Revision,
    check_model,
    quieten,
    short_name,
)
from stepwell.folders import SHIPPED
from stepwell.look.choice import Heads, What, check_look

__all__ = ["look"]


def look(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="An image file.", show_default=False)],
    what: Annotated[
        What,
        typer.Option(
            help="attention of a --point or of the answer to a --question; spectrum or pca of the maps; "
            "activation by a --token; windows; views.",
            show_default=False,
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="A model folder, a hub name or a published name; repeated for spectrum and pca. "
            "[default: the shipped reader]",
        ),
    ] = None,
    point: Annotated[
        str | None, typer.Option(metavar="X,Y", help="In fractions of the picture: 0.5,0.25.")
    ] = None,
    question: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Where its answer is read; or where a token stands.")
    ] = None,
    token: Annotated[str | None, typer.Option(metavar="WORD", help="To compare places with.")] = None,
    region: Annotated[
        str | None,
        typer.Option(metavar="LEFT,TOP,RIGHT,BOTTOM", help="Look closely at a part, told in fractions."),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Of attention: of encoders, or of the language model. [default: last; all]"),
    ] = None,
    head: Annotated[int | None, typer.Option(min=0, help="Of attention. [default: all]")] = None,
    heads: Annotated[
        Heads | None,
        typer.Option(
            help="Of an answer: the head that reads from place to place, or the mean of all. "
            "[default: reading]"
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE", dir_okay=False, help="Of the figure; numbers go to FILE.json.")
    ] = Path("look.png"),
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    max_new_tokens: MaxNewTokens = 128,
    max_pixels: MaxPixels = None,
    max_side: MaxSide = None,
    max_aspect: MaxAspect = None,
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
) -> None:
    """Look into a model: what it attends to, which frequencies and features it holds, what it is given."""
    if not picture.is_file():
        raise ValueError(f"no such file: {picture}")
    limits = image_limits(
        max_pixels=max_pixels,
        max_side=max_side,
        max_aspect=max_aspect,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
    )
    names = model or [SHIPPED.name]
    place = None if point is None else _numbers(point, 2, "--point is X,Y, such as 0.5,0.25")
    edges = (
        None
        if region is None
        else _numbers(region, 4, "--region is LEFT,TOP,RIGHT,BOTTOM, such as 0.1,0.4,0.6,0.45")
    )
    check_look(
        what,
        models=len(names),
        point=place,
        question=question,
        token=token,
        layer=layer,
        head=head,
        heads=heads,
    )

    from stepwell.images.draw import check_target
    from stepwell.images.open import open_image
    from stepwell.look.numbers import check_numbers

    check_target(out, [picture])
    check_numbers(out)
    for name in names:
        check_model(name, device)
    opened = open_image(picture, limits=limits)
    quieten()

    from stepwell.evaluate.drawing import check_drawing
    from stepwell.look.look import look as look_into
    from stepwell.views.region import region_of_fractions
    from stepwell.weights.light import load_to_ask

    if what != "views":
        check_drawing("what a model sees")
    pixels = None if edges is None else region_of_fractions(edges, (opened.height, opened.width))
    loaded = [
        (short_name(name), load_to_ask(name, device=device, dtype=dtype, revision=revision)) for name in names
    ]
    found = look_into(
        loaded,
        opened,
        what,
        point=place,
        question=question,
        token=token,
        region=pixels,
        layer=layer,
        head=head,
        heads=heads or "reading",
        max_new_tokens=max_new_tokens,
    )
    found.write(out)
    print(f"{out} {out.with_suffix('.json')}")


def _numbers(text: str, count: int, form: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{form}; got {text!r}") from None
    if len(numbers) != count:
        raise ValueError(f"{form}; got {text!r}")
    return numbers
