"""Windows of scanned pages."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from stepwell.reader.drawn import draw_page
from stepwell.reader.text_lines import TextLines
from stepwell.train.recipe import load_recipe
from stepwell.train.tasks import find_task
from stepwell.views.region import region_in_words


@pytest.fixture
def scans(tmp_path):
    """A receipt on the middle of a large white sheet, as a COCO file with key fields."""
    page = draw_page(4, 0, size=(600, 400), text=(14, 16), kind="receipt")
    sheet = Image.new("RGB", (1600, 1800), "white")
    sheet.paste(page.image, (500, 700))
    sheet.save(tmp_path / "scan.png")
    annotations = [
        {
            "image_id": 1,
            "text": line.text,
            "bbox": [line.box[0] + 500, line.box[1] + 700, line.box[2] - line.box[0], line.height],
        }
        for line in page.lines
    ]
    file = {"images": [{"id": 1, "file_name": "scan.png"}], "annotations": annotations}
    (tmp_path / "lines.json").write_text(json.dumps(file))
    (tmp_path / "fields.jsonl").write_text(json.dumps({"image": "scan.png", "fields": page.fields}) + "\n")
    return tmp_path, page


def source(folder, **changes):
    settings = {"images": folder, "fields": folder / "fields.jsonl", **changes}
    return TextLines(folder / "lines.json", **settings)


def test_white_margins_are_cut_and_all_text_is_kept(scans):
    folder, page = scans
    sample = source(folder, whole=1.0)[0]
    assert len(sample.lines) == len(page.lines)
    assert max(sample.image.size) <= 1024
    left, right = min(line.box[0] for line in sample.lines), max(line.box[2] for line in sample.lines)
    assert right - left > 0.7 * sample.image.width


def test_pages_are_opened_within_the_limits_of_the_recipe(scans):
    folder, _ = scans
    places = {"path": str(folder / "lines.json"), "images": str(folder)}
    data = json.dumps([{"kind": "text_lines", **places}])
    for pixels, complaint in ((2_000_000, "max_pixels=2880000"), (2_880_000, None)):
        recipe = load_recipe(
            "reader_smoke", [f"image_limits.max_pixels={pixels}", f"stages.look.data={data}"]
        )
        pages = find_task("reader")(recipe, recipe.stages[0]).source(recipe.stages[0].data[0])
        with pytest.raises(ValueError, match=complaint) if complaint else nullcontext():
            pages[0]


def test_boxes_follow_the_window(scans):
    folder, _ = scans
    for index in range(4):
        sample = source(folder, whole=0.0)[index]
        pixels = np.asarray(sample.image.convert("L"), dtype=float)
        for line in sample.lines:
            left, top, right, bottom = (max(0, round(value)) for value in line.box)
            assert pixels[top:bottom, left:right].min() < np.median(pixels) - 30
            assert not line.exact


def test_windows_change_the_scale_and_repeat_by_index(scans):
    folder, _ = scans
    pages = source(folder, whole=0.5)
    heights = {round(np.median([line.height for line in pages[i].lines])) for i in range(8)}
    assert len(heights) > 2
    assert pages[3].image.tobytes() == pages[3].image.tobytes()


def test_fields_are_asked_only_where_they_are_seen(scans):
    folder, page = scans
    for index in range(6):
        sample = source(folder, whole=0.0, text=(30.0, 30.0), reads=1)[index]
        seen = " ".join(line.text for line in sample.lines)
        for answer in sample.messages[1::2]:
            assert all(word in seen for word in answer["content"].split())
    answers = {answer["content"] for answer in source(folder, whole=1.0)[0].messages[1::2]}
    assert page.fields["company"] in answers


def test_a_file_without_text_is_refused(tmp_path):
    (tmp_path / "lines.json").write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(ValueError, match="no annotation with a text"):
        TextLines(tmp_path / "lines.json", images=tmp_path)


def test_fields_without_a_value_are_not_asked_for(scans):
    folder, page = scans
    fields = {"image": "scan.png", "fields": {**page.fields, "total": "", "date": None, "company": " "}}
    (folder / "fields.jsonl").write_text(json.dumps(fields))
    answers = [m["content"] for i in range(4) for m in source(folder, whole=1.0)[i].messages[1::2]]
    assert all(answer.strip() and answer != "NONE" for answer in answers)


def test_lines_without_a_text_are_faults_of_their_own(scans):
    folder, _ = scans
    file = json.loads((folder / "lines.json").read_text())
    for annotation in file["annotations"][:2]:
        annotation["text"] = None
    (folder / "lines.json").write_text(json.dumps(file))
    faults = source(folder).faults
    assert len({where for where, _ in faults}) == 2
    assert {reason for _, reason in faults} == {"its text is no text"}


@pytest.mark.parametrize("whole", [0.0, 1.0])
def test_a_line_is_looked_at_closely_at_no_more_than_its_size(scans, whole):
    folder, page = scans
    heights = {line.text: line.height for line in page.lines}
    for index in range(6):
        sample = source(folder, close=1.0, whole=whole)[index]
        (line,) = sample.spelled
        ((left, top, right, bottom),) = sample.regions
        width, height = sample.image.size
        assert sample.messages[1]["content"] == line.text in heights
        own = heights[line.text]
        assert min(12.5, 0.88 * own) <= line.height <= 1.11 * own
        box = (left * width, top * height, right * width, bottom * height)
        assert all(abs(a - b) <= 0.25 * line.height + 1e-6 for a, b in zip(box, line.box, strict=True))
        pixels = np.asarray(sample.image.convert("L"), dtype=float)
        rows = slice(round(line.box[1]), round(line.box[3]))
        assert pixels[rows, round(line.box[0]) : round(line.box[2])].min() < np.median(pixels) - 30
    assert (width > 300) == (whole == 1.0) or whole == 0.0


def test_what_is_asked_closely_may_tell_its_box(scans):
    folder, _ = scans
    samples = [source(folder, close=1.0)[index] for index in range(20)]
    told = [(region_in_words(sample.messages[0]["content"]), sample.regions[0]) for sample in samples]
    assert 3 < sum(box is None for box, _ in told) < 17
    for box, region in told:
        assert box is None or np.allclose(box, region, atol=6e-4)
