"""Bodies of requests: JSON as OpenAI's clients write it, and what of it this server knows.

A field that would change the answer and is not served is refused; those that only tell who asks are taken and
left alone.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from stepwell.serve.errors import ApiError
from stepwell.views.tiling import MOST_OVERLAP

__all__ = [
    "ChatBody",
    "ImagePart",
    "ImageUrl",
    "Message",
    "PredictBody",
    "ResponseFormat",
    "TextPart",
    "TilesBody",
    "read_fields",
    "read_json",
]

Body = TypeVar("Body", bound=BaseModel)
_MOST_PARTS, _MOST_ESCAPES = 200_000, 2_000_000  # some libraries write / of base64 with an escape


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """detail: "low" shows the image to smaller views, of half the sides where the system can take them."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


Fraction = Annotated[float, Field(ge=0, le=1)]


class ImagePart(_Strict):
    """region: what is looked at closely, left, top, right and bottom in fractions of the image's sides."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(lambda url: {"url": url} if isinstance(url, str) else url)]
    region: tuple[Fraction, Fraction, Fraction, Fraction] | None = None

    @field_validator("region")
    @classmethod
    def _has_an_inside(cls, region: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if region is not None and not (region[0] < region[2] and region[1] < region[3]):
            raise ValueError("a region is left, top, right and bottom, with left < right and top < bottom")
        return region


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """What an answer carries beside its content may come back, empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("a text")] | Annotated[list[Part], Field(max_length=2000), Tag("parts")],
        Discriminator(lambda content: "parts" if isinstance(content, list) else "a text"),
    ]
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(default=None, max_length=0)
    annotations: list[Any] | None = Field(default=None, max_length=0)


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # nothing is added to hide the length of a piece


class ResponseFormat(_Strict):
    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class ChatBody(_Strict):
    """Of /v1/chat/completions. temperature: 0, the best token always, unless it is said. max_pixels: of the
    views of every image; fewer than the system's own choose smaller views.
    """

    messages: list[Message] = Field(min_length=1, max_length=1000)
    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    max_pixels: int | None = Field(default=None, ge=1)
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: Any = None
    store: Literal[False] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    top_logprobs: None = None
    reasoning_effort: None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _says_once_how_long(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is max_completion_tokens by its older name: give one of them")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class TilesBody(_Strict):
    """As of `stepwell.Tiles`."""

    size: int | None = Field(default=None, ge=32)
    overlap: float | None = Field(default=None, gt=0, le=MOST_OVERLAP)
    scale: float | None = Field(default=None, gt=0, le=16)


class PredictBody(_Strict):
    """Of /v1/predict; an image whose bytes are the body has these, but for itself, in the query."""

    image: str | None = None
    model: str | None = None
    threshold: float | None = Field(default=None, ge=0, le=1)
    max_detections: int | None = Field(default=None, ge=1)
    tiles: Annotated[
        Annotated[bool, Tag("a switch")] | Annotated[TilesBody, Tag("how")],
        Discriminator(lambda tiles: "how" if isinstance(tiles, dict | TilesBody) else "a switch"),
    ] = False


def read_json(kind: type[Body], raw: bytes) -> Body:
    """Raises ApiError that names the first field that is wrong, never its value."""
    # Python is deaf while it reads JSON: base64 has none of these, and a long text few.
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > _MOST_PARTS or raw.count(b"\\") > _MOST_ESCAPES:
        raise ApiError(413, "the body has too many parts", code="request_too_large")
    try:
        fields = json.loads(raw)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError:  # of UTF-8 too
        raise ApiError(400, "the body is not JSON") from None
    return read_fields(kind, fields)


def read_fields(kind: type[Body], fields: Any) -> Body:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = [str(part) for part in first["loc"] if part in _FIELDS or isinstance(part, int)]
        param = ".".join(place) or None
        raise ApiError(400, f"{param or 'the body'}: {_complaint(dict(first))}", param=param) from None


def _complaint(error: dict[str, Any]) -> str:
    """pydantic's, where it does not hold a value of the request."""
    if error["type"] == "extra_forbidden":
        return "it has a field that this server does not know"
    if error["type"] == "union_tag_invalid":
        return f"its type is one of {error['ctx']['expected_tags']}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{message[:1].lower()}{message[1:]}"


_MODELS = (
    TextPart,
    ImageUrl,
    ImagePart,
    Message,
    _StreamOptions,
    ResponseFormat,
    ChatBody,
    TilesBody,
    PredictBody,
)
_FIELDS = {field for model in _MODELS for field in model.model_fields}
"""The names that a complaint may tell: others would be a request's own words."""
