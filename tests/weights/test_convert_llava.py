"""LLaVA's releases, in transformers' layout and its own: the converted model says what transformers' does."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from stepwell.keys.report import FitError
from stepwell.models.anyres import AnyResConfig
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.published.papers import PUBLISHED, find_published
from stepwell.train.recipe import load_recipe
from stepwell.weights.convert import convert

SIDE, PATCH = 56, 14
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SMALL = [[side * SIDE // 336 for side in target] for target in PINPOINTS]
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
IMAGE_ID = 300
ENCODER = {"dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0, "position_grid": [4, 4]}
SIZES = [(56, 56), (57, 56), (100, 83), (200, 61), (37, 300), (5, 400), (1, 1)]  # (height, width)


@pytest.fixture(
    params=["llava_1_5_7b", "llava_next_vicuna_13b", "llava_next_mistral_7b", "llava_next_llama3_8b"]
)
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A release at tiny widths, whose views are a sixth as large."""
    full = PUBLISHED[request.param]
    settings = replace(full.settings, size=SIDE, arguments=ENCODER)
    text_config = {**(full.text_config or {}), **TEXT}
    monkeypatch.setitem(PUBLISHED, request.param, replace(full, settings=settings, text_config=text_config))
    return str(request.param)


def of_transformers(release: str) -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    is_mistral = "mistral" in release
    text = (MistralConfig if is_mistral else LlamaConfig)(**TEXT)
    if release.startswith("llava_1_5"):
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
        model: Any = LlavaForConditionalGeneration(config)
    else:
        config = LlavaNextConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE_ID,
            image_grid_pinpoints=SMALL,
        )
        model = LlavaNextForConditionalGeneration(config)
    for parameter in model.parameters():  # biases start at zero, and a zero shows no mistake
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def as_released(name: str) -> str:
    """A name in memory -> in the files of llava-hf, which transformers 4 wrote."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^model\.vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)
    return re.sub(r"^model\.(multi_modal_projector|image_newline)", r"\1", name)


def in_memory(name: str) -> str:
    """As transformers 5 has it, and whoever saves a state dict."""
    return name


def as_original(name: str) -> str:
    """The same in LLaVA's own files."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    name = re.sub(r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model.", name)
    name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
    return name.replace("multi_modal_projector.linear_2", "mm_projector.2")


def write(folder: Any, model: Any, naming: Any) -> None:
    """A checkpoint under the names of `naming`; None is as transformers saves it today."""
    folder.mkdir()
    if naming is None:
        model.save_pretrained(folder)
        return
    save_file({naming(name): tensor for name, tensor in model.state_dict().items()}, folder / "m.safetensors")
    fields = model.config.to_dict()
    if naming is as_original:
        fields = {**fields["text_config"], "model_type": "llava_llama"}
        fields["model_type"] = (
            "llava_mistral" if "mistral" in str(model.config.text_config) else "llava_llama"
        )
    (folder / "config.json").write_text(json.dumps(fields))


def pictures(sizes: Any) -> list[Image.Image]:
    """Random ones, coarse enough to survive resizing; sizes are (height, width)."""
    random = np.random.default_rng(0)
    coarse = [Image.fromarray(random.integers(0, 256, (7, 5, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize((width, height)) for image, (height, width) in zip(coarse, sizes, strict=True)]


def processor_of(release: str, **options: Any) -> Any:
    size: dict[str, Any] = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
    }
    if release.startswith("llava_1_5"):
        return LlavaImageProcessorPil(**size, do_pad=True, **options)
    return LlavaNextImageProcessorPil(**size, image_grid_pinpoints=SMALL, **options)


def theirs_in_our_order(release: str, image: Any) -> torch.Tensor:
    """(views, 3, S, S): transformers' pixel values, the overview last."""
    values = processor_of(release)(image, return_tensors="pt")["pixel_values"][0]
    return values[None] if values.ndim == 3 else values.roll(-1, 0)


@pytest.mark.parametrize("naming", [None, as_released, in_memory, as_original])
def test_the_converted_model_says_what_transformers_model_says(release, naming, tmp_path):
    model = of_transformers(release)
    write(tmp_path / "source", model, naming)
    report = convert(tmp_path / "source", tmp_path / "out", as_=release)
    assert report.ok, report.text()
    ours = StepwellForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    ours.config.image_token_id = IMAGE_ID
    processor = StepwellImageProcessor(ours.config.vision_config)
    for sizes in (SIZES[3:5], SIZES[:1], SIZES[5:]):  # two images of a batch, one, and the odd ones
        images = pictures(sizes)
        batch = processor(images)
        counts = [layout.num_visual for layout in processor.layouts(images)]
        longest = max(counts)
        rows = [[1, *[5] * (longest - n), *[IMAGE_ID] * n, 7, 9 + n % 7] for n in counts]
        ids = torch.tensor(rows)
        values = processor_of(release)(images, return_tensors="pt")
        with torch.no_grad():
            logits = ours(input_ids=ids, **batch).logits
            theirs = model(input_ids=ids, **values).logits
        torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-5)


def test_pixels_are_those_of_transformers_processor_that_resizes_with_pillow(release):
    processor = StepwellImageProcessor(PUBLISHED[release].settings)
    for image in pictures(SIZES):
        batch, theirs = processor([image]), theirs_in_our_order(release, image)
        ours = batch["pixel_values"].unflatten(0, (-1, SIDE, SIDE)).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6, msg=f"{image.size}")


def test_what_does_not_fit_is_refused_before_anything_is_written(release, tmp_path):
    model = of_transformers(release)
    write(tmp_path / "source", model, as_released)
    state = load_file(tmp_path / "source" / "m.safetensors")
    state["multi_modal_projector.linear_3.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "source" / "m.safetensors")
    with pytest.raises(FitError, match=r"1 unknown \(multi_modal_projector\.linear_3\.bias\)"):
        convert(tmp_path / "source", tmp_path / "out", as_=release)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava_1_5_7b"),
        ("llava-v1.5-13b", "llava_1_5_13b_original"),
        ("llava-hf/llava-v1.6-mistral-7b-hf", "llava_next_mistral_7b"),
        ("lmms-lab/llama3-llava-next-8b", "llava_next_llama3_8b_original"),
    ],
)
def test_a_release_is_found_by_its_name(alias, name):
    published = find_published(alias)
    assert published is not None
    assert published.name == name


def test_the_releases_differ_in_the_order_of_equal_grids():
    """A small square image is shown by two tiles, which transformers puts side by side."""
    theirs, llava = (PUBLISHED[f"llava_next_vicuna_7b{suffix}"].settings for suffix in ("", "_original"))
    assert isinstance(theirs, AnyResConfig)
    assert isinstance(llava, AnyResConfig)
    assert theirs.geometry().layout((336, 336)).tiles == (1, 2)
    assert llava.geometry().layout((336, 336)).tiles == (2, 1)
    assert [[336 * side for side in grid] for grid in theirs.grids] == PINPOINTS


def test_recipes_name_what_the_releases_have():
    for recipe, name in (
        ("llava_1_5", "llava_1_5_7b_original"),
        ("llava_next", "llava_next_vicuna_7b_original"),
    ):
        ours, theirs = load_recipe(recipe).model, PUBLISHED[name]
        expected = theirs.settings
        if isinstance(expected, AnyResConfig):
            expected = replace(expected, floor="exact")
        assert (ours.vision, ours.template) == (expected, theirs.template)
