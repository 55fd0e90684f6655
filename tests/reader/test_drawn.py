"""Drawn pages: what is said of them is what PIL's fonts put there."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from stepwell.reader.drawn import KINDS, DrawnPages, draw_page
from stepwell.reader.glyphs import FONTS, HELD_OUT, _is_complete, face, typefaces
from stepwell.reader.page import Line
from stepwell.reader.scan import _skewed


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


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("worn", [0.0, 1.0])
def test_lines_are_darker_than_the_paper_around_them(kind, worn):
    for index in range(6):
        page = draw_page(0, index, size=(400, 300), text=(14, 20), kind=kind, worn=worn)
        pixels = np.asarray(page.image.convert("L"), dtype=float)
        assert page.lines
        assert len(page.lines) == len(page.ems)
        for line in page.lines:
            left, top, right, bottom = (int(value) for value in line.box)
            assert pixels[top:bottom, left:right].min() < np.median(pixels) - 15


def test_clean_pages_are_never_skewed_and_worn_ones_are_now_and_then():
    def slopes(worn):
        pages = [draw_page(9, i, size=(300, 300), text=(12, 14), kind="form", worn=worn) for i in range(24)]
        return [max((abs(line.slope) for line in page.lines), default=0.0) for page in pages]

    assert not any(slopes(0.0))
    skewed = [slope for slope in slopes(1.0) if slope]
    assert 6 <= len(skewed) <= 18
    assert max(skewed) < 0.036  # two degrees


@pytest.mark.parametrize("angle", [-0.03, 0.03])
def test_lines_of_a_skewed_page_are_where_their_ink_is(angle):
    ink = np.zeros((400, 300), dtype=np.uint8)
    line = face("DejaVuSans", 18).draw(ink, 60, 120, "HHHHHHHH")
    away = face("DejaVuSans", 18).draw(np.zeros_like(ink), 0, 0, "HH")
    turned, (placed, gone) = _skewed(ink, [line, away], angle)
    rows, cols = np.nonzero(turned > 60)
    left, top, right, bottom = placed.box
    assert (left, top, right, bottom) == pytest.approx(
        (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1), abs=2.5
    )
    assert placed.slope == pytest.approx(np.tan(angle))
    assert placed.height == pytest.approx(line.height, abs=0.5)
    for first, last in zip(placed.edges[:-1], placed.edges[1:], strict=True):
        middle = (first + last) / 2
        of_character = (cols >= first) & (cols < last)
        assert rows[of_character].mean() == pytest.approx(placed.middle(middle), abs=1.0)
    assert gone is None  # it has left the page


def test_a_part_of_a_sloping_line_slopes_with_it():
    edges = tuple(10.0 + 10 * i for i in range(9))
    line = Line(text="ABCDEFGH", box=(10, 20, 90, 40), edges=edges, slope=0.1)
    assert line.height == 12
    part = line.part("GH")
    assert part.box == (70, pytest.approx(26), 90, pytest.approx(40))
    assert part.height == pytest.approx(12)
    assert part.middle(80) == pytest.approx(line.middle(80)) == pytest.approx(33)


def test_tables_have_strokes_and_cells_beside_one_another():
    page = draw_page(3, 0, size=(400, 500), text=(12, 14), kind="table", worn=0)
    rows = {}
    for line in page.lines:
        rows.setdefault(round(line.middle(0) / 6), []).append(line)
    assert max(map(len, rows.values())) >= 2
    for line in page.lines:
        assert line.box[2] <= 500


def test_forms_tell_the_fields_that_they_show():
    fields = [draw_page(1, i, size=(600, 400), text=(12, 14), kind="form").fields for i in range(12)]
    assert sum("company" in each for each in fields) >= 9
    assert sum("date" in each for each in fields) >= 6
    assert sum("total" in each for each in fields) >= 4


def test_every_page_may_be_long_and_its_text_small_or_large():
    page = draw_page(0, 0, size=(2000, 900), text=(8, 40), kind="document")
    assert page.image.size == (900, 2000)
    assert min(page.ems) >= 8
    assert max(page.ems) <= 40
    with pytest.raises(ValueError, match="up to 2000 px long, got 2001x900"):
        draw_page(0, 0, size=(2001, 900), text=(8, 40))


def test_typefaces_of_a_folder_are_used_and_incomplete_ones_are_not(tmp_path):
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for name in ("cmtt10", "STIXSizOneSymReg", "DejaVuSerif-Italic"):  # the second has symbols alone
        shutil.copy(fonts / f"{name}.ttf", tmp_path / f"{name}.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"nothing")
    found = typefaces(tmp_path)
    assert [Path(name).stem for name in found] == ["DejaVuSerif-Italic", "cmtt10"]
    assert set(found) < set(DrawnPages(count=1, fonts=tmp_path).fonts)
    one = DrawnPages(count=1, seed=2, sides=(300, 300), text=(12, 14))
    assert not set(HELD_OUT) & set(one.fonts)
    assert set(HELD_OUT) < set(DrawnPages(count=1, held_out=True).fonts)
    page = draw_page(0, 0, size=(300, 300), text=(20, 20), kind="lines", fonts=found)
    assert (
        page.image.tobytes() != draw_page(0, 0, size=(300, 300), text=(20, 20), kind="lines").image.tobytes()
    )
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no typeface"):
        typefaces(tmp_path / "none")
    with pytest.raises(ValueError, match="is no typeface that can be read"):
        face(str(tmp_path / "broken.ttf"), 12)


def test_what_is_held_out_has_every_character():
    for name in (*FONTS, *HELD_OUT):
        assert _is_complete(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf")


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
    with pytest.raises(ValueError, match=r"unknown kind of page 'poem'; choose mixed, .* or lines"):
        DrawnPages(count=2, page="poem")
    for wrong in ({"sides": (300, 200)}, {"aspect": (0, 1)}, {"text": (20, 10)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} are the least and the most"):
            DrawnPages(count=2, **wrong)
