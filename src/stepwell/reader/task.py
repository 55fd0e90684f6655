"""The task `reader`: a small assistant learns to read, with losses that show it where the characters stand.

Beside the answers' loss there are three that exist in training only: "frames" and "ctc" (line_head.py), and
"pointer" (pointer.py). Letters: (h, w) the grid of an image's visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
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
from stepwell.models.vision import VisionSystem
from stepwell.ops.rearrange import map_to_tokens
from stepwell.reader.cut_lines import CutLines
from stepwell.reader.drawn import DrawnPages
from stepwell.reader.line_head import (
    Frames,
    LineHead,
    Spelled,
    ctc_loss,
    frame_loss,
    frames_along,
    spelled_along,
)
from stepwell.reader.page import Line
from stepwell.reader.pointer import DECODERS, Pointers, tap_attention
from stepwell.reader.start import start_looking
from stepwell.reader.text_lines import TextLines
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.structures import NO_REGION, Geometry, TokenLayout, View, VisionFeatures
from stepwell.train.chat import ChatTask, language_loss, token_accuracy
from stepwell.train.chat_recipe import ChatModel, ChatRecipe, ChatStage, ConversationData
from stepwell.train.collate import Example, Row
from stepwell.train.recipe import Positive, Rate, Recipe, Share, Strict

__all__ = [
    "CutLineData",
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
    close: Share = 0.0
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
    whole: Share = 0.5
    close: Share = 0.0
    text: Range = (13.0, 26.0)
    long_side: Positive = 1024
    seed: int = 0


class CutLineData(Strict):
    """Sheets of lines cut out of such images (cut_lines.py)."""

    kind: Literal["cut_lines"]
    weight: Rate | None = None
    path: Path
    images: Path
    size: tuple[Positive, Positive] = (384, 1024)
    text: Range = (16.0, 44.0)
    reads: Positive = 16
    close: Share = 0.0
    seed: int = 0


Loss = Literal["language", "frames", "ctc", "pointer"]
_LINES: tuple[Loss, Loss] = ("frames", "ctc")  # that the line head has
_LOSSES_OF: dict[str, tuple[Loss, ...]] = {
    "frame_step": _LINES,
    "spread": ("frames",),
    "pointer_layers": ("pointer",),
    "pointer_head": ("pointer",),
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


class ReaderTraining(StepwellForConditionalGeneration):
    """The model and the head that only training needs; its forward gives the stage's losses."""

    def __init__(self, config: StepwellConfig, stage: ReaderStage) -> None:
        super().__init__(config)
        self.stage = stage
        self.line_head = LineHead(self.model.vision.encoders[-1].spec.dim)

    def forward(
        self,
        labels: Tensor,
        pointers: Sequence[Pointers],
        frames: Sequence[Frames],
        spelled: Sequence[Spelled],
        image_sizes: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """A batch of `ReaderTask.collate` -> the losses that the stage names; in evaluation the score
        `accuracy` beside that of language.
        """
        losses: dict[str, Tensor] = {}
        images = {} if image_sizes is None else {"image_sizes": image_sizes}
        with kept_features(self.model.vision) as features:
            if "language" in self.stage.losses or "pointer" in self.stage.losses:
                layers = self.model.language_model.layers if "pointer" in self.stage.losses else []
                with tap_attention([layers[i] for i in self.stage.pointer_layers] if layers else []) as tap:
                    losses["language"], outputs = language_loss(super().forward, labels, **inputs, **images)
                if layers:
                    pointer_loss = tap.loss(pointers, head=self.stage.pointer_head)
                    losses["pointer"] = outputs.logits.sum() * 0.0 if pointer_loss is None else pointer_loss
            elif image_sizes is not None:
                self.get_image_features(inputs["pixel_values"], image_sizes, inputs.get("image_regions"))
        if "frames" in self.stage.losses:
            losses["frames"] = self._line_loss(frame_loss, features, frames)
        if "ctc" in self.stage.losses:
            losses["ctc"] = self._line_loss(ctc_loss, features, spelled)
        nothing = zero_through(self.model.vision) if image_sizes is None else 0.0
        found = {name: loss + nothing for name, loss in losses.items() if name in self.stage.losses}
        if "language" in found and not self.training:
            found["accuracy"] = token_accuracy(outputs, labels)
        return found

    def _line_loss(
        self, loss: Callable[..., Tensor], features: Sequence[VisionFeatures], targets: Sequence[Any]
    ) -> Tensor:
        """The mean over the images that have points, read from the map of their last view."""
        losses = [
            loss(self.line_head, map_to_tokens(seen.maps[-1].map[None])[0], seen.maps[-1].view.grid, wanted)
            for seen, wanted in zip(features, targets, strict=True)
            if len(wanted["points"])
        ]
        if not losses:
            return sum((seen.tokens.sum() * 0.0 for seen in features), zero_through(self.line_head))
        return torch.stack(losses).mean()


@contextmanager
def kept_features(vision: VisionSystem) -> Iterator[list[VisionFeatures]]:
    """Within the block, what the system makes of images is kept in the list, in the order of the images."""
    kept: list[VisionFeatures] = []
    encode = vision.encode

    def remember(inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        found = encode(inputs, layouts)
        kept.extend(found)
        return found

    vision.encode = remember  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        del vision.encode


class ReaderExample(NamedTuple):
    """A prepared page: where its answers point, and what stands along the lines (line_head.py) of each of its
    images.
    """

    example: Example
    pointers: Pointers
    frames: list[Frames]
    spelled: list[Spelled]


class ReaderTask(ChatTask):
    """A stage that trains a small assistant with the losses of a reader."""

    recipe: ClassVar[type[Recipe]] = ReaderRecipe

    def __init__(self, recipe: Any, stage: Any) -> None:
        super().__init__(recipe, stage)
        if set(_LINES) & set(stage.losses):
            self.learning = (*stage.train, "line_head")
        if {*_LINES, "pointer"} & set(stage.losses):
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
            module: nn.Module = self.with_adapters(ReaderTraining(self.stage_config, stage=self.stage))
        return module

    def parts(self, module: nn.Module) -> Mapping[str, str]:
        return {**super().parts(module), "line_head": "line_head"}

    def source(self, data: Any) -> Source:
        if isinstance(data, DrawnData):
            return DrawnPages(**data.model_dump(exclude={"kind", "weight"}))
        if isinstance(data, TextLineData):
            limits = self.settings.image_limits.build()
            return TextLines(**data.model_dump(exclude={"kind", "weight"}), limits=limits)
        if isinstance(data, CutLineData):
            limits = self.settings.image_limits.build()
            pages = TextLines(data.path, images=data.images, limits=limits)
            return CutLines(pages, **data.model_dump(exclude={"kind", "weight", "path", "images"}))
        return super().source(data)

    def prepare(self, sample: Any) -> ReaderExample:
        """As for a chat, with the pointers of its row and the points along the lines of each image."""
        example = self.collator.prepare(sample)
        processor = self.collator.processor
        sizes = example.images["image_sizes"].tolist() if example.images else []
        regions = example.images.get("image_regions", torch.tensor(NO_REGION).expand(len(sizes), -1)).tolist()
        views = [
            processor.geometry.layout_of((height, width), region if any(region) else None).views[-1]
            for (height, width), region in zip(sizes, regions, strict=True)
        ]
        lines = getattr(sample, "lines", ())
        steps = [self.stage.frame_step * (view.box[2] - view.box[0]) / view.size[1] for view in views]
        seen = [(lines, view.box, step) for view, step in zip(views, steps, strict=True)]
        frames = [frames_along(lines, box, step=step, spread=self.stage.spread) for lines, box, step in seen]
        spelled = [spelled_along(lines, box, step=step) for lines, box, step in seen]
        view = views[0] if views else None
        pointers = _pointers(example.row, getattr(sample, "spelled", ()), view, processor.image_token_id)
        return ReaderExample(example, pointers, frames, spelled)

    def collate(self, samples: Sequence[Any]) -> dict[str, Any]:
        """As for a chat, with `pointers` of every row, `frames` and `spelled` of every image."""
        return {
            **self.collator([sample.example for sample in samples]),
            "pointers": [sample.pointers for sample in samples],
            "frames": [frames for sample in samples for frames in sample.frames],
            "spelled": [spelled for sample in samples for spelled in sample.spelled],
        }

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor | int]:
        counts = {
            **super().counts(batch),
            "frames": sum(len(targets["points"]) > 0 for targets in batch["frames"]),
            "ctc": sum(len(targets["points"]) > 0 for targets in batch["spelled"]),
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
            "the losses frames, ctc and pointer need visual tokens that are one grid over what is seen; "
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


def _pointers(row: Row, spelled: Sequence[Line | None], view: View | None, image_token_id: int) -> Pointers:
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
        if view is None or line is None or len(answer) != len(line.text) + 1:
            continue
        (left, top, right, bottom), (rows, cols) = view.box, view.grid
        middles = [(start + end) / 2 for start, end in pairwise(line.edges)]
        positions += [position - 1 for position in answer[:-1]]
        cells += [
            _cell((line.middle(x) - top) / (bottom - top), rows) * cols
            + _cell((x - left) / (right - left), cols)
            for x in middles
        ]
    visual = (row.ids == image_token_id).nonzero()[:, 0]
    return Pointers(positions=torch.tensor(positions).long(), cells=torch.tensor(cells).long(), visual=visual)


def _cell(at: float, cells: int) -> int:
    """The cell of a fraction of a side; what lies outside counts to the border."""
    return min(max(int(at * cells), 0), cells - 1)
