"""Sheets of lines cut out of scans."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from stepwell.reader.cut_lines import CutLines
from stepwell.reader.text_lines import TextLines


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


def test_a_sheet_too_small_for_any_line_shows_one_all_the_same(pages):
    sample = sheets(pages, size=(40, 64), text=(24.0, 24.0))[0]
    assert len(sample.lines) == 1
    assert sample.lines[0].box[2] <= 64


def test_an_index_beyond_is_refused(pages):
    with pytest.raises(IndexError):
        sheets(pages)[-1]
