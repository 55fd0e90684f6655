"""The task `reader`: a small assistant learns to read, with losses that show it where the characters stand.

Beside the answers' loss there are four that exist in training only: "frames" and "ctc" (line_head.py), read
from the maps of the finest views; "pointer" (pointer.py), and "tokens", by which visual tokens learn to
speak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, groupby, pairwise
from typing import Any, ClassVar, NamedTuple, TypedDict, TypeVar

import torch
import torch.nn.functional as F
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
    ALPHABET,
    Frames,
    LineHead,
    Points,
    Spelled,
    ctc_loss,
    frame_loss,
    frames_along,
    spelled_along,
)
from stepwell.reader.page import Line
from stepwell.reader.pointer import DECODERS, Pointers, tap_attention
from stepwell.reader.recipe import (
    LINE_LOSSES,
    CutLineData,
    DrawnData,
    ReaderRecipe,
    ReaderStage,
    TextLineData,
)
from stepwell.reader.start import start_looking
from stepwell.reader.text_lines import TextLines
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.structures import NO_REGION, TokenLayout, View, VisionFeatures
from stepwell.train.chat import ChatTask, language_loss, token_accuracy
from stepwell.train.collate import Example, Row
from stepwell.train.recipe import Recipe
from stepwell.views.places import finest_views, tokens_at

__all__ = ["ReaderExample", "ReaderTask", "ReaderTraining", "Spoken"]

PointsOfView = TypeVar("PointsOfView", bound=Points)


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
        frames: Sequence[Mapping[int, Frames]],
        spelled: Sequence[Mapping[int, Spelled]],
        spoken: Sequence[Spoken],
        image_sizes: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """A batch of `ReaderTask.collate` -> the losses that the stage names; in evaluation the score
        `accuracy` beside that of language.
        """
        losses: dict[str, Tensor] = {}
        images = {} if image_sizes is None else {"image_sizes": image_sizes}
        with _kept_features(self.model.vision) as features:
            if "language" in self.stage.losses or "pointer" in self.stage.losses:
                layers = self.model.language_model.layers if "pointer" in self.stage.losses else []
                with tap_attention([layers[i] for i in self.stage.pointer_layers] if layers else []) as tap:
                    losses["language"], outputs = language_loss(super().forward, labels, **inputs, **images)
                if layers:
                    power = self.stage.power
                    pointer_loss = tap.loss(pointers, head=self.stage.pointer_head, power=power)
                    losses["pointer"] = outputs.logits.sum() * 0.0 if pointer_loss is None else pointer_loss
            elif image_sizes is not None:
                self.get_image_features(inputs["pixel_values"], image_sizes, inputs.get("image_regions"))
        if "frames" in self.stage.losses:
            losses["frames"] = self._line_loss(frame_loss, features, frames)
        if "ctc" in self.stage.losses:
            losses["ctc"] = self._line_loss(ctc_loss, features, spelled)
        if "tokens" in self.stage.losses:
            losses["tokens"] = self._token_loss(features, spoken)
        nothing = zero_through(self.model.vision) if image_sizes is None else 0.0
        found = {name: loss + nothing for name, loss in losses.items() if name in self.stage.losses}
        if "language" in found and not self.training:
            found["accuracy"] = token_accuracy(outputs, labels)
        return found

    def _token_loss(self, features: Sequence[VisionFeatures], spoken: Sequence[Spoken]) -> Tensor:
        """Mean cross-entropy of the character at each frame, as the language model's own head reads it from
        the visual token that stands there: visual tokens begin to speak its language.
        """
        if not sum(len(said["characters"]) for said in spoken):
            return sum((found.tokens.sum() * 0.0 for found in features), zero_through(self.lm_head))
        seen = [found.tokens[said["tokens"]] for found, said in zip(features, spoken, strict=True)]
        logits = self.lm_head(self.model.language_model.norm(torch.cat(seen)))
        targets = torch.cat([said["characters"] for said in spoken])
        return F.cross_entropy(logits.float(), targets)

    def _line_loss(
        self,
        loss: Callable[..., Tensor],
        features: Sequence[VisionFeatures],
        targets: Sequence[Mapping[int, Any]],
    ) -> Tensor:
        """The weighted mean over the views that have points, each read from its finest map."""
        losses, weights = [], []
        for seen, of_views in zip(features, targets, strict=True):
            finest = {found.view: found.map for found in seen.maps}  # a view's finest comes last
            for i, wanted in of_views.items():
                map = finest[seen.layout.views[i]]
                grid = (map.shape[-2], map.shape[-1])
                losses.append(loss(self.line_head, map_to_tokens(map[None])[0], grid, wanted))
                weights.append(len(wanted["points"]) ** self.stage.power)
        if not losses:
            return sum((seen.tokens.sum() * 0.0 for seen in features), zero_through(self.line_head))
        shares = torch.tensor(weights).to(losses[0])
        mean: Tensor = (torch.stack(losses) * shares).sum() / shares.sum()
        return mean


@contextmanager
def _kept_features(vision: VisionSystem) -> Iterator[list[VisionFeatures]]:
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


class Spoken(TypedDict):
    """What visual tokens of an image show."""

    tokens: Tensor  # (F,) indices among the image's visual tokens
    characters: Tensor  # (F,) the language model's tokens for what stands there


class ReaderExample(NamedTuple):
    """A prepared page: where its answers point, and of each of its images what stands along the lines that
    its views show (line_head.py), by the number of the view, and at its visual tokens.
    """

    example: Example
    pointers: Pointers
    frames: list[dict[int, Frames]]
    spelled: list[dict[int, Spelled]]
    spoken: list[Spoken]


class ReaderTask(ChatTask):
    """A stage that trains a small assistant with the losses of a reader."""

    recipe: ClassVar[type[Recipe]] = ReaderRecipe

    def __init__(self, recipe: Any, stage: Any) -> None:
        super().__init__(recipe, stage)
        if set(LINE_LOSSES) & set(stage.losses):
            self.learning = (*stage.train, "line_head")
            self.frozen = [
                f"line_head.{LINE_LOSSES[loss]}" for loss in LINE_LOSSES.keys() - set(stage.losses)
            ]
        if "pointer" in stage.losses and stage.trainer.get("fsdp"):
            raise ValueError(
                f"stages.{stage.name}: the loss pointer looks into layers whose weights fsdp gathers only "
                "when they are called; leave one of both out"
            )
        tokenizer = self.processor.tokenizer
        known = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in ALPHABET}
        ids = [
            IGNORE if known[letter] in (None, tokenizer.unk_token_id) else known[letter]
            for letter in ALPHABET
        ]
        self.characters = torch.tensor([IGNORE, *ids])
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
        layouts = [
            processor.geometry.layout_of((height, width), region if any(region) else None)
            for (height, width), region in zip(sizes, regions, strict=True)
        ]
        lines = getattr(sample, "lines", ())
        frames: list[dict[int, Frames]] = []
        spelled: list[dict[int, Spelled]] = []
        for layout in layouts:
            seen = [(i, layout.views[i].box, self._step(layout.views[i])) for i in finest_views(layout)]
            along = {i: frames_along(lines, box, step=x, spread=self.stage.spread) for i, box, x in seen}
            frames.append(_with_points(along))
            spelled.append(_with_points({i: spelled_along(lines, box, step=x) for i, box, x in seen}))
        spoken = [self._spoken(*seen) for seen in zip(layouts, frames, strict=True)]
        first = layouts[0] if layouts else None
        pointers = _pointers(example.row, getattr(sample, "spelled", ()), first, processor.image_token_id)
        return ReaderExample(example, pointers, frames, spelled, spoken)

    def _step(self, view: View) -> float:
        """Of frames, in pixels of the image."""
        step: float = self.stage.frame_step * (view.box[2] - view.box[0]) / view.size[1]
        return step

    def _spoken(self, layout: TokenLayout, frames: Mapping[int, Frames]) -> Spoken:
        points = [torch.empty(0, 2)]
        for i, along in frames.items():
            left, top, right, bottom = layout.views[i].box
            points.append(along["points"] * torch.tensor([right - left, bottom - top]))
            points[-1] += torch.tensor([left, top])
        tokens = tokens_at(layout.grids, torch.cat(points))
        classes = [along["classes"] for along in frames.values()]
        characters = self.characters[torch.cat([torch.empty(0).long(), *classes])]
        speaks = (tokens >= 0) & (characters != IGNORE)
        return Spoken(tokens=tokens[speaks], characters=characters[speaks])

    def collate(self, samples: Sequence[Any]) -> dict[str, Any]:
        """As for a chat, with `pointers` of every row; `frames`, `spelled` and `spoken` of every image."""
        return {
            **self.collator([sample.example for sample in samples]),
            "pointers": self._placed(samples),
            "frames": [frames for sample in samples for frames in sample.frames],
            "spelled": [spelled for sample in samples for spelled in sample.spelled],
            "spoken": [spoken for sample in samples for spoken in sample.spoken],
        }

    def _placed(self, samples: Sequence[ReaderExample]) -> list[Pointers]:
        """The pointers of samples, where these stand in their batch."""
        pointers = [sample.pointers for sample in samples]
        if not self.stage.packed:
            return [Pointers(**{**pointed, "row": row}) for row, pointed in enumerate(pointers)]
        starts = accumulate((len(sample.example.row.ids) for sample in samples[:-1]), initial=0)
        return [
            Pointers(
                row=0,
                positions=pointed["positions"] + start,
                cells=pointed["cells"],
                visual=pointed["visual"] + start,
            )
            for pointed, start in zip(pointers, starts, strict=True)
        ]

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor | int]:
        counts = {
            **super().counts(batch),
            "frames": self._weight("points", chain(*map(dict.values, batch["frames"]))),
            "ctc": self._weight("points", chain(*map(dict.values, batch["spelled"]))),
            "tokens": sum(len(said["characters"]) for said in batch["spoken"]),
            "pointer": self._weight("positions", batch["pointers"]),
        }
        return {name: count for name, count in counts.items() if name in (*self.stage.losses, *self.scores)}

    def _weight(self, what: str, targets: Iterable[Any]) -> Tensor:
        """Of all targets together, by how many points or positions they have."""
        sizes = [len(target[what]) for target in targets]
        return torch.tensor(sum(size**self.stage.power for size in sizes if size))


def _with_points(targets: dict[int, PointsOfView]) -> dict[int, PointsOfView]:
    return {i: along for i, along in targets.items() if len(along["points"])}


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
    """For answers that take one token a character and one for the end: where each character stands, if a
    visual token stands there.
    """
    positions: list[int] = []
    points: list[tuple[float, float]] = []
    labels = row.labels.tolist()
    answers = [
        list(run)
        for is_answer, run in groupby(range(len(labels)), lambda i: labels[i] != IGNORE)
        if is_answer
    ]
    for answer, line in zip(answers, spelled, strict=False):  # the last turns may not have fitted
        if layout is None or line is None or len(answer) != len(line.text) + 1:
            continue
        middles = [(start + end) / 2 for start, end in pairwise(line.edges)]
        positions += [position - 1 for position in answer[:-1]]
        points += [(x, line.middle(x)) for x in middles]
    grids = () if layout is None else layout.grids
    cells = tokens_at(grids, torch.tensor(points, dtype=torch.float64).reshape(-1, 2))
    return Pointers(
        row=0,
        positions=torch.tensor(positions).long()[cells >= 0],
        cells=cells[cells >= 0],
        visual=(row.ids == image_token_id).nonzero()[:, 0],
    )
