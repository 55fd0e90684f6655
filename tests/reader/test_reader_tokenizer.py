"""The tokenizer of small readers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stepwell.reader.questions import BOX_FORMAT
from stepwell.reader.tokenizer import build_reader_tokenizer, coordinate_tokens

TOKENIZER = build_reader_tokenizer()


def pieces(text):
    return TOKENIZER.convert_ids_to_tokens(TOKENIZER(text, add_special_tokens=False).input_ids)


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_a_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False).input_ids) == text


def test_capitals_and_digits_are_spelled():
    assert pieces("RM 10.220") == list("RM 10.220")


def test_coordinates_of_boxes_are_single_tokens_that_tell_left_and_bottom():
    text = "the region [0.037, 0.376, 1.000, 0.405]?"
    assert pieces(text)[2:] == [" ", "[0.037", ",", " ", "0.376", ",", " ", "1.000", ",", " ", "0.405]", "?"]
    forms = coordinate_tokens()
    assert [len(tokens) for tokens in forms.values()] == [1001] * 3
    for tokens in forms.values():
        assert TOKENIZER.unk_token_id not in TOKENIZER.convert_tokens_to_ids(tokens)


def test_questions_are_short():
    question = f"What text is written inside the region [0.1, 0.2]?{BOX_FORMAT}"
    assert pieces(question)[:7] == ["What", " text", " is", " written", " inside", " the", " region"]
    assert pieces(question)[-1] == BOX_FORMAT


def test_offsets_point_at_the_characters():
    text = "Read [0.500] AB é"
    encoded = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    assert "".join(text[start:end] for start, end in encoded["offset_mapping"]) == text


def test_saved_and_loaded_it_is_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\n<image>\nHow much is the total?<|im_end|> 12.50 漢"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.image_token == "<image>"


def test_building_twice_gives_the_same_vocabulary():
    assert build_reader_tokenizer().get_vocab() == TOKENIZER.get_vocab()
