"""The task `reader`: a small assistant learns to read, with losses that show it where the characters stand.

Beside the answers' loss there are two that exist in training only: "frames" (line_head.py) and "pointer"
(pointer.py). Letters: (h, w) the grid of an image's visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stepwell.data.sample import Source
from stepwell.language.labels import IGNORE
from stepwell.layers.zero import zero_through
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.reader.drawn import DrawnPages
from stepwell.reader.line_head import LineHead, frame_loss, frames_along
from stepwell.reader.page import Line
from stepwell.reader.pointer import DECODERS, Pointers, tap_attention
from stepwell.reader.start import start_looking
from stepwell.reader.text_lines import TextLines
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.structures import Geometry, TokenLayout
from stepwell.train.chat import (
    ChatModel,
    ChatRecipe,
    ChatStage,
    ChatTask,
    ConversationData,
    language_loss,
    token_accuracy,
)
from stepwell.train.collate import Example, Row
from stepwell.train.recipe import Positive, Rate, Recipe, Share, Strict

__all__ = [
    "DrawnData",
    "ReaderExample",
    "ReaderModel",
    "ReaderRecipe",
    "ReaderStage",
    "ReaderTask",
    "ReaderTraining",
    "TextLineData",
]

Range = tuple[float, float]


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
    page: Literal["mixed", "receipt", "document", "table", "form", "lines"] = "mixed"
    fonts: Path | None = None
    worn: Share = 0.5


class TextLineData(Strict):
    """Images with transcribed lines in a COCO file, and key fields in a JSONL file."""

    kind: Literal["text_lines"]
    weight: Rate | None = None
    path: Path
    images: Path
    fields: Path | None = None
    reads: Positive = 16
    long_side: Positive = 1024
    seed: int = 0


Loss = Literal["language", "frames", "pointer"]
_LOSS_OF: dict[str, Loss] = {"frame_step": "frames", "pointer_layers": "pointer", "pointer_head": "pointer"}
Data = Annotated[DrawnData | ConversationData | TextLineData, Field(discriminator="kind")]


class ReaderStage(ChatStage):
    """frame_step: pixels of the last view between two frames of a line. The pointer is a head of layers."""

    losses: Annotated[Mapping[Loss, Rate], Field(min_length=1)] = {"language": 1.0}  # type: ignore[assignment]
    sampling: Literal["random"] = "random"  # pages are drawn before their words can be counted
    frame_step: Rate = 4.0
    pointer_layers: Annotated[tuple[int, ...], Field(min_length=1)] = (1, 2)
    pointer_head: Annotated[int, Field(ge=0)] = 0
    data: Annotated[tuple[Data, ...], Field(min_length=1)]  # type: ignore[assignment]
    validation: tuple[Data, ...] = ()  # type: ignore[assignment]

    @model_validator(mode="after")
    def _fields_have_their_loss(self) -> ReaderStage:
        for field, loss in _LOSS_OF.items():
            if field in self.model_fields_set and loss not in self.losses:
                raise ValueError(f"{field} is of the loss {loss}, which the stage does not name")
        return self


class ReaderRecipe(ChatRecipe):
    task: Literal["reader"]  # type: ignore[assignment]
    model: ReaderModel
    stages: Annotated[tuple[ReaderStage, ...], Field(min_length=1)]


class ReaderTraining(StepwellForConditionalGeneration):
    """The model and the head that only training needs; its forward gives the stage's losses."""

    def __init__(self, config: StepwellConfig, stage: ReaderStage) -> None:
        super().__init__(config)
        self.stage = stage
        embedding = self.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        self.line_head = LineHead(embedding.embedding_dim)

    def forward(
        self,
        labels: Tensor,
        pointers: Sequence[Pointers],
        frames: Sequence[Any],
        image_sizes: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """A batch of `ReaderTask.collate` -> the losses that the stage names; in evaluation the score
        `accuracy` beside that of language.
        """
        losses: dict[str, Tensor] = {}
        images = {} if image_sizes is None else {"image_sizes": image_sizes}
        if "language" in self.stage.losses or "pointer" in self.stage.losses:
            layers = self.model.language_model.layers if "pointer" in self.stage.losses else []
            with tap_attention([layers[i] for i in self.stage.pointer_layers] if layers else []) as tap:
                losses["language"], outputs = language_loss(super().forward, labels, **inputs, **images)
            if layers:
                pointer_loss = tap.loss(pointers, head=self.stage.pointer_head)
                losses["pointer"] = outputs.logits.sum() * 0.0 if pointer_loss is None else pointer_loss
            visual_tokens = outputs.image_hidden_states
        elif image_sizes is not None:
            regions = inputs.get("image_regions")
            visual_tokens = torch.cat(self.get_image_features(inputs["pixel_values"], image_sizes, regions))
        if "frames" in self.stage.losses:
            losses["frames"] = (
                zero_through(self.line_head)
                if image_sizes is None
                else self._frame_loss(
                    visual_tokens, self.model.layouts(image_sizes, inputs.get("image_regions")), frames
                )
            )
        nothing = zero_through(self.model.vision) if image_sizes is None else 0.0
        found = {name: loss + nothing for name, loss in losses.items() if name in self.stage.losses}
        if "language" in found and not self.training:
            found["accuracy"] = token_accuracy(outputs, labels)
        return found

    def _frame_loss(
        self, visual_tokens: Tensor, layouts: Sequence[TokenLayout], frames: Sequence[Any]
    ) -> Tensor:
        """The mean over the images that have frames."""
        tokens = visual_tokens.split([layout.num_visual for layout in layouts])
        losses = [
            frame_loss(self.line_head, visual, layout.views[-1].grid, targets)
            for visual, layout, targets in zip(tokens, layouts, frames, strict=True)
            if len(targets["classes"])
        ]
        if not losses:
            return visual_tokens.sum() * 0.0 + zero_through(self.line_head)
        return torch.stack(losses).mean()


class ReaderExample(NamedTuple):
    """A prepared page: where its answers point, and the frames (line_head.py) of each of its images."""

    example: Example
    pointers: Pointers
    frames: list[Any]


class ReaderTask(ChatTask):
    """A stage that trains a small assistant with the losses of a reader."""

    recipe: ClassVar[type[Recipe]] = ReaderRecipe

    def __init__(self, recipe: Any, stage: Any) -> None:
        super().__init__(recipe, stage)
        if "frames" in stage.losses:
            self.learning = (*stage.train, "line_head")
        if stage.losses.keys() & {"frames", "pointer"}:
            _check_grid(self.collator.processor.geometry)
        # Starting values are those of the head that will be told where to look, in whichever stage.
        self.pointing = next((s for s in (stage, *recipe.stages) if "pointer" in s.losses), stage)
        if "pointer" in stage.losses or recipe.model.start_looking:
            _check_decoder(self.config.text_config, self.pointing)

    @classmethod
    def build_tokenizer(cls, model: Any) -> Any:
        return build_reader_tokenizer() if model.tokenizer is None else super().build_tokenizer(model)

    def build(self) -> nn.Module:
        model: ReaderTraining = self.start(ReaderTraining, self.stage_config, stage=self.stage)
        if self.settings.model.start_looking:
            stage = self.pointing
            start_looking(
                model, self.processor.tokenizer, layers=stage.pointer_layers, head=stage.pointer_head
            )
        return model

    def outline(self) -> nn.Module:
        with torch.device("meta"):
            return ReaderTraining(self.stage_config, stage=self.stage)

    def parts(self, module: nn.Module) -> Mapping[str, str]:
        return {**super().parts(module), "line_head": "line_head"}

    def source(self, data: Any) -> Source:
        if isinstance(data, DrawnData):
            return DrawnPages(**data.model_dump(exclude={"kind", "weight"}))
        if isinstance(data, TextLineData):
            limits = self.settings.image_limits.build()
            return TextLines(**data.model_dump(exclude={"kind", "weight"}), limits=limits)
        return super().source(data)

    def prepare(self, sample: Any) -> ReaderExample:
        """As for a chat, with the pointers of its row and the frames of each image."""
        example = self.collator.prepare(sample)
        processor = self.collator.processor
        sizes = example.images["image_sizes"].tolist() if example.images else []
        layouts = [processor.geometry.layout((height, width)) for height, width in sizes]
        frames = [
            frames_along(
                getattr(sample, "lines", ()),
                layout.image_size,
                step=self.stage.frame_step * layout.image_size[1] / layout.views[-1].size[1],
            )
            for layout in layouts
        ]
        spelled = getattr(sample, "spelled", ())
        layout = layouts[0] if layouts else None
        pointers = _pointers(example.row, spelled, layout, processor.image_token_id)
        return ReaderExample(example, pointers, frames)

    def collate(self, samples: Sequence[Any]) -> dict[str, Any]:
        """As for a chat, with `pointers` of every row and `frames` of every image."""
        return {
            **self.collator([sample.example for sample in samples]),
            "pointers": [sample.pointers for sample in samples],
            "frames": [frames for sample in samples for frames in sample.frames],
        }

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor | int]:
        counts = {
            **super().counts(batch),
            "frames": sum(len(targets["classes"]) > 0 for targets in batch["frames"]),
            "pointer": sum(len(pointed["positions"]) > 0 for pointed in batch["pointers"]),
        }
        return {name: count for name, count in counts.items() if name in (*self.stage.losses, *self.scores)}


def _check_grid(geometry: Geometry) -> None:
    """Raises ValueError where the visual tokens are not one grid over the whole image: targets would be
    wrong.
    """
    layout = geometry.layout((60, 100))
    rows, cols = layout.views[-1].grid
    one_grid = len(layout.runs) == 1 and layout.num_visual == rows * cols
    if not one_grid or layout.views[-1].box != (0.0, 0.0, 100.0, 60.0):
        raise ValueError(
            "the losses frames and pointer need visual tokens that are one grid over the whole image; "
            "take a pyramid with framing aspect, or leave these losses out"
        )


def _check_decoder(text: Any, stage: ReaderStage) -> None:
    """Raises ValueError for a language model without the attention that the pointer and start.py know."""
    if text.model_type not in DECODERS:
        raise ValueError(
            f"start_looking and the loss pointer know the attention of {', '.join(DECODERS)}, not of "
            f"{text.model_type!r}; leave them out"
        )
    layers, head = stage.pointer_layers, stage.pointer_head
    places = range(-text.num_hidden_layers, text.num_hidden_layers)
    if not set(layers) <= set(places) or head >= text.num_attention_heads:
        raise ValueError(
            f"the pointer is head {head} of layers {', '.join(map(str, layers))}, counted from 0, but the "
            f"language model has {text.num_hidden_layers} layers of {text.num_attention_heads} heads"
        )


def _pointers(
    row: Row, spelled: Sequence[Line | None], layout: TokenLayout | None, image_token_id: int
) -> Pointers:
    """For answers that take one token a character and one for the end: where each character stands."""
    positions: list[int] = []
    cells: list[int] = []
    labels = row.labels.tolist()
    answers = [
        list(run)
        for is_answer, run in groupby(range(len(labels)), lambda i: labels[i] != IGNORE)
        if is_answer
    ]
    for answer, line in zip(answers, spelled, strict=False):  # the last turns may not have fitted
        if layout is None or line is None or len(answer) != len(line.text) + 1:
            continue
        (height, width), (rows, cols) = layout.image_size, layout.views[-1].grid
        middles = [(left + right) / 2 for left, right in zip(line.edges, line.edges[1:], strict=False)]
        positions += [position - 1 for position in answer[:-1]]
        cells += [_cell(line.middle(x), height, rows) * cols + _cell(x, width, cols) for x in middles]
    visual = (row.ids == image_token_id).nonzero()[:, 0]
    return Pointers(positions=torch.tensor(positions).long(), cells=torch.tensor(cells).long(), visual=visual)


def _cell(at: float, side: float, cells: int) -> int:
    """The cell of a coordinate on a side of so many pixels; what lies outside counts to the border."""
    return min(max(int(at / side * cells), 0), cells - 1)
