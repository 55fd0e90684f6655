"""What of an answer may be shown while it grows, and how its tokens are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepwell.serve.rows import Ended, Row


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def pieces_of(text: str | bytes, **options: Any) -> list[Any]:
    told: list[Any] = []
    raw = text.encode() if isinstance(text, str) else text
    options = {"max_new_tokens": len(raw) + 1, **options}
    row = Row(Bytes(), end=[0], tell=told.append, **options)
    for token in [*raw, 0]:
        if row.finish is None:
            row.add(token)
    return told


def test_characters_are_shown_whole() -> None:
    *pieces, ended = pieces_of("aé漢🙂 b")
    assert pieces == ["a", "é", "漢", "🙂", " b"]
    assert ended == Ended("stop", len("aé漢🙂 b".encode()))


def test_blanks_around_an_answer_are_not_in_it() -> None:
    assert pieces_of("\n  a b \n ") == ["a", " b", Ended("stop", 9)]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    *pieces, _ = pieces_of("a漢".encode()[:-1])
    assert "".join(pieces) == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one END two", ["END"], "one"),
        ("one EN two", ["END"], "one EN two"),
        ("one EEND", ["END"], "one E"),
        ("abcabd", ["abd"], "abc"),
        ("END", ["END"], ""),
        ("one. two; three", [";", "."], "one"),
        ("one EN", ["END"], "one EN"),
        ("xa漢y", ["a漢"], "x"),
        ("ax éy", ["x é"], "a"),
    ],
)
def test_what_stops_an_answer_is_never_shown(text: str, stop: list[str], shown: str) -> None:
    *pieces, ended = pieces_of(text, stop=stop)
    assert "".join(pieces) == shown
    assert ended.finish == "stop"


def test_an_answer_is_as_long_as_is_allowed() -> None:
    assert pieces_of("abcdef", max_new_tokens=3)[-1] == Ended("length", 3)
    assert "".join(pieces_of("abcdef", max_new_tokens=3)[:-1]) == "abc"


def drawn(count: int, scores: torch.Tensor, **options: Any) -> list[int]:
    row = Row(Bytes(), end=[0], max_new_tokens=1, **options)
    return [row.next(scores) for _ in range(count)]


def test_tokens_are_drawn_by_their_shares() -> None:
    scores = torch.tensor([0.6, 0.3, 0.1]).log()
    counts = torch.bincount(torch.tensor(drawn(4000, scores, temperature=1.0, seed=0)), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.6, 0.3, 0.1]), atol=0.03, rtol=0)
    cold = torch.bincount(torch.tensor(drawn(4000, scores, temperature=0.5, seed=0)), minlength=3) / 4000
    squared = torch.tensor([0.36, 0.09, 0.01])
    torch.testing.assert_close(cold, squared / squared.sum(), atol=0.03, rtol=0)


def test_top_p_leaves_out_the_unlikely() -> None:
    scores = torch.tensor([0.1, 0.6, 0.3]).log()
    assert set(drawn(500, scores, temperature=1.0, top_p=0.59, seed=0)) == {1}
    assert set(drawn(500, scores, temperature=1.0, top_p=0.61, seed=0)) == {1, 2}
    assert set(drawn(500, scores, temperature=1.0, top_p=0.95, seed=0)) == {0, 1, 2}


@pytest.mark.parametrize("extreme", [{"temperature": 1e-40}, {"temperature": 1.0, "top_p": 1e-50}])
def test_the_least_of_chance_is_the_best_token(extreme: Any) -> None:
    scores = torch.tensor([1.0, 300.0, 2.0])
    row = Row(Bytes(), end=[0], max_new_tokens=1, seed=0, **extreme)
    assert row.temperature == 0 or {row.next(scores) for _ in range(20)} == {1}


def test_seeds() -> None:
    scores = torch.zeros(50)
    first = drawn(20, scores, temperature=1.0, seed=-1)
    assert first == drawn(20, scores, temperature=1.0, seed=-1)
    assert first != drawn(20, scores, temperature=1.0, seed=2**70)
