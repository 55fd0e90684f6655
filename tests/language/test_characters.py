"""Text of which nothing is half a character."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stepwell.language.characters import well_formed


@given(st.text())
def test_text_stays_as_it_is(text: str) -> None:
    assert well_formed(text) == text


@given(st.binary())
def test_undecoded_bytes_are_read_as_utf8(raw: bytes) -> None:
    """However Python's file system encoding would have had them."""
    for encoding in ("utf-8", "ascii"):
        assert well_formed(raw.decode(encoding, "surrogateescape")) == raw.decode("utf-8", "replace")


def test_half_a_character_is_replaced() -> None:
    assert well_formed("a\ud83d b\udfff") == "a\ufffd b\ufffd"
