"""Sheets of lines cut out of scans."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from stepwell.reader.cut_lines import CutLines
from stepwell.reader.text_lines import TextLines
from stepwell.train.recipe import load_recipe
from stepwell.views.region import region_in_words


@pytest.fixture
def pages(tmp_path):
    """Two scans of bars; the text of a line says how dark and how long it is."""
    images, annotations = [], []
    for number, page in enumerate((1, 2)):
        scan = Image.new("L", (700, 500), 255)
        for row in range(8):
            shade, width = 20 + 10 * row, 120 + 40 * row
            box = (30, 20 + 60 * row, 30 + width, 50 + 60 * row)
            scan.paste(shade, box)
            text = f"{page}-{shade}-{width}"
            annotations.append({"image_id": page, "text": text, "bbox": [*box[:2], width, 30]})
        scan.save(tmp_path / f"{number}.png")
        images.append({"id": page, "file_name": f"{number}.png"})
    (tmp_path / "lines.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return TextLines(tmp_path / "lines.json", images=tmp_path)


def sheets(pages, **changes):
    return CutLines(pages, **{"size": (256, 768), "text": (18.0, 24.0), "reads": 4, **changes})


def test_a_sheet_shows_lines_of_all_pages_where_their_boxes_are(pages):
    source = sheets(pages)
    seen = set()
    for index in range(6):
        sample = source[index]
        assert sample.image.size == (768, 256)
        assert len(sample.lines) > 4
        pixels = np.asarray(sample.image.convert("L"), dtype=float)
        for line in sample.lines:
            page, shade, width = map(int, line.text.split("-"))
            seen.add(page)
            left, top, right, bottom = line.box
            assert 0 <= left < right <= 768
            assert 0 <= top < bottom <= 256
            assert 18 * 0.85 - 1 <= line.height <= 24 * 1.1 + 1
            assert (right - left) / line.height == pytest.approx(width / 30, rel=0.25)
            inner = pixels[round(top) + 3 : round(bottom) - 3, round(left) + 3 : round(right) - 3]
            above = pixels[max(0, round(top) - 2), round(left) + 3 : round(right) - 3]
            assert inner.mean() < above.mean() - 40
            assert inner.mean() == pytest.approx(shade, abs=50)
    assert seen == {1, 2}


def test_no_line_lies_on_another(pages):
    for index in range(4):
        boxes = [line.box for line in sheets(pages)[index].lines]
        for i, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[i + 1 :]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_the_same_index_gives_the_same_sheet(pages):
    assert sheets(pages)[5].image.tobytes() == sheets(pages)[5].image.tobytes()
    assert sheets(pages)[5].image.tobytes() != sheets(pages, seed=1)[5].image.tobytes()


def test_so_many_lines_are_asked_about_or_one_closely(pages):
    assert len(sheets(pages)[0].messages) == 8
    sample = sheets(pages, close=1.0)[0]
    (line,) = sample.spelled
    assert sample.messages[1]["content"] == line.text
    assert len(sample.regions) == 1


def test_a_sheet_lies_on_a_page_and_is_looked_at_closely(pages):
    places = set()
    for index in range(5):
        alone, sample = sheets(pages)[index], sheets(pages, page=(1.5, 3.0))[index]
        width, height = sample.image.size
        assert 768 * 1.5 - 1 <= width <= 768 * 3 + 1
        assert 256 * 1.5 - 1 <= height <= 256 * 3 + 1
        ((left, top, right, bottom),) = sample.regions
        shown = tuple(map(round, (left * width, top * height, right * width, bottom * height)))
        assert sample.image.crop(shown).tobytes() == alone.image.tobytes()
        places.add(shown[:2])
        for line, unmoved in zip(sample.lines, alone.lines, strict=True):
            assert line.text == unmoved.text
            assert line.box == unmoved.shifted(*shown[:2]).box
            assert [edge - shown[0] for edge in line.edges] == pytest.approx(unmoved.edges)
        assert len(sample.messages) == 8  # the boxes in words are of the page
        line = sample.spelled[0]
        box = region_in_words(sample.messages[0]["content"])
        assert abs(box[0] * width - line.box[0]) < line.height
        assert abs(box[1] * height - line.box[1]) < line.height
    assert len(places) == 5


def test_a_sheet_too_small_for_any_line_shows_one_all_the_same(pages):
    sample = sheets(pages, size=(40, 64), text=(24.0, 24.0))[0]
    assert len(sample.lines) == 1
    assert sample.lines[0].box[2] <= 64


def test_an_index_beyond_is_refused(pages):
    with pytest.raises(IndexError):
        sheets(pages)[-1]


def tear(whole, torn):
    """A file whose header alone can be read."""
    Image.open(whole).save(torn)
    torn.write_bytes(torn.read_bytes()[:-2000])


def test_what_cannot_be_cut_out_is_left_out(tmp_path, pages):
    file = json.loads((tmp_path / "lines.json").read_text())
    file["annotations"].append({"image_id": 1, "text": "THIN", "bbox": [30, 20, 90, 0.3]})
    tear(tmp_path / "1.png", tmp_path / "torn.jpg")
    file["images"].append({"id": 3, "file_name": "torn.jpg"})
    file["annotations"].append({"image_id": 3, "text": "TORN", "bbox": [30, 20, 90, 30]})
    (tmp_path / "more.json").write_text(json.dumps(file))
    source = sheets(TextLines(tmp_path / "more.json", images=tmp_path))
    with pytest.warns(UserWarning, match=r"no line is cut out of .*torn\.jpg") as told:
        texts = {line.text for i in range(8) for line in source[i].lines}
    assert len(told) == 1
    assert texts == {line.text for i in range(8) for line in sheets(pages)[i].lines}


def test_pages_of_which_nothing_can_be_cut_are_refused(tmp_path, pages):
    tear(tmp_path / "1.png", tmp_path / "torn.jpg")
    file = {
        "images": [{"id": 1, "file_name": "torn.jpg"}],
        "annotations": [{"image_id": 1, "text": "TORN", "bbox": [30, 20, 90, 30]}],
    }
    (tmp_path / "lines.json").write_text(json.dumps(file))
    source = sheets(TextLines(tmp_path / "lines.json", images=tmp_path))
    with (
        pytest.warns(UserWarning, match="no line is cut out"),
        pytest.raises(ValueError, match=r"no line can be cut out of 100 pages of .*lines\.json"),
    ):
        source[0]


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("page", [0.5, 3.0], "page is how many times a sheet, at least 1, got 0.5"),
        ("page", [6.0, 1.0], "above 0 and rising"),
        ("text", [0, 20], "above 0 and rising"),
        ("text", [44, 16], "above 0 and rising"),
        ("text", [20, 300], "lines 300 pixels high do not fit a sheet of 384"),
    ],
)
def test_sheets_that_cannot_be_made_are_refused_in_the_recipe(field, value, complaint):
    data = {"kind": "cut_lines", "path": "lines.json", "images": ".", field: value}
    with pytest.raises(ValueError, match=complaint):
        load_recipe("reader_smoke", [f"stages.answer.data={json.dumps([data])}"])
