"""The recipe of the shipped reader, from its first stage to its last, on scans that are drawn here."""

from __future__ import annotations

import json

import pytest

import stepwell
from stepwell.reader.drawn import DrawnPages
from stepwell.train.recipe import load_recipe
from stepwell.train.run import train

STEPS = 1


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """The folder `scans` that the recipe wants, where it is run."""
    (tmp_path / "scans/annotations").mkdir(parents=True)
    images, annotations, fields = [], [], []
    for number in range(3):
        page = DrawnPages(count=3, sides=(400, 500), text=(12, 20), page="receipt")[number]
        name = f"{number}.png"
        page.image.save(tmp_path / "scans" / name)
        images.append(
            {"id": number, "file_name": name, "width": page.image.width, "height": page.image.height}
        )
        for line in page.lines:
            left, top, right, bottom = line.box
            box = [left, top, right - left, bottom - top]
            annotations.append({"id": len(annotations), "image_id": number, "bbox": box, "text": line.text})
        fields.append(json.dumps({"image": name, "fields": {"total": page.lines[-1].text}}))
    text = {"images": images, "annotations": annotations, "categories": []}
    (tmp_path / "scans/annotations/textlines_train.json").write_text(json.dumps(text))
    (tmp_path / "scans/annotations/fields_train.jsonl").write_text("\n".join(fields))
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_every_stage_of_the_recipe_runs_and_the_model_answers(scans, tmp_path):
    names = [stage.name for stage in load_recipe("reader_tiny").stages]
    short = [f"stages.{name}.steps={STEPS}" for name in names]
    decaying = ("pages", "whole", "whole_again")
    decay = [f"stages.{name}.schedule.arguments.num_decay_steps=1" for name in decaying]
    folder = train("reader_tiny", [*short, *decay, "bf16=false", "workers=0", f"output={tmp_path}/runs"])
    trained = {path.name for path in folder.parent.glob("[0-9]*_*")}
    assert trained == {f"{i}_{name}" for i, name in enumerate(names, 1)}
    model = stepwell.load(folder)
    assert model.boxes_are_regions
    question = "What is written in [0.1, 0.2, 0.5, 0.25]?"
    assert model.layouts((tmp_path / "scans/0.png", question))[0].cut is not None
    assert isinstance(model.ask(tmp_path / "scans/0.png", question, max_new_tokens=2), str)
