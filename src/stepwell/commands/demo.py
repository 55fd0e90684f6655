"""`stepwell demo`: a page to ask models about pictures.

Nothing imported above imports torch: what needs no model is answered before it is there.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from stepwell.commands.limits import MaxAspect, MaxBytes, MaxPixels, MaxSeconds, MaxSide, image_limits
from stepwell.commands.loading import Device, Dtype, MaxNewTokens, check_model, quieten, short_name
from stepwell.folders import SHIPPED, SHIPPED_DETECTOR

__all__ = ["demo"]


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="A model folder, a hub name or a published name; may be repeated. [default: the shipped]",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    max_new_tokens: MaxNewTokens = 256,
    device: Device = None,
    dtype: Dtype = None,
    max_pixels: MaxPixels = None,
    max_side: MaxSide = None,
    max_aspect: MaxAspect = None,
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
) -> None:
    """Show a page: a picture, a question, the answer and what the model saw, two models side by side."""
    limits = image_limits(
        max_pixels=max_pixels,
        max_side=max_side,
        max_aspect=max_aspect,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
    )
    names = model or [SHIPPED.name, SHIPPED_DETECTOR.name]
    for name in names:
        check_model(name, device)
    try:
        import gradio  # noqa: F401

        from stepwell.serve.run import listen
    except ModuleNotFoundError as error:
        raise ImportError(f"the page needs {error.name}: pip install 'stepwell[demo]'") from None
    listen(host, port).close()  # gradio would take the next port that is free
    quieten()
    from stepwell.serve.page import show
    from stepwell.serve.settings import ServerSettings
    from stepwell.weights.load import load

    shown = names if len({*map(short_name, names)}) < len(names) else [short_name(name) for name in names]
    loaded = {title: load(name, device=device, dtype=dtype) for title, name in zip(shown, names, strict=True)}
    settings = ServerSettings(name="demo", batch=1, max_new_tokens=max_new_tokens, limits=limits)
    print(f"the page is at http://{host}:{port}; Ctrl-C ends it", file=sys.stderr)
    show(loaded, settings, host=host, port=port)
