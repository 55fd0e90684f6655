"""A page for people: a picture and a question, the answer, what a model saw and what it cost; two side by
side.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio
from PIL.Image import Image

from stepwell.images.limits import ImageError
from stepwell.serve.choices import Choice, Seen, choices_of
from stepwell.serve.decode import Decoder
from stepwell.serve.errors import ApiError, refusal
from stepwell.serve.log import log_fault
from stepwell.serve.scheduler import Scheduler
from stepwell.serve.settings import ServerSettings

__all__ = ["show"]

_NOTHING = Seen("")
_HELP = (
    "Choose or paste a picture, write a question and press Enter. Detectors, segmenters and classifiers need "
    "no question. A box in a question, such as [0.1, 0.4, 0.6, 0.45] in fractions of the sides, is looked at "
    "closely by models that were trained so."
)


def show(models: Mapping[str, Any], settings: ServerSettings, *, host: str, port: int) -> None:
    """Shows the page until Ctrl-C. models: names -> what `stepwell.load` gave. Raises ValueError for a model
    that answers and predicts nothing, and OSError for a port that cannot be had.
    """
    scheduler = Scheduler(batch=settings.batch, queue=settings.queue, on_fault=log_fault)
    decoder = Decoder(processes=settings.decoders, seconds=settings.seconds)
    blocks = _page(choices_of(models, settings, scheduler), decoder, settings)
    scheduler.start()
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            show_error=False,
            quiet=True,
            max_file_size=int(min(settings.limits.max_bytes, 10**12)),
            theme=_theme(),
            ssr_mode=False,
            footer_links=["settings"],
        )
    finally:
        scheduler.stop()
        decoder.stop()


def _theme() -> Any:
    """Of the browser's own typefaces: the page fetches nothing from elsewhere."""
    return gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def _page(choices: Mapping[str, Choice], decoder: Decoder, settings: ServerSettings) -> Any:
    names = list(choices)

    async def answers(
        message: dict[str, Any], left: str, right: str | None, is_beside: bool
    ) -> AsyncIterator[list[Any]]:
        """The outputs of both columns, ever more of them."""
        columns, i = [_NOTHING, _NOTHING], 0
        yield _outputs(columns)
        try:
            if len(message["files"]) > settings.max_images:
                raise ApiError(400, f"at most {settings.max_images} pictures can be shown at once")
            images = [await asyncio.to_thread(_opened, path, decoder, settings) for path in message["files"]]
            for i, name in enumerate([left, right or left] if is_beside else [left]):
                async for columns[i] in choices[name].look(images, message["text"]):
                    yield _outputs(columns)
        except ApiError as error:
            columns[i] = columns[i]._replace(text=f"Refused: {error.message}")
            yield _outputs(columns)

    with gradio.Blocks(title="Stepwell", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# Stepwell\n{_HELP}")
        message = gradio.MultimodalTextbox(
            file_count="multiple",
            sources=["upload"],
            placeholder="What is the total?",
            label="Picture and question",
            elem_id="message",
            max_plain_text_length=settings.max_text,
        )
        with gradio.Row():
            left = gradio.Dropdown(names, value=names[0], label="Model", elem_id="left-model")
            right = gradio.Dropdown(
                names, value=names[min(1, len(names) - 1)], label="Beside it", elem_id="right-model"
            )
            is_beside = gradio.Checkbox(label="Two side by side", elem_id="beside")
        outputs: list[Any] = []
        with gradio.Row():
            for side in ("left", "right"):
                with gradio.Column(visible=side == "left") as column:
                    outputs += [
                        gradio.Textbox(label="Answer", lines=3, interactive=False, elem_id=f"{side}-answer"),
                        gradio.Markdown(elem_id=f"{side}-costs"),
                        gradio.Image(
                            label="What the model saw, or found",
                            interactive=False,
                            type="pil",
                            format="png",
                            buttons=["download", "fullscreen"],
                            elem_id=f"{side}-drawn",
                        ),
                    ]
        is_beside.change(lambda shown: gradio.Column(visible=shown), is_beside, column)
        places = settings.batch + settings.queue
        message.submit(answers, [message, left, right, is_beside], outputs, concurrency_limit=places)
    return blocks.queue(max_size=places, api_open=False)


def _opened(path: str, decoder: Decoder, settings: ServerSettings) -> Image:
    """Raises ApiError."""
    try:
        raw = Path(path).read_bytes()
        return decoder.open(raw, settings.limits)
    except ImageError as error:
        raise refusal(error) from None


def _outputs(columns: Sequence[Seen]) -> list[Any]:
    return [part for seen in columns for part in (seen.text, seen.costs, seen.drawn)]
