"""The fields of a recipe whose task is `chat`: the model, its stages, and their data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stepwell.models.published.papers import find_published
from stepwell.models.quantised import Bits
from stepwell.models.systems import vision_settings
from stepwell.models.vision import VisionConfig
from stepwell.train.collate import Averaging, TurnOrder
from stepwell.train.recipe import Place, Positive, Rate, Recipe, Share, Stage, Strict

__all__ = ["ChatModel", "ChatRecipe", "ChatStage", "ConversationData", "Lora"]


def _vision(value: Any) -> VisionConfig:
    if not isinstance(value, str):
        return vision_settings(value)
    published = find_published(value)
    if published is None or published.task != "chat":
        raise ValueError(f"vision {value!r} is no published assistant; `stepwell list published` names them")
    assert isinstance(published.settings, VisionConfig)  # as every assistant's
    return published.settings


class Lora(Strict):
    """Adapters (models/adapters.py) that learn in place of their parts, in all stages.

    bits: in which the linear layers beside them are stored meanwhile (models/quantised.py); the finished
    model has the layers as they were, and the adapters in them.
    """

    parts: Annotated[tuple[Literal["language", "vision"], ...], Field(min_length=1)] = ("language",)
    rank: Positive = 16
    alpha: Positive = 32
    dropout: Share = 0.0
    bits: Bits | None = None


class ChatModel(Strict):
    """A vision system, a language model's configuration, a tokenizer, a chat template; or a whole model.

    start: a folder, the shipped reader_tiny, or owner/name on the hub, of which a commit, branch or tag is
    the `revision`. vision: settings with their `kind`, or the name of a published model whose settings they
    are.
    parts: where parts start (models/parts.py), by the names of `ChatTask.parts`. text: a transformers
    configuration with its model_type; by default that of the part `language`, as is the tokenizer.
    revisions: of parts that start from the hub. boxes_are_regions: as of the finished model's processor.
    lora: low-rank adapters; the finished model has them in its weights, and where it has a `start`, they lie
    beside it for that, in adapter/.
    """

    start: str | None = None
    revision: str | None = None
    vision: Annotated[Any, BeforeValidator(_vision)] = None
    text: dict[str, Any] | None = None
    parts: dict[str, str] = {}
    revisions: dict[str, str] = {}
    tokenizer: str | None = None
    template: str | None = None
    boxes_are_regions: bool = False
    lora: Lora | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> ChatModel:
        alone = {"start", "revision", "lora"}
        if self.start is not None and (beside := sorted(self.model_fields_set - alone)):
            raise ValueError(f"start is a whole model; {beside[0]} beside it would be ignored")
        if self.start is None and self.revision is not None:
            raise ValueError("revision is of a start on the hub, and there is no start")
        language = self.parts.get("language")
        if self.text is None and language is not None and Path(language).expanduser().is_file():
            raise ValueError(
                f"parts.language {language} is a file, which says no configuration: give text too"
            )
        if self.start is None and (
            self.vision is None or (self.text is None and "language" not in self.parts)
        ):
            raise ValueError("give either start, or vision and text (or parts.language)")
        return self


class ConversationData(Strict):
    """A training file of images and conversations (data/conversations.py): a JSON list, JSON a line, or
    Parquet, of which a path with * is several files.

    prompt: a line behind every question. long_side: to which images are resized before anything else; or by
    what is in their paths, as {textvqa: 1024}. sliced: the share of the images, of all others, chosen by
    chance, that are resized to the area of `slices` slices, as LLaVA-UHD trains; those that give as many
    already are not.
    """

    kind: Literal["conversations"]
    weight: Rate | None = None
    path: Place
    images: Place | None = None  # the folder that image paths start from; None: the file's own
    prompt: str | None = None
    long_side: Positive | dict[str, Positive] | None = None
    sliced: Share = 0.0
    slices: Positive = 6

    @model_validator(mode="after")
    def _resized_once(self) -> ConversationData:
        if isinstance(self.long_side, int) and self.sliced:
            raise ValueError("images are resized once: give either long_side or sliced")
        return self


class ChatStage(Stage):
    """template: of this stage, where it is not the model's; max_length: tokens of a sample, whole turns go
    beyond. packed: the samples of a batch stand in one row. averaging: how much a sample weighs in the loss
    (train/collate.py). pad_to_multiple_of: rows are padded to a multiple of so many tokens: few lengths share
    kernels.
    sampling: "grouped" makes steps of samples that are alike (train/length_groups.py); "grouped_official"
    too, where all samples are texts by their negative lengths, as LLaVA's code does.
    """

    train: tuple[str, ...] = ("vision", "language")
    losses: Annotated[Mapping[Literal["language"], Rate], Field(min_length=1)] = {"language": 1.0}
    template: str | None = None
    turns: TurnOrder = "together"
    max_length: Positive = 8192
    packed: bool = False
    averaging: Averaging = "tokens"
    pad_to_multiple_of: Positive = 1
    sampling: Literal["random", "grouped", "grouped_official"] = "random"
    data: Annotated[tuple[ConversationData, ...], Field(min_length=1)]
    validation: tuple[ConversationData, ...] = ()

    @model_validator(mode="after")
    def _batches_are_made_once(self) -> ChatStage:
        if self.even and self.sampling != "random":
            raise ValueError(
                f"even batches would be made anew by sampling {self.sampling}: leave one of both out"
            )
        return self


class ChatRecipe(Recipe):
    task: Literal["chat"] = "chat"
    model: ChatModel
    stages: Annotated[tuple[ChatStage, ...], Field(min_length=1)]
