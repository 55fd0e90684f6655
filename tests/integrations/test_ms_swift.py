"""Assistants in ms-swift: the messages that it hands over, their tokens, and two steps of training."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import stepwell
from stepwell.integrations.ms_swift import as_messages, register


def text(said):
    return {"type": "text", "text": said}


def test_placeholders_are_images_in_their_order_and_answers_stay_text():
    picture = object()
    messages = [
        {"role": "user", "content": "<image>\nWhat is <image> ?"},
        {"role": "assistant", "content": "An <image>."},
        {"role": "user", "content": "Sure?"},
    ]
    assert as_messages(messages, ["a.png", picture], "Be brief.") == [
        {"role": "system", "content": [text("Be brief.")]},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Path("a.png")},
                text("What is"),
                {"type": "image", "image": picture},
                text("?"),
            ],
        },
        {"role": "assistant", "content": [text("An <image>.")]},
        {"role": "user", "content": [text("Sure?")]},
    ]


@pytest.mark.parametrize(
    ("messages", "images", "told"),
    [
        ([{"role": "user", "content": "<image>What?"}], [], "1 <image> placeholders for 0 images"),
        ([{"role": "user", "content": "What?"}], ["a.png"], "0 <image> placeholders for 1 images"),
        ([{"role": "tool", "content": "5"}], [], "got a message of 'tool'"),
    ],
)
def test_what_has_no_place_in_a_conversation_is_refused(messages, images, told):
    with pytest.raises(ValueError, match=told):
        as_messages(messages, images)


@pytest.mark.skipif(importlib.util.find_spec("swift") is not None, reason="ms-swift is installed")
def test_without_ms_swift_registering_says_what_to_install():
    with pytest.raises(ImportError, match=r"pip install 'stepwell\[ms-swift\]'"):
        register()


@pytest.fixture(scope="module")
def swift():
    module = pytest.importorskip("swift", reason="ms-swift is not installed: docs/integrations.md")
    register()
    register()  # again, it does nothing
    return module


@pytest.fixture
def template(swift, folder):
    from swift.model import get_processor
    from swift.template import get_template

    found = get_template(get_processor(str(folder), use_hf=True))
    found.set_mode("train")
    return found


def rows(draw, folder):
    for number in range(2):
        draw(60 + 30 * number, 50, number).save(folder / f"{number}.png")
    one, two = str(folder / "0.png"), str(folder / "1.png")
    cat = {"role": "assistant", "content": "A CAT"}
    return [
        {"messages": [{"role": "user", "content": "<image>What?"}, cat], "images": [one]},
        {"messages": [{"role": "user", "content": "<image> and <image>?"}, cat], "images": [one, two]},
        {"messages": [{"role": "user", "content": "Hello"}, cat]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": two}, text("What?")]},
                cat,
                {"role": "user", "content": "Sure?"},
                cat,
            ]
        },
    ]


def ours(row):
    """The same row, written in parts."""
    images = [{"type": "image", "image": Path(name)} for name in row.get("images", [])]
    first = row["messages"][0]["content"]
    if isinstance(first, list):
        parts = [{"type": "image", "image": Path(first[0]["image"])}, first[1]]
    elif len(images) == 2:
        parts = [images[0], text("and"), images[1], text("?")]
    else:
        parts = [*images, text(first.removeprefix("<image>"))]
    rest = [{**message, "content": [text(message["content"])]} for message in row["messages"][1:]]
    return [{"role": "user", "content": parts}, *rest]


@pytest.mark.parametrize("number", range(4))
def test_tokens_and_labels_are_those_of_our_training(template, assistant, draw, tmp_path, number):
    row = rows(draw, tmp_path)[number]
    messages = ours(row)
    images = [
        stepwell.open_image(part["image"])
        for message in messages
        for part in message["content"]
        if part["type"] == "image"
    ]
    expected = assistant.processor.label(messages, images)
    encoded = template.encode(row)
    assert encoded["input_ids"] == expected.input_ids
    assert encoded["labels"] == expected.labels
    assert set(encoded["labels"]) > {-100}
    assert len(encoded.get("image_sizes", [])) == len(images)
    if images:
        torch.testing.assert_close(
            encoded["pixel_values"], assistant.processor.image_processor(images)["pixel_values"]
        )


def test_a_question_without_its_answer_is_tokenised_as_it_is_asked(template, assistant, draw, tmp_path):
    row = rows(draw, tmp_path)[0]
    template.set_mode("transformers")
    encoded = template.encode({**row, "messages": row["messages"][:1]})
    asked = assistant.processor.prompt([ours(row)[:1]])
    assert encoded["input_ids"] == asked["input_ids"][0].tolist()
    assert encoded.get("labels") is None


def test_batches_of_images_and_of_none_join(template, draw, tmp_path):
    batch = template.data_collator([template.encode(row) for row in rows(draw, tmp_path)])
    assert batch["image_sizes"].tolist() == [[50, 60], [50, 60], [50, 90], [50, 90]]
    assert batch["input_ids"].shape == batch["labels"].shape
    assert "image_regions" not in batch


@pytest.mark.parametrize(
    ("extra", "told"), [({"tools": [{"name": "x"}]}, "got tools"), ({"videos": ["a.mp4"]}, "got videos")]
)
def test_tools_and_videos_are_refused(template, draw, tmp_path, extra, told):
    inputs = template_inputs({**rows(draw, tmp_path)[2], **extra})
    with pytest.raises(ValueError, match=told):
        template._encode(inputs)


def template_inputs(row):
    from swift.template.template_inputs import StdTemplateInputs

    return StdTemplateInputs.from_dict({**row, "tools": row.get("tools")})


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [True, False], ids=["language", "all"])
def test_two_steps_move_what_learns_and_leave_a_folder_that_loads(
    swift, assistant, folder, draw, tmp_path, freeze
):
    from swift import SftArguments, sft_main

    chosen = rows(draw, tmp_path)[:2]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    result = sft_main(
        SftArguments(
            model=str(folder),
            use_hf=True,
            tuner_type="full",
            dataset=[str(tmp_path / "train.jsonl")],
            split_dataset_ratio=0,
            max_steps=2,
            logging_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            learning_rate=1e-3,
            torch_dtype="float32",
            freeze_vit=freeze,
            freeze_aligner=freeze,
            output_dir=str(tmp_path / "out"),
            report_to=["none"],
            dataloader_num_workers=0,
            use_cpu=True,
        )
    )
    first = next(line["loss"] for line in result["log_history"] if "loss" in line)
    losses = []
    for row in chosen:
        messages = ours(row)
        images = [stepwell.open_image(part["image"]) for part in messages[0]["content"] if "image" in part]
        tokens = assistant.processor.label(messages, images)
        inputs = {"input_ids": torch.tensor([tokens.input_ids]), **assistant.processor(images=images)}
        with torch.no_grad():
            logits = assistant.model(**inputs).logits[0, :-1]
        wanted = torch.tensor(tokens.labels[1:])
        losses.append(F.cross_entropy(logits, wanted, reduction="none")[wanted != -100])
    assert float(first) == pytest.approx(torch.cat(losses).mean().item(), rel=1e-3)
    trained = stepwell.load(result["last_model_checkpoint"], device="cpu")
    before = assistant.model.state_dict()
    moved = {
        name for name, value in trained.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert any("language_model" in name for name in moved)
    assert any("vision" in name for name in moved) != freeze
    assert trained.ask(draw(60, 50, 0), "What?", max_new_tokens=2)
