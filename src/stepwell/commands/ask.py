"""`stepwell ask`: one question about images, or many of a file.

Nothing imported above imports torch: what needs no model is answered before it is there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepwell.commands.limits import MaxAspect, MaxBytes, MaxPixels, MaxSeconds, MaxSide, image_limits
from stepwell.commands.loading import Device, Dtype, MaxNewTokens, Revision, load_assistant
from stepwell.commands.printing import print_json, show_progress
from stepwell.folders import SHIPPED, is_url
from stepwell.language.characters import well_formed

if TYPE_CHECKING:
    from PIL.Image import Image

    from stepwell.images.limits import ImageLimits
    from stepwell.models.ask import Assistant
    from stepwell.structures import Region

__all__ = ["ask"]


def ask(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", help="Image files; - reads one from standard input."),
    ] = None,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="What you want to know, in quotes.")
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help='Answer many: lines of {"image": "a.jpg", "question": "What?"}, answered as lines.',
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A model folder or a hub name. [default: the shipped model]"),
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            metavar="LEFT,TOP,RIGHT,BOTTOM",
            help="Look closely at a part of the image, told in fractions: 0.1,0.4,0.6,0.45.",
        ),
    ] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    max_new_tokens: MaxNewTokens = 128,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is made.")] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print answer, confidence, where it was read, model, tokens and views as JSON."
        ),
    ] = False,
    show: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Draw the images with their views and grids."),
    ] = None,
    max_pixels: MaxPixels = None,
    max_side: MaxSide = None,
    max_aspect: MaxAspect = None,
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
) -> None:
    """Ask a question about one image or several, or many questions of a file."""
    limits = image_limits(
        max_pixels=max_pixels,
        max_side=max_side,
        max_aspect=max_aspect,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
    )
    if jsonl is not None:
        if question is not None or stream or as_json or show is not None or region is not None:
            raise ValueError("--jsonl FILE names the images and questions itself, and prints lines of JSON")
        load = partial(load_assistant, model, revision, device, dtype, limits)
        _ask_lines(jsonl, load, max_new_tokens)
        return
    if not images or question is None:
        raise ValueError("name an image and a question: stepwell ask IMAGE QUESTION")
    if not question.strip():
        raise ValueError("the question is empty")
    if stream and as_json:
        raise ValueError("--stream and --json exclude each other: JSON is printed whole")
    if Path(question).is_file():
        raise ValueError(f"the question comes last; {question} is a file")
    question = well_formed(question)
    if region is not None and len(images) > 1:
        raise ValueError("--region is of one image; lines of --jsonl may have a region for each of theirs")
    fractions = None if region is None else _fractions(region)
    opened = _open_images(images, question, limits)
    pixels = None if fractions is None else _in_pixels(fractions, opened[0])
    if show is not None:
        from stepwell.images.draw import check_target

        check_target(show, images)
    assistant = load_assistant(model, revision, device, dtype, limits)
    if show is not None:
        from stepwell.views.sheet import write_views

        layouts = assistant.layouts((opened, question, pixels))  # a question may tell a region in words
        write_views(show, opened, assistant.engine.geometry, [layout.region for layout in layouts])
    if as_json:
        about: dict[str, Any] = {"model": model or SHIPPED.name, "commit": assistant.commit}
        about |= {"question": question} | ({} if fractions is None else {"region": fractions})
        _tell(assistant, images, opened, question, pixels, max_new_tokens, about)
        return
    answer = assistant.ask(
        opened,
        question,
        region=pixels,
        max_new_tokens=max_new_tokens,
        stream=partial(print, end="", flush=True) if stream else None,
    )
    print("" if stream else answer)


def _tell(
    assistant: Assistant,
    names: list[str],
    images: list[Image],
    question: str,
    region: Region | None,
    max_new_tokens: int,
    about: dict[str, Any],
) -> None:
    """Prints the answer as JSON, with where it was read and what it cost."""
    from stepwell.look.read_from import read_from, told
    from stepwell.look.trace import ask_and_trace

    started = time.perf_counter()
    answer, traced = ask_and_trace(assistant, images, question, region=region, max_new_tokens=max_new_tokens)
    seconds = time.perf_counter() - started
    found = told(traced, read_from(traced))
    print_json({"answer": answer, **found, **about, **_report(seconds, names, list(traced.layouts))})


def _fractions(text: str) -> list[float]:
    try:
        return [float(edge) for edge in text.split(",")]
    except ValueError:
        form = "--region is LEFT,TOP,RIGHT,BOTTOM, such as 0.1,0.4,0.6,0.45"
        raise ValueError(f"{form}; got {text!r}") from None


def _in_pixels(fractions: list[float], image: Image) -> Region:
    from stepwell.views.region import region_of_fractions

    return region_of_fractions(fractions, (image.height, image.width))


def _ask_lines(file: Path, load: Callable[[], Assistant], max_new_tokens: int) -> None:
    """Prints a line of JSON for every line of the file. Raises ValueError at the end if one has no answer."""
    if not file.is_file():
        raise ValueError(f"no such file: {file}")

    from stepwell.models.ask_file import answer_lines, read_question_lines

    lines = read_question_lines(file)
    assistant, failed = load(), 0
    for count, fields in enumerate(answer_lines(assistant, lines, max_new_tokens=max_new_tokens), start=1):
        print_json(fields)
        failed += "error" in fields
        show_progress(count, len(lines))
    if failed:
        raise ValueError(f"{failed} of {len(lines)} lines of {file} have no answer; their error says why")


def _open_images(names: list[str], question: str, limits: ImageLimits) -> list[Image]:
    """Decoded images in the order of their names; needs no torch."""
    for name in names:
        if name != "-" and not Path(name).exists():
            if is_url(name):
                raise ValueError(
                    f"{name} is a URL; images are not fetched from the network, download it first"
                )
            hint = "; the question comes last" if Path(question).is_file() else ""
            raise ValueError(f"no such file: {name}{hint}")
    if names.count("-") > 1:
        raise ValueError("standard input (-) holds one image; it was named more than once")
    if "-" in names and sys.stdin.isatty():
        raise ValueError("- reads an image from standard input, which is a terminal here: use '< image.jpg'")

    from stepwell.images.limits import ImageError
    from stepwell.images.open import open_image

    images = []
    for name in names:
        try:
            images.append(open_image(sys.stdin.buffer if name == "-" else name, limits=limits))
        except ImageError as error:
            raise ValueError(f"{'standard input' if name == '-' else name}: {error}") from error
    return images


def _report(seconds: float, names: list[str], layouts: list[Any]) -> dict[str, Any]:
    """What an answer cost. Sizes are [height, width], boxes [left, top, right, bottom] in source pixels."""
    tiles = [layout.tiles for layout in layouts]
    return {
        "seconds": round(seconds, 3),
        **({"tiles": tiles} if max(tiles, default=(0, 0)) > (0, 0) else {}),
        "visual_tokens": sum(layout.num_visual for layout in layouts),
        "views": [
            {"image": name, "name": view.name, "size": view.size, "grid": view.grid, "box": view.box}
            | ({"maps": view.maps} if view.maps else {})
            for name, layout in zip(names, layouts, strict=True)
            for view in layout.views
        ],
    }
