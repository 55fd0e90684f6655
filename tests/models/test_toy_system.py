"""A new vision system is its own files and one line: this one lives in a test, and nothing else knows it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import pytest
import torch
import yaml
from PIL import Image
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import stepwell
from stepwell.encoders.catalogue import build_encoder, encoder_spec
from stepwell.encoders.encoder import Encoder
from stepwell.flops.report import report
from stepwell.language.projector import build_projector
from stepwell.models.systems import SYSTEMS
from stepwell.models.vision import STRICT, VisionConfig, VisionSystem
from stepwell.ops.ragged import by_shape
from stepwell.structures import (
    Box,
    FeatureMap,
    Geometry,
    Size,
    Statistics,
    TokenLayout,
    TokenRun,
    View,
    VisionFeatures,
)
from stepwell.train.run import train
from stepwell.views.preprocess import to_tensor
from stepwell.views.sheet import draw_views


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ThumbnailAndHalves(Geometry):
    """A thumbnail, and where an image is long its two halves behind a separator each."""

    side: int
    stride: int
    halves: bool
    mean: Statistics
    std: Statistics

    def layout(self, size: Size) -> TokenLayout:
        height, width = size
        boxes: list[Box] = [(0, 0, width, height)]
        if self.halves and width >= 2 * height:
            boxes += [(0, 0, width // 2, height), (width // 2, 0, width, height)]
        elif self.halves and height >= 2 * width:
            boxes += [(0, 0, width, height // 2), (0, height // 2, width, height)]
        sizes = [(self.side // 2, self.side)] + [(self.side, self.side)] * (len(boxes) - 1)
        views = tuple(
            View(name=f"part {i}", size=s, box=box, grid=(s[0] // self.stride, s[1] // self.stride))
            for i, (s, box) in enumerate(zip(sizes, boxes, strict=True))
        )
        counts = [TokenRun(count=view.grid[0] * view.grid[1]) for view in views]
        runs = [counts[0], *(run for count in counts[1:] for run in (TokenRun(text="\n"), count))]
        return TokenLayout(image_size=size, inputs=tuple(sizes), views=views, runs=tuple(runs))

    def inputs(self, image: Image.Image, layout: TokenLayout) -> list[Tensor]:
        parts = [image.crop(tuple(map(int, view.box))) for view in layout.views]
        return [
            to_tensor(p, view.size, self.mean, self.std) for p, view in zip(parts, layout.views, strict=True)
        ]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToyConfig(VisionConfig):
    adjustable: ClassVar = frozenset({"halves"})
    parts: ClassVar = {"vision.branches": "branches", "projector": "projector"}

    kind: Literal["toy"] = "toy"
    encoder: str = "vit_nano"
    side: int = 32
    halves: bool = True

    @property
    def largest(self) -> int:
        return self.side

    def geometry(self) -> ThumbnailAndHalves:
        spec = encoder_spec(self.encoder)
        return ThumbnailAndHalves(
            side=self.side, stride=spec.stride, halves=self.halves, mean=spec.mean, std=spec.std
        )

    def build(self, out_dim: int) -> ToyVision:
        return ToyVision(self, out_dim)

    def resized(self, sizes: Sequence[int]) -> ToyConfig:
        (side,) = sizes
        return dataclasses.replace(self, side=side)


class ToyVision(VisionSystem):
    def __init__(self, config: ToyConfig, out_dim: int) -> None:
        super().__init__()
        self.geometry = config.geometry()
        encoder = build_encoder(config.encoder)
        self.branches = nn.ModuleList([encoder])
        self.projector = build_projector("linear", encoder.spec.dim, out_dim)

    @property
    def encoders(self) -> list[Encoder]:
        return cast("list[Encoder]", list(self.branches))

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        outputs = iter(by_shape(self._encode, inputs))
        features = []
        for layout in layouts:
            tokens, maps = zip(*(next(outputs) for _ in layout.inputs), strict=True)
            stride = self.encoders[0].spec.stride
            maps = tuple(FeatureMap(m, v, stride) for m, v in zip(maps, layout.views, strict=True))
            features.append(VisionFeatures(torch.cat(tokens), maps, layout))
        return features

    def _encode(self, image: Tensor) -> list[Tensor]:
        state = self.encoders[0].run(self.encoders[0].stem(image), 0, 3)
        return [self.projector(state.tokens), self.encoders[0].to_map(state)]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line in the union."""
    monkeypatch.setitem(SYSTEMS, "toy", ToyConfig)


@pytest.fixture
def assistant(build: Any) -> stepwell.Assistant:
    return build(ToyConfig())


def test_it_answers_alone_and_in_a_batch(assistant, draw):
    pairs = [([draw(90, 30)], "What?"), ([draw(40, 40), draw(30, 99)], "And these two?")]
    together = assistant.ask_many(pairs, max_new_tokens=6)
    assert together == [assistant.ask(images, question, max_new_tokens=6) for images, question in pairs]


def test_its_separators_and_tokens_are_counted_alike_by_processor_and_model(assistant, draw):
    layout = assistant.layout(draw(90, 30))
    ids = assistant.processor.image_tokens(layout)
    assert ids.count(assistant.processor.image_token_id) == layout.num_visual == 2 + 4 + 4
    assert len(ids) == assistant.processor.num_tokens(layout) == layout.num_visual + 2
    features = assistant.features(draw(90, 30))
    assert len(features.tokens) == layout.num_visual
    assert [tuple(m.map.shape[1:]) for m in features.maps] == [(1, 2), (2, 2), (2, 2)]


def test_it_is_saved_reloaded_and_runs_in_a_pipeline(assistant, draw, tmp_path: Path):
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    expected = [assistant.ask(image, "What?", max_new_tokens=6) for image in (draw(90, 30), draw(40, 40))]
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path).model.vision) is ToyVision
    assert AutoProcessor.from_pretrained(tmp_path).geometry == ToyConfig().geometry()
    assert stepwell.load(tmp_path).ask(draw(90, 30), "What?", max_new_tokens=6) == expected[0]
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": i}, {"type": "text", "text": "What?"}]}]
        for i in (draw(90, 30), draw(40, 40))
    ]
    out = pipe(text=chats, batch_size=2, generate_kwargs={"max_new_tokens": 6, "do_sample": False})
    assert [answer[0]["generated_text"][-1]["content"].strip() for answer in out] == expected


def test_its_geometry_may_change_when_it_is_loaded(assistant, draw, tmp_path: Path):
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    whole = stepwell.load(tmp_path, vision={"halves": False})
    assert whole.layout(draw(90, 30)).num_visual == 2
    assert isinstance(whole.ask(draw(90, 30), "What?", max_new_tokens=2), str)
    with pytest.raises(ValueError, match=r"vision\.encoder of a 'toy' system cannot change"):
        stepwell.load(tmp_path, vision={"encoder": "vit_t"})


def test_its_cost_is_counted():
    long, square = report(ToyConfig(), size=(30, 90)), report(ToyConfig())
    assert long.tokens == 10
    assert [part.name for part in square.parts] == ["branches.0", "projector"]
    assert long.gflops > 3 * square.gflops


def test_it_is_drawn(draw):
    geometry = ToyConfig().geometry()
    one, two = (draw_views(images, geometry) for images in ([draw(90, 30)], [draw(90, 30), draw(40, 40)]))
    assert one.height > 2 * ToyConfig().side  # both halves
    assert two.height > one.height


def test_it_learns_from_a_recipe_and_what_is_frozen_stays(tokenizer, draw, tmp_path: Path):
    for i, size in enumerate([(90, 30), (40, 40)]):
        draw(*size, i).save(tmp_path / f"{i}.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A CAT"}]
    data = [{"image": f"{i}.png", "conversations": turns} for i in range(2)]
    (tmp_path / "data.json").write_text(json.dumps(data))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    stage = {"steps": 2, "batch": 2, "data": [{"kind": "conversations", "path": str(tmp_path / "data.json")}]}
    recipe = {
        "task": "chat",
        "name": "toy",
        "model": {
            "vision": {"kind": "toy"},
            "text": {"model_type": "llama", **text},
            "tokenizer": str(tmp_path / "tokenizer"),
            "template": "chatml_direct",
        },
        "output": str(tmp_path / "runs"),
        "workers": 0,
        "bf16": False,
        "save_dtype": "float32",
        "stages": [
            {"name": "align", "train": ["projector"], "vision": {"halves": False}, **stage},
            {"name": "tune", "train": ["vision.branches", "language"], **stage},
        ],
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    folder = train(tmp_path / "toy.yaml")
    first, second = (
        load_file(tmp_path / "runs" / "toy" / name / "finished" / "model.safetensors")
        for name in ("1_align", "2_tune")
    )
    changed = [name for name in second if not torch.equal(first[name], second[name])]
    assert any(name.startswith("model.vision.branches.") for name in changed)
    assert not any(name.startswith("model.vision.projector.") for name in changed)
    assistant = stepwell.load(folder)
    assert assistant.model.config.vision == ToyConfig()
    assert isinstance(assistant.ask(draw(90, 30), "What?", max_new_tokens=2), str)
