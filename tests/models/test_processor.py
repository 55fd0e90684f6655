"""Processor and model count alike, and the processor's doors are guarded."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepwell.models.geometry import PyramidGeometry
from stepwell.models.vision import build_geometry, build_vision


def test_geometry_of_processor_and_model_agree(vision):
    system, geometry = build_vision(vision, out_dim=16), build_geometry(vision)
    for size in [(1, 1), (600, 90), (37, 1000), (224, 224)]:
        assert system.layout(size) == geometry.layout(size)


@given(height=st.integers(1, 16_384), width=st.integers(1, 16_384))
def test_token_count_is_the_last_grid(height, width):
    geometry = PyramidGeometry(
        names=("a", "b"), sides=(64, 128), strides=(16, 16), framing="aspect", mean=(0, 0, 0), std=(1, 1, 1)
    )
    layout = geometry.layout((height, width))
    small, large = layout.views
    assert layout.num_tokens == large.grid[0] * large.grid[1]
    assert max(large.size) == 128
    assert (2 * small.size[0], 2 * small.size[1]) == large.size
    assert all(side % 16 == 0 and side >= 16 for view in layout.views for side in view.size)


def test_visual_tokens_are_as_many_as_the_layout_says(build, vision, picture):
    assistant = build(vision)
    for width, height in [(90, 60), (10, 300), (1, 1)]:
        features = assistant.features(picture(width, height))
        assert len(features.tokens) == features.layout.num_tokens
        for stride, map in features.maps.items():
            rows, cols = features.layout.views[-1].size
            assert map.shape[-2:] == (rows // stride, cols // stride)


def test_pixels_of_a_batch_are_padded_at_the_right_and_bottom(assistant, picture):
    wide, tall = picture(200, 50), picture(50, 200)
    both = assistant.processor(images=[wide, tall])["pixel_values"]
    alone = assistant.processor(images=wide)["pixel_values"]
    height, width = alone.shape[-2:]
    assert torch.equal(both[:1, :, :height, :width], alone)
    assert not both[0, :, height:].any()


def test_every_way_to_hand_in_a_picture_gives_the_same_pixels(assistant, picture, tmp_path):
    image = picture(30, 20)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(buffer.getvalue())
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    expected = assistant.processor(images=image)["pixel_values"]
    for same in (path, str(path), buffer.getvalue(), url, np.asarray(image)):
        assert torch.equal(assistant.processor(images=same)["pixel_values"], expected)


@pytest.mark.parametrize(
    "address", ["http://example.com/a.png", "https://127.0.0.1/a.png", "file:///etc/passwd"]
)
def test_addresses_are_refused(assistant, address):
    with pytest.raises(ValueError, match="not fetched"):
        assistant.processor(images=address)


def test_broken_data_urls_are_refused_without_repeating_them(assistant):
    with pytest.raises(ValueError, match="base64") as error:
        assistant.processor(images="data:image/png;base64," + "?" * 1000)
    assert "???" not in str(error.value)


def test_text_that_spells_a_placeholder_stays_text(assistant, picture):
    tokens, _ = assistant.processor.encode(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": picture(9, 9)},
                    {"type": "text", "text": "a <image> b"},
                ],
            }
        ],
        add_generation_prompt=True,
    )
    layout = assistant.processor.geometry.layout((9, 9))
    assert tokens.input_ids.count(assistant.processor.image_token_id) == layout.num_tokens


def test_chat_template_of_the_processor_gives_the_same_prompt(assistant, picture):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(40, 30)}, {"type": "text", "text": "Why?"}],
        }
    ]
    through_jinja = assistant.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ours = assistant.processor.prompt([messages])
    assert through_jinja["input_ids"].tolist() == ours["input_ids"].tolist()
    assert torch.equal(through_jinja["pixel_values"], ours["pixel_values"])


def test_servers_learn_the_count_from_sizes(assistant):
    data = assistant.processor._get_num_multimodal_tokens(image_sizes=[(30, 40), (300, 20)])
    assert data.num_image_tokens == [
        assistant.processor.geometry.layout(size).num_tokens for size in [(30, 40), (300, 20)]
    ]


def test_a_picture_of_no_pixels_is_refused():
    geometry = PyramidGeometry(
        names=("a",), sides=(64,), strides=(16,), framing="pad", mean=(0, 0, 0), std=(1, 1, 1)
    )
    with pytest.raises(ValueError, match="0x5"):
        geometry.layout((0, 5))


def test_grey_arrays_of_floats_are_refused(assistant):
    with pytest.raises(ValueError, match="uint8"):
        assistant.processor(images=np.zeros((4, 4, 3), dtype=np.float32))


def test_palette_pictures_become_upright_rgb(assistant, picture):
    image = picture(30, 20)
    assert torch.equal(
        assistant.processor(images=image.convert("P"))["pixel_values"],
        assistant.processor(images=image.convert("P").convert("RGB"))["pixel_values"],
    )


def test_nested_pictures_are_counted_text_by_text(assistant, picture):
    a, b, c = (picture(30, 20, seed) for seed in range(3))
    with pytest.raises(ValueError, match="text 0 has 1 <image> placeholders but 2 pictures"):
        assistant.processor(images=[[a, b], [c]], text=["<image> x", "<image><image> y"])


def test_unknown_arguments_are_refused(assistant, tokenizer):
    from stepwell.models.processor import StepwellImageProcessor, StepwellProcessor

    with pytest.raises(ValueError, match="'nope'"):
        StepwellImageProcessor(nope=3)
    with pytest.raises(TypeError, match="nope"):
        StepwellProcessor(StepwellImageProcessor(), tokenizer, nope=3)
    with pytest.raises(ValueError, match="'paddin'"):
        assistant.processor(text="a", paddin=True)


def test_token_types_mark_the_placeholders(assistant, picture):
    inputs = assistant.processor(images=picture(9, 9), text="<image> a", return_mm_token_type_ids=True)
    marked = [bool(kind) for kind in inputs["mm_token_type_ids"][0]]
    assert marked == [i == assistant.processor.image_token_id for i in inputs["input_ids"][0]]
    assert assistant.processor.image_token_ids == [assistant.processor.image_token_id]


def test_views_hold_at_least_a_window():
    from stepwell.models.settings import BranchConfig, PiipConfig

    branches = [BranchConfig(encoder="vit_nano", size=size, arguments={"windows": 2}) for size in (128, 256)]
    layout = build_geometry(PiipConfig(branches=branches, framing="aspect")).layout((10, 2000))
    assert all(min(view.grid) >= 2 for view in layout.views)
