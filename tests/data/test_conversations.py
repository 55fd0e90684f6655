"""LLaVA files as a source."""

from __future__ import annotations

import json

import pytest

from stepwell.data.conversations import Conversations


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


def turn(speaker, value):
    return {"from": speaker, "value": value}


def test_placeholders_move_to_the_front_and_paths_start_at_the_folder(tmp_path):
    entry = {
        "image": "a/b.jpg",
        "conversations": [turn("human", "What is it? <image>"), turn("gpt", "A cat")],
    }
    source = Conversations(write(tmp_path / "x.json", [entry]), images=tmp_path / "images")
    assert len(source) == 1
    assert source[0].image == tmp_path / "images" / "a" / "b.jpg"
    question, answer = source[0].messages
    assert question == {"role": "user", "content": "<image>\nWhat is it?"}
    assert answer == {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]}


def test_text_alone_keeps_its_words(tmp_path):
    entry = {"conversations": [turn("human", " what does <image> mean? "), turn("gpt", "A place.")]}
    sample = Conversations(write(tmp_path / "x.json", [entry]))[0]
    assert sample.image is None
    assert sample.messages[0]["content"] == [{"type": "text", "text": " what does <image> mean? "}]


@pytest.mark.parametrize("image", ["", None, []])
def test_an_empty_image_is_no_image(tmp_path, image):
    entry = {"image": image, "conversations": [turn("human", "<image> tags?"), turn("gpt", "Text.")]}
    sample = Conversations(write(tmp_path / "x.json", [entry]))[0]
    assert sample.image is None
    assert sample.messages[0]["content"] == [{"type": "text", "text": "<image> tags?"}]


@pytest.mark.parametrize("image", [5, ["a.jpg", "b.jpg"]])
def test_an_image_that_is_no_path_is_refused(tmp_path, image):
    entry = {"image": image, "conversations": [turn("human", "x"), turn("gpt", "y")]}
    with pytest.raises(ValueError, match=r"conversation 0: an image is one path, got (5|\['a)"):
        Conversations(write(tmp_path / "x.json", [entry]))[0]


def test_one_leading_answer_is_dropped(tmp_path):
    turns = [turn("gpt", "Hello"), turn("human", "Hi"), turn("gpt", "Yes?")]
    messages = Conversations(write(tmp_path / "x.json", [{"conversations": turns}]))[0].messages
    assert [message["role"] for message in messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    "speakers", [[], ["human"], ["human", "human"], ["gpt", "gpt", "human"], ["system", "human", "gpt"]]
)
def test_turns_that_do_not_alternate_are_refused(tmp_path, speakers):
    turns = [turn(speaker, "x") for speaker in speakers]
    source = Conversations(write(tmp_path / "x.json", [{"conversations": turns}]))
    with pytest.raises(
        ValueError, match=r"conversation 0: (human and gpt must take turns|turn 1 is from 'bot')"
    ):
        source[0]


def test_an_unknown_speaker_is_refused(tmp_path):
    turns = [turn("human", "x"), turn("bot", "y")]
    source = Conversations(write(tmp_path / "x.json", [{"conversations": turns}]))
    with pytest.raises(ValueError, match="conversation 0: turn 1 is from 'bot'; expected one of human, gpt"):
        source[0]


def test_a_file_that_is_no_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON list"):
        Conversations(write(tmp_path / "x.json", {"conversations": []}))
