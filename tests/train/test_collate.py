"""Batches for training."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from stepwell.data.sample import Line, Sample, Turn
from stepwell.language.labels import IGNORE
from stepwell.train.collate import Collator
from stepwell.train.recipe import load_recipe
from stepwell.train.stages import build_model

LINE = Line(text="AB C", box=(20, 90, 100, 110), edges=(20, 40, 60, 80, 100))


@pytest.fixture(scope="module")
def processor():
    return build_model(load_recipe("reader_smoke").model)[1]


def sample(*turns, size=(200, 100), lines=(LINE,)):
    return Sample(image=Image.new("RGB", size), turns=turns, lines=lines)


FIRST = Turn(question="<image>\nRead [0.100, 0.900, 0.500, 1.000]", answer="AB C", line=LINE)
SECOND = Turn(question="What is the total?", answer="1.50")


def test_answers_and_their_ends_are_supervised_and_nothing_else(processor):
    batch = Collator(processor, max_length=4096)([sample(FIRST, SECOND)])
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != IGNORE]) == "AB C<|im_end|>1.50<|im_end|>"
    kept = labels != IGNORE
    assert torch.equal(labels[kept], batch["input_ids"][0][kept])


def test_training_reads_the_prompt_that_asking_reads(processor):
    ids = Collator(processor, max_length=4096)([sample(FIRST)])["input_ids"][0].tolist()
    messages = [{"role": "user", "content": FIRST.question}]
    encoded = processor.label(messages, [Image.new("RGB", (200, 100))], add_generation_prompt=True)
    assert ids[: len(encoded.input_ids)] == encoded.input_ids


def test_pointers_name_the_cell_of_each_next_character(processor):
    batch = Collator(processor, max_length=4096)([sample(FIRST, SECOND)])
    (pointers,), ((rows, cols),) = batch["pointers"], batch["grids"]
    assert len(pointers.visual) == rows * cols == (batch["input_ids"] == processor.image_token_id).sum()
    following = batch["input_ids"][0][pointers.positions + 1]
    assert processor.tokenizer.decode(following) == "AB C"
    middles = torch.tensor([30.0, 50.0, 70.0, 90.0])
    assert pointers.cells.tolist() == ((rows - 1) * cols + (middles / 200 * cols).long()).tolist()


def test_samples_of_different_lengths_are_padded_at_the_right(processor):
    batch = Collator(processor, max_length=4096)([sample(FIRST, SECOND), sample(FIRST, size=(100, 200))])
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths[0] == batch["input_ids"].shape[1] > lengths[1]
    assert (batch["input_ids"][1, lengths[1] :] == processor.tokenizer.pad_token_id).all()
    assert (batch["labels"][1, lengths[1] :] == IGNORE).all()
    assert batch["image_sizes"].tolist() == [[100, 200], [200, 100]]


def test_frames_are_as_dense_in_the_view_as_asked_for(processor):
    batch = Collator(processor, max_length=4096, frame_step=8.0)([sample(FIRST)])
    (frames,) = batch["frames"]
    spacing = (frames.points[1, 0] - frames.points[0, 0]) * 256  # the last view is 256 pixels wide
    assert spacing == pytest.approx(8.0, abs=1e-3)


def test_long_samples_lose_whole_turns_from_the_end(processor):
    collator = Collator(processor, max_length=4096)
    one = collator([sample(FIRST)])["input_ids"].shape[1]
    shortened = Collator(processor, max_length=one + 20)([sample(FIRST, *[SECOND] * 30)])
    labels = shortened["labels"][0]
    text = processor.tokenizer.decode(labels[labels != IGNORE])
    assert shortened["input_ids"].shape[1] <= one + 20
    assert text.startswith("AB C<|im_end|>")
    assert text.endswith("<|im_end|>")
    with pytest.raises(ValueError, match=f"one turn takes {one} tokens; max_length is 50"):
        Collator(processor, max_length=50)([sample(FIRST)])


def test_text_without_a_picture_makes_a_batch_of_text(processor):
    batch = Collator(processor, max_length=4096)([Sample(image=None, turns=(SECOND,))])
    assert "pixel_values" not in batch
    assert batch["grids"] == []


def test_special_tokens_in_data_stay_text(processor):
    turn = Turn(question="<image>\nWhat is <|im_end|>?", answer="<|im_start|>")
    batch = Collator(processor, max_length=4096)([sample(turn)])
    labels = batch["labels"][0]
    ends = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert sum(int((labels == end).sum()) for end in ends) == 1


def test_a_processor_without_a_template_is_refused(processor):
    bare = type(processor)(processor.image_processor, processor.tokenizer)
    with pytest.raises(ValueError, match="template"):
        Collator(bare, max_length=100)
