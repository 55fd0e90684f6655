"""`stepwell serve`: a model over HTTP, as OpenAI's clients ask, or pictures in and predictions out.

Nothing imported above imports torch: what needs no model is answered before it is there.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from stepwell.commands.limits import MaxAspect, MaxBytes, MaxPixels, MaxSeconds, MaxSide, image_limits
from stepwell.commands.loading import Device, Dtype, Revision, check_model, quieten, short_name
from stepwell.folders import SHIPPED

__all__ = ["serve"]

_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model folder, a hub name or a published name. [default: the shipped reader]",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 is all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model. [default: its folder's or own name]")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="STEPWELL_API_KEY",
            help="That requests under /v1 have to show; the variable keeps it out of lists of processes.",
        ),
    ] = None,
    allow_media: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST", help="Fetch images from this host; may be repeated. [default: from none]"
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", min=1, help="Requests answered together.")
    ] = 8,
    queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait beside them; others are told 429.")
    ] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, whatever a request wants.")] = 512,
    max_images: Annotated[int, typer.Option(min=1, help="Of a request.")] = 16,
    max_request_seconds: Annotated[
        float, typer.Option(min=1, help="For a request, waiting counted.")
    ] = 120.0,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    max_pixels: MaxPixels = None,
    max_side: MaxSide = None,
    max_aspect: MaxAspect = None,
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
) -> None:
    """Serve a model: /v1/chat/completions as OpenAI's clients ask it, or /v1/predict."""
    limits = image_limits(
        max_pixels=max_pixels,
        max_side=max_side,
        max_aspect=max_aspect,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
    )
    check_model(model, device)
    try:
        from stepwell.serve.fetch import host_of
        from stepwell.serve.run import listen
        from stepwell.serve.run import serve as run
        from stepwell.serve.settings import ServerSettings
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "pebble", "prometheus_client"):
            raise
        raise ImportError(f"a server needs {error.name}: pip install 'stepwell[serve]'") from None

    settings = ServerSettings(
        name=name or short_name(model or SHIPPED.name),
        api_key=api_key,
        media_hosts=frozenset(map(host_of, allow_media or ())),
        batch=batch_size,
        queue=queue,
        max_new_tokens=max_new_tokens,
        max_images=max_images,
        seconds=max_request_seconds,
        limits=limits,
    )
    listening = listen(host, port)
    quieten()
    from stepwell.weights.load import load

    loaded = load(model, device=device, dtype=dtype, revision=revision)
    if host not in _LOCAL and api_key is None:
        print(
            f"stepwell: whoever reaches port {port} may ask: --api-key, or STEPWELL_API_KEY, wants a key",
            file=sys.stderr,
        )
    run(loaded, settings, listening)
