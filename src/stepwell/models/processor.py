"""Pictures and text -> what a model takes, with as many placeholder tokens as the picture has visual
tokens.

The processor holds the geometry of the vision system, the same that the model holds, so both count alike.
Letters: L text length, V views in all, (H, W) the largest of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import MultiModalData

from stepwell.images.open import open_image
from stepwell.language.chat_template import chat_template as jinja
from stepwell.language.labels import LabelledTokens, label_tokens, render_with_tokenizer
from stepwell.language.prompt import IMAGE, MaskStyle, Message, render
from stepwell.models.settings import PlainConfig, VisionConfig, vision_json, vision_settings
from stepwell.models.vision import build_geometry
from stepwell.structures import Geometry, TokenLayout

__all__ = ["StepwellImageProcessor", "StepwellProcessor"]

_NOT_FOR_TEXT = frozenset(
    {
        "text_kwargs",
        "images_kwargs",
        "common_kwargs",
        "videos",
        "audio",
        "return_tensors",
        "return_mm_token_type_ids",
        "sanitize_control_tokens",
    }
)
_SAVED_BESIDE = frozenset({"image_processor_type", "processor_class", "backend", "use_fast"})


class StepwellImageProcessor(BaseImageProcessor):
    """Pictures -> `pixel_values` (V, 3, H, W), zero-padded at the right and bottom, and `image_sizes`
    (pictures, 2).

    vision_config: settings of a vision system or their JSON. Images may be all that `stepwell.open_image`
    takes, and are opened within its limits.
    """

    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012

    def __init__(self, vision_config: VisionConfig | dict[str, Any] | None = None, **kwargs: Any) -> None:
        if unknown := sorted(kwargs.keys() - _SAVED_BESIDE):
            raise ValueError(f"StepwellImageProcessor knows no {', '.join(map(repr, unknown))}")
        super().__init__(**kwargs)
        self.vision_config = vision_json(PlainConfig() if vision_config is None else vision_config)

    @cached_property
    def geometry(self) -> Geometry:
        return build_geometry(vision_settings(self.vision_config))

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        output.pop("geometry", None)
        return output

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Anything that names or holds a picture -> an upright RGB PIL image; lists are kept as they are
        nested."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        return open_image(image_url_or_urls)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """A picture, a list of them, or lists of lists -> BatchFeature, in reading order."""
        pictures = list(_flat(self.fetch_images(images)))
        views: list[Tensor] = []
        for picture in pictures:
            layout = self.geometry.layout((picture.height, picture.width))
            views += self.geometry.views(picture, layout)
        sizes = torch.tensor([(picture.height, picture.width) for picture in pictures])
        return BatchFeature(
            {"pixel_values": _stack_padded(views), "image_sizes": sizes}, tensor_type=return_tensors
        )

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)


class StepwellProcessor(ProcessorMixin):
    """An image processor and a tokenizer that agree on what a picture costs.

    In text, each `image_token` stands for one picture and is expanded to its layout's runs; separators
    become the text that `separators` gives them. Raises ValueError, with both counts, where placeholders
    and pictures do not match.
    """

    def __init__(
        self,
        image_processor: StepwellImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        template: str | None = None,
        separators: dict[str, str] | None = None,
    ) -> None:
        if image_processor is None or tokenizer is None:
            raise ValueError("a processor is made of an image_processor and a tokenizer; give both")
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {IMAGE!r}; add it as a special token first")
        tokenizer.padding_side = "left"  # where `generate` wants it
        self.template = template
        self.separators = dict(separators or {})
        if chat_template is None and template is not None:
            chat_template = jinja(template)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def geometry(self) -> Geometry:
        return self.image_processor.geometry  # type: ignore[no-any-return]

    def expand(self, layout: TokenLayout) -> str:
        """The text that stands for a picture: placeholders, and separators between them."""
        return "".join(
            self.image_token * run.count if run.separator is None else self.separators[run.separator]
            for run in layout.runs
        )

    def image_tokens(self, layout: TokenLayout) -> list[int]:
        """The token ids that stand for a picture."""
        ids: list[int] = []
        for run in layout.runs:
            if run.separator is None:
                ids += [self.image_token_id] * run.count
            else:
                ids += self.tokenizer(self.separators[run.separator], add_special_tokens=False).input_ids
        return ids

    def encode(
        self,
        messages: Sequence[Message],
        images: Any = None,
        *,
        add_generation_prompt: bool = False,
        mask_style: MaskStyle = "content",
    ) -> tuple[LabelledTokens, BatchFeature]:
        """One conversation and its pictures in order -> token ids with labels, and the pictures' tensors.

        Pictures are those in the messages, {"type": "image", "image": ...}, unless `images` gives them.
        What people wrote stays text, even where it spells a special token. The second value is empty
        without pictures.
        """
        pictures = _pictures_of(messages) if images is None else images
        pictures = list(_flat(self.image_processor.fetch_images(pictures)))
        if self.template is None:
            rendered = render_with_tokenizer(
                self.tokenizer, messages, add_generation_prompt=add_generation_prompt
            )
        else:
            rendered = render(
                self.template, messages, add_generation_prompt=add_generation_prompt, mask_style=mask_style
            )
        layouts = [self.geometry.layout((picture.height, picture.width)) for picture in pictures]
        tokens = label_tokens(rendered, self.tokenizer, [self.image_tokens(layout) for layout in layouts])
        return tokens, self.image_processor(pictures) if pictures else BatchFeature()

    def prompt(self, conversations: Sequence[Sequence[Message]]) -> BatchFeature:
        """Conversations that end with a user message -> one left-padded batch for `generate`."""
        encoded = [self.encode(messages, add_generation_prompt=True) for messages in conversations]
        longest = max(len(tokens.input_ids) for tokens, _ in encoded)
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        rows, masks = [], []
        for tokens, _ in encoded:
            missing = longest - len(tokens.input_ids)
            rows.append([padding] * missing + tokens.input_ids)
            masks.append([0] * missing + [1] * len(tokens.input_ids))
        data = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
        pictures = [features for _, features in encoded if features]
        if pictures:
            views = [view for features in pictures for view in features["pixel_values"]]
            data["pixel_values"] = _stack_padded(views)
            data["image_sizes"] = torch.cat([features["image_sizes"] for features in pictures])
        return BatchFeature(data)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """text: one string or several; images: all their pictures in order, flat or nested by string."""
        texts = [text] if isinstance(text, str) else list(text or [])
        fetched = [] if images is None else self.image_processor.fetch_images(images)
        pictures = list(_flat(fetched))
        data: dict[str, Any] = dict(self.image_processor(pictures)) if pictures else {}
        if text is not None:
            if isinstance(fetched, list) and any(isinstance(row, list) for row in fetched):
                _check_rows(texts, fetched)
            expanded = self._expand_all(texts, pictures)
            wants_types = kwargs.get("return_mm_token_type_ids", False)
            data |= self.tokenizer(expanded, **_text_arguments(kwargs, type(self.tokenizer)))
            if wants_types:
                rows = data["input_ids"]
                data["mm_token_type_ids"] = [[int(i == self.image_token_id) for i in row] for row in rows]
        return BatchFeature(
            data, tensor_type=return_tensors or kwargs.get("text_kwargs", {}).get("return_tensors")
        )

    def _expand_all(self, texts: list[str], pictures: list[Image.Image]) -> list[str]:
        placeholders = sum(text.count(self.image_token) for text in texts)
        if placeholders != len(pictures):
            raise ValueError(
                f"the text has {placeholders} {self.image_token} placeholders "
                f"but {len(pictures)} pictures were given"
            )
        runs = iter([self.expand(self.geometry.layout((p.height, p.width))) for p in pictures])
        return [
            head + "".join(next(runs) + piece for piece in rest)
            for head, *rest in (text.split(self.image_token) for text in texts)
        ]

    def _get_num_multimodal_tokens(self, image_sizes: Iterable[Sequence[int]] | None = None, **_: Any) -> Any:
        """Placeholders and views of pictures of the given (H, W) sizes, asked for by inference servers."""
        if image_sizes is None:
            return MultiModalData()
        layouts = [self.geometry.layout((int(height), int(width))) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[layout.num_tokens for layout in layouts],
            num_image_patches=[len(layout.inputs) for layout in layouts],
        )

    @property
    def image_token_ids(self) -> list[int]:
        """The tokens that stand for a picture, asked for by inference servers."""
        return [self.image_token_id]

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


def _text_arguments(kwargs: dict[str, Any], tokenizer: type) -> dict[str, Any]:
    """The tokenizer's share of a call: flat, or under `text_kwargs`; tensors are made once, of everything."""
    merged = {**kwargs, **kwargs.get("text_kwargs", {}), **kwargs.get("common_kwargs", {})}
    chosen = {key: value for key, value in merged.items() if key not in _NOT_FOR_TEXT and value is not None}
    if unknown := sorted(chosen.keys() - signature(tokenizer.__call__).parameters.keys()):
        raise ValueError(f"StepwellProcessor knows no {', '.join(map(repr, unknown))}; check the spelling")
    return chosen


def _check_rows(texts: list[str], rows: list[Any]) -> None:
    """Pictures nested by text: each text needs as many as it has placeholders."""
    if len(texts) != len(rows):
        raise ValueError(f"{len(rows)} lists of pictures were given for {len(texts)} texts")
    for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
        placeholders, given = text.count(IMAGE), len(list(_flat(row)))
        if placeholders != given:
            raise ValueError(f"text {i} has {placeholders} {IMAGE} placeholders but {given} pictures")


def _pictures_of(messages: Sequence[Message]) -> list[Any]:
    """The pictures in messages whose content is a list, in reading order."""
    parts = [
        part for message in messages if not isinstance(message["content"], str) for part in message["content"]
    ]
    return [picture for part in parts if (picture := _picture_in(part)) is not None]


def _picture_in(part: Message) -> Any:
    """The picture of one part of a message, in transformers' and in OpenAI's way of writing."""
    if part["type"] == "image_url":
        address = part["image_url"]
        return address["url"] if isinstance(address, dict) else address
    if part["type"] != "image":
        return None
    if "base64" in part:
        return f"data:image;base64,{part['base64']}"
    return next((part[key] for key in ("image", "url", "path") if key in part), None)


def _flat(images: Any) -> Iterable[Image.Image]:
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from _flat(item)
    else:
        yield images


def _stack_padded(views: list[Tensor]) -> Tensor:
    """(3, h, w) each -> (V, 3, L, L), L the longest side: alike for all pictures of a pyramid, so that others
    may join batches made apart."""
    side = max(max(view.shape[1:]) for view in views)
    return torch.stack([F.pad(view, (0, side - view.shape[2], 0, side - view.shape[1])) for view in views])
