"""Processor and model count alike, and the processor's doors are guarded."""

from __future__ import annotations

import base64
import copy
import io
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor, pipeline

import stepwell
from stepwell.images.limits import ImageLimits
from stepwell.models.ask import Assistant
from stepwell.models.config import StepwellConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.piip import PiipConfig
from stepwell.models.processor import StepwellProcessor
from stepwell.models.pyramid import BranchConfig
from stepwell.views.pyramid import PyramidGeometry


def test_geometry_of_processor_and_model_agree(vision):
    assert vision.build(16).geometry == vision.geometry()


@given(height=st.integers(1, 16_384), width=st.integers(1, 16_384))
def test_token_count_is_the_last_grid(height, width):
    geometry = PyramidGeometry(
        names=("a", "b"), sides=(64, 128), strides=(16, 16), framing="aspect", mean=(0, 0, 0), std=(1, 1, 1)
    )
    layout = geometry.layout((height, width))
    small, large = layout.views
    assert layout.num_visual == large.grid[0] * large.grid[1]
    assert max(large.size) == 128
    assert (2 * small.size[0], 2 * small.size[1]) == large.size
    assert all(side % 16 == 0 and side >= 16 for view in layout.views for side in view.size)


def test_visual_tokens_are_as_many_as_the_layout_says(build, vision, draw):
    assistant = build(vision)
    for width, height in [(90, 60), (10, 300), (1, 1)]:
        features = assistant.features(draw(width, height))
        layout = features.layout
        separators = sum(run.text is not None for run in layout.runs)  # a token each in this vocabulary
        assert len(features.tokens) == layout.num_visual
        assert assistant.processor.num_tokens(layout) == layout.num_visual + separators
        for feature_map in features.maps:
            assert feature_map.map.shape[-2:] in (feature_map.view.grid, *feature_map.view.maps)


def test_no_pixel_is_padding(assistant, draw):
    strip, ordinary = draw(300, 50), draw(60, 50)
    layouts = [assistant.layout(image) for image in (strip, ordinary)]
    pixels = assistant.processor(images=[strip, ordinary])["pixel_values"]
    assert pixels.shape == (sum(layout.num_pixels for layout in layouts), 3)
    counts = assistant.processor._get_num_multimodal_tokens([(50, 300), (50, 60)])
    assert counts.num_image_patches == [layout.num_pixels for layout in layouts]


def test_every_way_to_hand_in_an_image_gives_the_same_pixels(assistant, draw, tmp_path):
    image = draw(30, 20)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    path = tmp_path / "image.png"
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


def asking(*images, text="Why?"):
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def test_text_that_spells_a_placeholder_stays_text(assistant, draw):
    processor = assistant.processor
    messages = asking(draw(9, 9), text="a <image> b")
    tokens = processor.label(messages, [draw(9, 9)], add_generation_prompt=True)
    assert tokens.input_ids.count(processor.image_token_id) == processor.geometry.layout((9, 9)).num_visual
    assert processor.prompt([messages])["input_ids"].tolist() == [tokens.input_ids]


def test_apply_chat_template_gives_the_tokens_and_images_of_asking(assistant, draw):
    messages = asking(draw(40, 30))
    options = {"add_generation_prompt": True, "tokenize": True, "return_tensors": "pt"}
    theirs = assistant.processor.apply_chat_template(messages, return_dict=True, **options)
    ours = assistant.processor.prompt([messages])
    assert theirs["input_ids"].tolist() == ours["input_ids"].tolist()
    assert torch.equal(theirs["pixel_values"], ours["pixel_values"])
    assert torch.equal(assistant.processor.apply_chat_template(messages, **options), ours["input_ids"])


def test_a_batch_of_conversations_is_padded_on_the_side_asked_for(assistant, draw):
    chats = [asking(draw(40, 30)), asking(text="Which of the two do you mean?")]
    alone = [assistant.processor.apply_chat_template(chat, tokenize=True)[0] for chat in chats]
    length, short = max(map(len, alone)), min(range(2), key=lambda i: len(alone[i]))
    for side, options in (("left", {}), ("right", {"padding_side": "right"})):
        batch = assistant.processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, processor_kwargs={"padding": True, **options}
        )
        pad = [assistant.processor.tokenizer.pad_token_id] * (length - len(alone[short]))
        ones = [1] * len(alone[short])
        zeros = [0] * len(pad)
        row, mask = batch["input_ids"][short], batch["attention_mask"][short]
        assert row == (pad + alone[short] if side == "left" else alone[short] + pad)
        assert mask == (zeros + ones if side == "left" else ones + zeros)
        assert batch["input_ids"][1 - short] == alone[1 - short]


def test_prompts_are_padded_at_the_left_whatever_training_set(assistant, draw):
    chats = [asking(text="Why?"), asking(text="Which of the two do you mean?")]
    expected = assistant.processor.prompt(chats)["attention_mask"][0].tolist()
    assert (expected[0], expected[-1]) == (0, 1)
    assistant.processor.tokenizer.padding_side = "right"
    try:
        assert assistant.processor.prompt(chats)["attention_mask"][0].tolist() == expected
    finally:
        assistant.processor.tokenizer.padding_side = "left"


def test_rows_are_as_long_as_padding_says(assistant):
    texts = ["a", "a b c d e f g"]
    rows = [len(row) for row in assistant.processor(text=texts)["input_ids"]]
    assert rows[0] < rows[1]
    for options, length in (
        ({"padding": "longest"}, rows[1]),
        ({"padding": True, "pad_to_multiple_of": 16}, 16 * (1 + (rows[1] - 1) // 16)),
        ({"padding": "max_length", "max_length": 50}, 50),
        ({"padding": "max_length", "max_length": 2}, rows[1]),
        ({"text_kwargs": {"padding": "max_length"}, "common_kwargs": {"max_length": 40}}, 40),
    ):
        assert [len(row) for row in assistant.processor(text=texts, **options)["input_ids"]] == [length] * 2


def test_truncation_cuts_text_and_refuses_to_cut_an_image(assistant, draw):
    long = assistant.processor(images=draw(60, 60), text="<image> " + "word " * 50)
    length = len(long["input_ids"][0])
    placeholders = long["input_ids"][0].count(assistant.processor.image_token_id)

    def cut(max_length, text="<image> " + "word " * 50):
        return assistant.processor(images=draw(60, 60), text=text, truncation=True, max_length=max_length)

    assert cut(placeholders + 9)["input_ids"][0] == long["input_ids"][0][: placeholders + 9]
    assert cut(length + 1)["input_ids"] == long["input_ids"]
    with pytest.raises(
        ValueError, match=f"takes {length} tokens; truncation to {placeholders - 1} would cut"
    ):
        cut(placeholders - 1)
    assistant.processor.tokenizer.truncation_side = "left"
    try:
        with pytest.raises(ValueError, match="would cut an image"):
            cut(placeholders + 9)
        kept = cut(placeholders + 9, "word " * 50 + "<image>")["input_ids"][0]
    finally:
        assistant.processor.tokenizer.truncation_side = "right"
    assert kept.count(assistant.processor.image_token_id) == placeholders
    assert len(kept) == placeholders + 9


def test_an_assistant_mask_is_the_answer_and_what_ends_it(assistant, draw):
    chats = [
        [*asking(draw(40, 30)), {"role": "assistant", "content": "A CAT"}],
        [*asking(), {"role": "assistant", "content": "THEREFORE"}],
    ]
    options = {"padding": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
    batch = assistant.processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options)
    masked = [
        ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True)
    ]
    assert [assistant.processor.decode(ids) for ids in masked] == ["A CAT<|im_end|>", "THEREFORE<|im_end|>"]


def test_an_answer_is_gone_on_with(assistant):
    chat = [*asking(), {"role": "assistant", "content": "It is a"}]
    text = assistant.processor.apply_chat_template(chat, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nIt is a")
    opened = assistant.processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    assert text == opened + "It is a"


def test_a_template_may_be_given_by_call(assistant, draw):
    chat = [*asking(draw(40, 30)), {"role": "assistant", "content": "A CAT"}]
    written = (
        "{% for m in messages %}{% if m.role == 'user' %}Q{{ mark }}{% for part in m.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
        "{% else %}A: {% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert assistant.processor.apply_chat_template(chat, written, mark=":") == "Q:<image>Why?A: A CAT"
    batch = assistant.processor.apply_chat_template(
        chat, written, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    masked = zip(batch["input_ids"][0], batch["assistant_masks"][0], strict=True)
    assert assistant.processor.decode([token for token, mask in masked if mask]) == "A CAT"
    assert "You are a helpful assistant." in assistant.processor.apply_chat_template(asking(), "qwen")


def test_images_may_stand_beside_conversations_that_name_them(assistant, draw):
    chat = [{"role": "user", "content": "<image>\nWhy?"}]
    beside = assistant.processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, processor_kwargs={"images": [draw(40, 30)]}
    )
    assert beside == assistant.processor.prompt([asking(draw(40, 30))])["input_ids"].tolist()
    with pytest.raises(ValueError, match="in the messages and beside them; give them once"):
        assistant.processor.apply_chat_template(asking(draw(9, 9)), tokenize=True, images=[draw(9, 9)])


def test_ways_to_write_an_image_in_a_message(assistant, draw, tmp_path):
    buffer = io.BytesIO()
    draw(30, 20).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    url = f"data:image/png;base64,{data}"
    expected = assistant.processor.prompt([asking(draw(30, 20))])
    for part in (
        {"type": "image", "path": tmp_path / "a.png"},
        {"type": "image", "image": {"bytes": buffer.getvalue(), "path": None}},
        {"type": "image", "image": np.asarray(draw(30, 20))},
        {"type": "image", "image": torch.from_numpy(np.array(draw(30, 20)))},
        {"type": "image", "url": url, "image": None, "text": None},
        {"type": "image", "base64": data},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
    ):
        text = {"type": "text", "text": "Why?", "image": None}
        inputs = assistant.processor.prompt([[{"role": "user", "content": [part, text]}]])
        assert all(torch.equal(inputs[name], expected[name]) for name in expected), part


def test_a_folder_keeps_the_template_by_name_or_by_text(assistant, tmp_path):
    processor = assistant.processor
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("of an older release")
    again = StepwellProcessor.from_pretrained(tmp_path)
    assert (again.template, again.chat_template) == ("chatml_direct", processor.chat_template)
    assert StepwellProcessor.from_pretrained(tmp_path, template="qwen").template == "qwen"
    again.chat_template = "{{ messages[0].content }}"  # as TRL sets one
    assert again.template is None
    again.save_pretrained(tmp_path)
    other = StepwellProcessor.from_pretrained(tmp_path)
    assert (other.template, other.chat_template) == (None, again.chat_template)
    assert other.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi"


def test_a_tokenizers_own_template_is_the_processors(assistant, tokenizer):
    own = copy.deepcopy(tokenizer)
    with pytest.raises(ValueError, match="no chat template; choose one of ours: chatml_direct"):
        StepwellProcessor(assistant.processor.image_processor, own).prompt([asking()])
    own.chat_template = {"default": "{{ messages[0].content }}!", "other": "{{ messages[0].content }}?"}
    processor = StepwellProcessor(assistant.processor.image_processor, own)
    assert processor.template is None
    assert processor.apply_chat_template(asking()) == "Why?!"
    assert processor.apply_chat_template(asking(), "other") == "Why??"


def test_a_folder_of_the_first_release_loads_as_it_is(assistant, draw, tmp_path):
    """0.1 wrote empty separators into both files, the tying of embeddings twice, and templates of its own."""
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    tied = assistant.model.config.tie_word_embeddings
    for name, more in {
        "config.json": {"separators": {}, "tie_word_embeddings": tied},
        "processor_config.json": {"separators": {}},
    }.items():
        fields = json.loads((tmp_path / name).read_text())
        assert not fields.keys() & more.keys()
        (tmp_path / name).write_text(json.dumps({**fields, **more}))
    (tmp_path / "chat_template.jinja").write_text("{{- raise_exception('the template of 0.1') -}}")
    assert stepwell.load(tmp_path).ask(draw(90, 60), "Why?") == assistant.ask(draw(90, 60), "Why?")


def test_separators_that_older_folders_set_are_refused(assistant, tmp_path):
    assistant.processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "separators": {"row": ","}}))
    with pytest.raises(ValueError, match="separators; the vision system's layout tells them now"):
        StepwellProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="StepwellConfig knows no separators"):
        StepwellConfig(separators={"row": ","})


def test_servers_learn_the_count_from_sizes(assistant):
    data = assistant.processor._get_num_multimodal_tokens(image_sizes=[(30, 40), (300, 20)])
    assert data.num_image_tokens == [
        assistant.processor.geometry.layout(size).num_visual for size in [(30, 40), (300, 20)]
    ]


def test_an_image_of_no_pixels_is_refused():
    geometry = PyramidGeometry(
        names=("a",), sides=(64,), strides=(16,), framing="pad", mean=(0, 0, 0), std=(1, 1, 1)
    )
    with pytest.raises(ValueError, match="0x5"):
        geometry.layout((0, 5))


def test_normalised_arrays_are_refused(assistant):
    with pytest.raises(ValueError, match="undo their normalisation"):
        assistant.processor(images=np.full((4, 4, 3), -0.5, dtype=np.float32))


@pytest.fixture
def wide(draw, tmp_path):
    """A file that the default limits refuse by its aspect, and limits that let it in."""
    draw(402, 2).save(tmp_path / "wide.png")
    return tmp_path / "wide.png", ImageLimits(max_aspect=201)


def test_limits_are_set_once_or_by_call(assistant, wide):
    path, loose = wide
    vision, tokenizer = assistant.processor.image_processor, assistant.processor.tokenizer
    expected = vision(stepwell.open_image(path, limits=loose))["pixel_values"]
    chat, text = asking(path), "<image> Why?"
    with_options = {"tokenize": True, "return_dict": True}
    for call in (
        lambda processor, **limits: processor.image_processor(path, **limits),
        lambda processor, **limits: processor.image_processor.preprocess([[path]], **limits),
        lambda processor, **limits: processor(images=path, text=text, **limits),
        lambda processor, **limits: processor.apply_chat_template(chat, **with_options, **limits),
        lambda processor, **limits: processor.apply_chat_template(
            chat, **with_options, processor_kwargs=limits
        ),
    ):
        with pytest.raises(stepwell.ImageError, match=r"limits=ImageLimits\(max_aspect=201\)"):
            call(assistant.processor)
        own = StepwellProcessor(
            StepwellImageProcessor(vision.vision_config, limits=loose), tokenizer, template="chatml_direct"
        )
        for batch in (call(assistant.processor, limits=loose), call(own)):
            assert torch.equal(torch.as_tensor(batch["pixel_values"]), expected)
        with pytest.raises(stepwell.ImageError, match="max_side=402"):
            call(own, limits=ImageLimits(max_side=9))
    with pytest.raises(ValueError, match="text alone; leave out limits"):
        assistant.processor.apply_chat_template(chat, limits=loose)
    with pytest.raises(TypeError, match="ImageLimits, got dict"):
        assistant.processor(images=path, limits={"max_aspect": 201})


def test_limits_belong_to_the_machine_and_are_not_saved(assistant, wide, tmp_path):
    path, loose = wide
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    kept = (tmp_path / "processor_config.json").read_text()
    for load, image_processor in (
        (StepwellImageProcessor.from_pretrained, lambda loaded: loaded),
        (StepwellProcessor.from_pretrained, lambda loaded: loaded.image_processor),
        (AutoProcessor.from_pretrained, lambda loaded: loaded.image_processor),
        (stepwell.load, lambda loaded: loaded.processor.image_processor),
    ):
        assert image_processor(load(tmp_path)).limits == ImageLimits()
        for options in ({}, {"vision": {"framing": "crop"}}):
            loaded = image_processor(load(tmp_path, limits=loose, **options))
            assert loaded.limits == loose
            assert loaded(path)["image_sizes"].tolist() == [[2, 402]]
    StepwellProcessor.from_pretrained(tmp_path, limits=loose).save_pretrained(tmp_path)
    assert (tmp_path / "processor_config.json").read_text() == kept


def test_a_pipeline_takes_paths_and_limits_and_no_names_of_files(assistant, wide, tmp_path):
    path, loose = wide
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path), dtype="float32")
    options = {"return_full_text": False, "max_new_tokens": 4}
    expected = assistant.ask(stepwell.open_image(path, limits=loose), "Why?", max_new_tokens=4)
    for limits in ({"limits": loose}, {"processor_kwargs": {"limits": loose}}):
        (answer,) = pipe(text=asking(path), **options, **limits)
        assert answer["generated_text"].strip() == expected
    with pytest.raises(ValueError, match="no text names a file"):
        pipe(text=asking(str(path)), **options)


def test_no_file_is_opened_by_a_message_of_text(assistant, draw, tmp_path, monkeypatch):
    draw(9, 9).save(tmp_path / "a.png")
    name = str(tmp_path / "a.png")
    assert assistant.processor(images=name, text="<image>")["input_ids"]  # a program may name files
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: pytest.fail("a file was opened"))
    for part in ({"type": "image", "image": name}, {"type": "image_url", "image_url": {"url": name}}):
        chat = [{"role": "user", "content": [part, {"type": "text", "text": "Why?"}]}]
        for call in (
            lambda chat: assistant.processor.apply_chat_template(chat),
            lambda chat: assistant.processor.apply_chat_template(chat, tokenize=True),
            lambda chat: assistant.processor.apply_chat_template([chat], tokenize=True, return_dict=True),
            lambda chat: assistant.processor.prompt([chat]),
        ):
            with pytest.raises(ValueError, match="no text names a file"):
                call(chat)
        # `label` is given the opened image beside the messages, and looks at none in them.
        assert assistant.processor.label(chat, [draw(9, 9)], add_generation_prompt=True).input_ids


def test_palette_images_become_upright_rgb(assistant, draw):
    image = draw(30, 20)
    assert torch.equal(
        assistant.processor(images=image.convert("P"))["pixel_values"],
        assistant.processor(images=image.convert("P").convert("RGB"))["pixel_values"],
    )


def test_nested_images_are_counted_text_by_text(assistant, draw):
    a, b, c = (draw(30, 20, seed) for seed in range(3))
    with pytest.raises(ValueError, match="text 0 has 1 <image> placeholders but 2 images"):
        assistant.processor(images=[[a, b], [c]], text=["<image> x", "<image><image> y"])
    with pytest.raises(ValueError, match="1 lists of images were given for 2 texts"):
        assistant.processor(images=[[a, b]], text=["<image> x", "<image> y"])
    nested = assistant.processor(images=[[a], [], [b, c]], text=["<image> x", "y", "<image><image>"])
    flat = assistant.processor(images=[a, b, c], text=["<image> x", "y", "<image><image>"])
    assert nested["input_ids"] == flat["input_ids"]


def test_what_a_call_does_not_know_is_refused_in_one_line(assistant, tokenizer, draw):
    processor = assistant.processor
    with pytest.raises(ValueError, match="'nope'"):
        StepwellImageProcessor(nope=3)
    with pytest.raises(TypeError, match="nope"):
        StepwellProcessor(StepwellImageProcessor(), tokenizer, nope=3)
    with pytest.raises(ValueError, match="give one of them"):
        StepwellProcessor(StepwellImageProcessor(), tokenizer, "{{ messages }}", "qwen")
    for options, says in (
        ({"paddin": True}, "knows no 'paddin'"),
        ({"videos": ["a.mp4"]}, "knows no 'videos'"),
        ({"text_kwargs": {"stride": 3}}, "knows no 'stride'"),
        ({"images_kwargs": {"do_resize": False}}, "knows no 'do_resize'"),
        ({"images_kwargs": {"padding": True}}, "knows no 'padding'"),
        ({"sanitize_control_tokens": False}, "sanitize_control_tokens is one of"),
        ({"padding": "widest"}, "padding is one of"),
        ({"padding_side": "top"}, "padding_side is one of"),
        ({"truncation": "only_second"}, "truncation is one of"),
        ({"max_length": 9}, "max_length=9 needs"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            processor(images=draw(9, 9), text="<image> a", **options)
        assert "\n" not in str(error.value)
        chat = asking(draw(9, 9))
        with pytest.raises(ValueError, match=says):
            processor.apply_chat_template(chat, tokenize=True, processor_kwargs=options)
        with pytest.raises(ValueError, match=says):
            processor(text="a", **options)
    for options in ({"tools": [{"name": "clock"}]}, {"enable_thinking": True}, {"paddin": True}):
        with pytest.raises(ValueError, match=f"knows no '{next(iter(options))}'"):
            processor.apply_chat_template(asking(), **options)
    assert processor(text="a", videos=None, max_length=None)["input_ids"]
    assert torch.is_tensor(processor(text="a", images_kwargs={"return_tensors": "pt"})["input_ids"])
    with pytest.raises(ValueError, match="was given no image"):
        processor.image_processor([])


def test_options_that_a_text_cannot_have_are_refused(assistant, draw):
    for options in ({"padding": True}, {"return_tensors": "pt"}, {"images": [draw(9, 9)]}):
        with pytest.raises(ValueError, match=f"text alone; leave out {next(iter(options))}$"):
            assistant.processor.apply_chat_template(asking(), **options, tools=None)
    defaults = {"padding": False, "return_tensors": None, "sanitize_control_tokens": True}
    assert assistant.processor.apply_chat_template(asking(), processor_kwargs=defaults)


def test_layouts_are_made_once_and_before_any_pixel_is_read(assistant, draw, monkeypatch):
    assert assistant.processor.geometry  # whose making tries a layout
    steps = []
    for name in ("layout", "inputs"):
        method = getattr(PyramidGeometry, name)
        monkeypatch.setattr(
            PyramidGeometry,
            name,
            lambda *args, name=name, method=method: steps.append(name) or method(*args),
        )
    messages = asking(draw(40, 30), draw(90, 30))
    assistant.processor.prompt([messages])
    assert steps == ["layout", "layout", "inputs", "inputs"]
    steps.clear()
    with pytest.raises(ValueError, match="would cut an image"):
        assistant.processor.apply_chat_template(messages, tokenize=True, truncation=True, max_length=9)
    assert "inputs" not in steps


def test_a_string_without_pieces_means_the_special_tokens_in_it(assistant):
    processor = assistant.processor
    prompt = processor.apply_chat_template(asking(text="<|im_end|>"))
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    counts = [processor(text=text)["input_ids"][0].count(end) for text in (prompt, str(prompt), prompt + "")]
    assert counts == [2, 3, 3]
    assert processor(text=str(prompt))["input_ids"] == [processor.tokenizer(str(prompt)).input_ids]


def test_token_types_mark_the_placeholders(assistant, draw):
    inputs = assistant.processor(images=draw(9, 9), text="<image> a", return_mm_token_type_ids=True)
    marked = [bool(kind) for kind in inputs["mm_token_type_ids"][0]]
    assert marked == [i == assistant.processor.image_token_id for i in inputs["input_ids"][0]]
    assert assistant.processor.image_token_ids == [assistant.processor.image_token_id]


def test_views_hold_at_least_a_window():
    branches = [BranchConfig(encoder="vit_nano", size=size, arguments={"windows": 2}) for size in (128, 256)]
    layout = PiipConfig(branches=branches, framing="aspect").geometry().layout((10, 2000))
    assert all(min(view.grid) >= 2 for view in layout.views)


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        (
            "processor_config.json",
            {"framing": "crop"},
            "vision_config.framing is 'aspect' in .* 'crop' in the proc",
        ),
        ("config.json", {"mean": [0.5, 0.5, 0.5]}, "vision_config.mean is .*0.5"),
    ],
)
def test_a_processor_that_differs_from_the_model_beside_it_is_refused(
    assistant, tmp_path, file, change, complaint
):
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / file).read_text())
    fields.get("image_processor", fields)["vision_config"] |= change
    (tmp_path / file).write_text(json.dumps(fields))
    for load in (StepwellProcessor, StepwellImageProcessor, AutoProcessor):
        with pytest.raises(ValueError, match=complaint) as refusal:
            load.from_pretrained(tmp_path)
        assert "\n" not in str(refusal.value)


def test_a_processor_with_another_template_than_the_model_beside_it_is_refused(assistant, tmp_path):
    assistant.model.save_pretrained(tmp_path)
    StepwellProcessor(
        assistant.processor.image_processor, assistant.processor.tokenizer, template="qwen"
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"template is 'chatml_direct' in the model's .* and 'qwen'"):
        AutoProcessor.from_pretrained(tmp_path)


def test_an_assistant_is_not_made_of_a_model_and_another_models_processor(build, assistant):
    other = build(PiipConfig(**{**asdict(assistant.model.config.vision), "framing": "pad"}))
    with pytest.raises(ValueError, match=r"vision_config\.framing"):
        Assistant(assistant.model, other.processor)


def test_the_geometry_of_an_image_processor_may_change_when_it_is_loaded(assistant, draw, tmp_path):
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    processor = StepwellImageProcessor.from_pretrained(tmp_path, vision={"sizes": [32, 64]})
    assert processor.geometry.layout((50, 50)).inputs == ((64, 64),)
    for load in (StepwellProcessor, AutoProcessor):
        processor = load.from_pretrained(tmp_path, vision={"sizes": [32, 64]})
        assert processor.geometry.layout((50, 50)).inputs == ((64, 64),)
    for load in (StepwellImageProcessor, StepwellProcessor):
        with pytest.raises(ValueError, match=r"vision\.interaction of a 'piip' system cannot change"):
            load.from_pretrained(tmp_path, vision={"interaction": {}})


def test_keywords_that_nobody_knows_are_refused_when_a_processor_is_loaded(assistant, tmp_path):
    assistant.processor.save_pretrained(tmp_path)
    for load in (StepwellImageProcessor, StepwellProcessor, AutoProcessor):
        with pytest.raises(ValueError, match=r"knows no 'framing'$"):
            load.from_pretrained(tmp_path, framing="crop", local_files_only=True)
    processor = StepwellProcessor.from_pretrained(tmp_path, model_max_length=77, use_fast=True)
    assert processor.tokenizer.model_max_length == 77  # the tokenizer's keywords are known
    assert AutoProcessor.from_pretrained(
        tmp_path, _from_pipeline="image-text-to-text", attn_implementation="sdpa"
    )


def test_a_tokenizer_whose_placeholder_is_not_the_models_is_refused(assistant, tmp_path):
    token = assistant.processor.image_token_id
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "image_token_id": token + 1}))
    complaint = f"image_token_id is {token + 1} in the model's config.json and {token} in the processor"
    for load in (StepwellProcessor.from_pretrained, stepwell.load):
        with pytest.raises(ValueError, match=complaint) as refusal:
            load(tmp_path)
        assert "\n" not in str(refusal.value)
    other = copy.deepcopy(assistant.processor)
    other.image_token_id = token + 1
    with pytest.raises(ValueError, match=f"image_token_id is {token} in the model's .* and {token + 1}"):
        Assistant(assistant.model, other)


@pytest.mark.parametrize("load", [StepwellProcessor, StepwellImageProcessor])
def test_the_configuration_is_read_where_the_processor_is(assistant, tmp_path, load):
    (tmp_path / "config.json").write_text(json.dumps(StepwellConfig().to_dict()))  # of another model
    assistant.model.save_pretrained(tmp_path / "ours")
    assistant.processor.save_pretrained(tmp_path / "ours")
    loaded = load.from_pretrained(tmp_path, subfolder="ours")
    assert loaded.geometry == assistant.processor.geometry
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    changed = {"image_token_id": 7, "vision_config": {**fields["vision_config"], "framing": "crop"}}
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**fields, **changed}))
    with pytest.raises(ValueError, match=r"in the model's config\.json"):
        load.from_pretrained(tmp_path, subfolder="ours")


def test_half_characters_and_bytes_that_are_no_text_are_replaced(assistant):
    processor = assistant.processor

    def ids(question):
        messages = [{"role": "user", "content": question}]
        return [
            processor.apply_chat_template(messages, tokenize=True),
            processor(text=question)["input_ids"],
            processor(text=processor.apply_chat_template(messages))["input_ids"],
        ]

    assert ids("gr\udcf6\udcdfe \ud83d?") == ids("gr\ufffd\ufffde \ufffd?")
    assert ids("gr\udcc3\udcb6sse?") == ids("gr\u00f6sse?")
