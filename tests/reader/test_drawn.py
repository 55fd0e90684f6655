"""Drawn pages: what is said of them is what PIL's fonts put there."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from stepwell.reader.drawn import DrawnPages, draw_page
from stepwell.reader.glyphs import FONTS, face


@pytest.mark.parametrize("name", FONTS)
def test_a_drawn_character_has_the_pixels_pil_draws(name):
    at = face(name, 20)
    ours = np.zeros((40, 40), dtype=np.uint8)
    at.draw(ours, 5, 3, "R")
    theirs = Image.new("L", (40, 40))
    ImageDraw.Draw(theirs).text((5, 3), "R", fill=255, font=at._font)
    np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_edges_are_the_fonts_advances():
    at = face("DejaVuSansMono", 20)
    line = at.draw(np.zeros((40, 200), dtype=np.uint8), 7, 5, "AB 1")
    advance = round(ImageFont.truetype(at._font.path, 20).getlength("A"))
    assert line is not None
    assert line.edges == tuple(7.0 + advance * i for i in range(5))


def test_boxes_are_tight_around_the_ink():
    page = np.zeros((60, 200), dtype=np.uint8)
    line = face("DejaVuSans", 24).draw(page, 10, 9, "Hg")
    rows = np.nonzero(page.any(axis=1))[0]
    assert line is not None
    assert (line.box[1], line.box[3]) == (rows[0], rows[-1] + 1)


def test_text_that_leaves_the_page_is_cut_and_said_so():
    line = face("DejaVuSansMono", 20).draw(np.zeros((40, 60), dtype=np.uint8), 0, 5, "ABCDEFGH")
    assert line is not None
    assert line.text == "ABCDE"  # 12 pixels each


def test_a_page_depends_on_seed_and_index_alone():
    first, again, other = (draw_page(3, i, size=(300, 200), text=(12, 20)) for i in (5, 5, 6))
    assert first.lines == again.lines
    assert first.image.tobytes() == again.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("kind", ["receipt", "document", "lines"])
def test_lines_are_darker_than_the_paper_around_them(kind):
    page = draw_page(0, 1, size=(400, 300), text=(14, 20), kind=kind)
    pixels = np.asarray(page.image.convert("L"), dtype=float)
    assert page.lines
    for line in page.lines:
        left, top, right, bottom = (int(value) for value in line.box)
        assert pixels[top:bottom, left:right].min() < np.median(pixels) - 40


def test_key_fields_of_receipts_are_printed_on_them():
    for index in range(10):
        page = draw_page(1, index, size=(700, 400), text=(12, 16), kind="receipt")
        printed = " ".join(line.text for line in page.lines)
        assert all(value in printed for value in page.fields.values())
        assert "company" in page.fields


def test_text_is_as_large_as_asked_for():
    heights = [
        line.height for i in range(5) for line in draw_page(2, i, size=(400, 400), text=(20, 24)).lines
    ]
    assert 10 < np.median(heights) < 26


def test_samples_keep_the_aspect_and_long_side_asked_for():
    source = DrawnPages(count=4, sides=(200, 240), aspect=(1.5, 2.0), text=(12, 14))
    for index in range(4):
        width, height = source[index].image.size
        assert 200 <= height <= 240
        assert 1.45 < height / width < 2.05


def test_reads_are_limited_and_the_first_turn_has_the_placeholder():
    sample = DrawnPages(count=1, sides=(400, 400), text=(12, 14), reads=3, page="document")[0]
    contents = [message["content"] for message in sample.messages]
    assert [question.count("<image>") for question in contents[::2]] == [1, 0, 0]
    assert contents[1::2] == [line.text for line in sample.spelled]


def test_wrong_pages_are_refused():
    with pytest.raises(ValueError, match="poem"):
        draw_page(0, 0, size=(300, 300), text=(12, 14), kind="poem")
    with pytest.raises(ValueError, match=r"40 px .* 60x300"):
        draw_page(0, 0, size=(60, 300), text=(12, 40))
    with pytest.raises(IndexError):
        DrawnPages(count=2)[2]
