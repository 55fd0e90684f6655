"""The fields of a recipe whose task is `reader`: those of a chat, pages drawn and scanned, and losses that
only training has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from stepwell.train.chat_recipe import ChatModel, ChatRecipe, ChatStage, ConversationData
from stepwell.train.recipe import Place, Positive, Rate, Share, Strict

__all__ = [
    "LINE_LOSSES",
    "CutLineData",
    "DrawnData",
    "ReaderModel",
    "ReaderRecipe",
    "ReaderStage",
    "TextLineData",
]


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if not 0 < ends[0] <= ends[1]:
        raise ValueError(f"a range is (least, most), above 0 and rising, got {list(ends)}")
    return ends


Range = Annotated[tuple[float, float], AfterValidator(_rising)]


class ReaderModel(ChatModel):
    """tokenizer: by default reader/tokenizer.py's. start_looking: coordinates and attention begin as start.py
    says.
    """

    start_looking: bool = False


class DrawnData(Strict):
    """Pages drawn on the fly (drawn.py)."""

    kind: Literal["drawn"]
    weight: Rate | None = None
    count: Positive = 100_000
    seed: int = 0
    sides: tuple[Positive, Positive] = (320, 320)
    aspect: Range = (1.0, 1.0)
    text: tuple[Positive, Positive] = (12, 28)
    reads: Positive = 16
    close: Share = 0.0
    page: Literal["mixed", "receipt", "document", "table", "form", "lines"] = "mixed"
    fonts: Place | None = None
    worn: Share = 0.5


class TextLineData(Strict):
    """Images with transcribed lines in a COCO file, and key fields in a JSONL file."""

    kind: Literal["text_lines"]
    weight: Rate | None = None
    path: Place
    images: Place
    fields: Place | None = None
    reads: Positive = 16
    whole: Share = 0.5
    close: Share = 0.0
    text: Range = (13.0, 26.0)
    long_side: Positive = 1024
    seed: int = 0


_HEIGHT_OF_A_ROW = 1.3  # by that of its lines


class CutLineData(Strict):
    """Sheets of lines cut out of such images (cut_lines.py)."""

    kind: Literal["cut_lines"]
    weight: Rate | None = None
    path: Place
    images: Place
    size: tuple[Positive, Positive] = (384, 1024)
    text: Range = (16.0, 44.0)
    reads: Positive = 16
    close: Share = 0.0
    page: Range = (1.0, 1.0)
    seed: int = 0

    @model_validator(mode="after")
    def _looked_at_in_one_way(self) -> CutLineData:
        if self.page[0] < 1:
            raise ValueError(f"page is how many times a sheet, at least 1, got {self.page[0]:g}")
        if _HEIGHT_OF_A_ROW * self.text[1] > self.size[0]:
            raise ValueError(f"lines {self.text[1]:g} pixels high do not fit a sheet of {self.size[0]}")
        if self.close and self.page[1] > 1:
            raise ValueError(
                "a sheet is looked at closely on its page, or one of its lines is: page or close"
            )
        return self


Loss = Literal["language", "frames", "ctc", "pointer", "tokens"]
LINE_LOSSES: dict[Loss, str] = {"frames": "read", "ctc": "spell"}
"""Those of the line head, and which of its layers is theirs alone."""
_LOSSES_OF: dict[str, tuple[Loss, ...]] = {
    "frame_step": (*LINE_LOSSES, "tokens"),
    "spread": ("frames", "tokens"),
    "pointer_layers": ("pointer",),
    "pointer_head": ("pointer",),
    "packed": ("language", "pointer"),
    "averaging": ("language", "pointer", *LINE_LOSSES),
}
Data = Annotated[DrawnData | ConversationData | TextLineData | CutLineData, Field(discriminator="kind")]


class ReaderStage(ChatStage):
    """frame_step: pixels of the last view between two frames of a line. spread: frames also of lines whose
    characters are only taken to be equally wide, as they are on most receipts: a start for the loss "ctc",
    which alone takes long to begin. The pointer is a head of layers.
    """

    losses: Annotated[Mapping[Loss, Rate], Field(min_length=1)] = {"language": 1.0}  # type: ignore[assignment]
    sampling: Literal["random"] = "random"  # pages are drawn before their words can be counted
    frame_step: Rate = 4.0
    spread: bool = False
    pointer_layers: Annotated[tuple[int, ...], Field(min_length=1)] = (1, 2)
    pointer_head: Annotated[int, Field(ge=0)] = 0
    data: Annotated[tuple[Data, ...], Field(min_length=1)]  # type: ignore[assignment]
    validation: tuple[Data, ...] = ()  # type: ignore[assignment]

    @property
    def power(self) -> float:
        """Views, and samples that point, weigh as their numbers of points to this."""
        return 0.5 if self.averaging == "square" else 0.0

    @model_validator(mode="after")
    def _fields_have_their_loss(self) -> ReaderStage:
        for field, losses in _LOSSES_OF.items():
            if field in self.model_fields_set and not set(losses) & set(self.losses):
                raise ValueError(
                    f"{field} is of the loss {' or '.join(losses)}, which the stage does not name"
                )
        return self


class ReaderRecipe(ChatRecipe):
    task: Literal["reader"]  # type: ignore[assignment]
    model: ReaderModel
    stages: Annotated[tuple[ReaderStage, ...], Field(min_length=1)]
