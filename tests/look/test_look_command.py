"""`stepwell look`: a figure and its numbers for every kind of model, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from systems_to_see import BRANCHES, PIIP, SYSTEMS, UHD_V2, Build, Built, Draw

from stepwell import cli
from stepwell.fuse.interaction import InteractionConfig
from stepwell.look.look import look
from stepwell.look.panels import MOST_PANELS, Curve, chosen
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.dense_config import StepwellSegmenterConfig
from stepwell.models.perception import (
    PyramidBackbone,
    PyramidBackboneConfig,
    PyramidClassifierConfig,
    PyramidForImageClassification,
)
from stepwell.models.segmenter import StepwellForSemanticSegmentation

WIDE = {"branches": BRANCHES, "interaction": InteractionConfig(num_heads=4)}


def perception(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "backbone":
        return PyramidBackbone(PyramidBackboneConfig(DenseSettings(**WIDE)))
    if kind == "classifier":
        return PyramidForImageClassification(
            PyramidClassifierConfig(ClassifierSettings(**WIDE), num_labels=3)
        )
    return StepwellForSemanticSegmentation(
        StepwellSegmenterConfig(backbone_config=DenseSettings(**WIDE), num_labels=3)
    )


@pytest.mark.parametrize("kind", SYSTEMS)
@pytest.mark.parametrize("what", ["attention", "spectrum", "pca", "activation", "views"])
def test_every_system_gives_a_figure_with_its_numbers(
    built: Built, draw: Draw, tmp_path: Path, kind: str, what: Any
) -> None:
    options = {"attention": {"point": (0.6, 0.4)}, "activation": {"token": "total"}}.get(what, {})
    found = look([(kind, built(kind))], draw(150, 80), what, **options)  # type: ignore[arg-type]
    if kind in ("plain", "piip", "uhd_v2"):  # drawing takes longer than looking
        found.write(tmp_path / "look.png")
        with Image.open(tmp_path / "look.png") as figure:
            assert min(figure.size) > 100
        assert json.loads((tmp_path / "look.json").read_text()) == json.loads(json.dumps(found.numbers))
    assert found.numbers["picture"] == {"width": 150, "height": 80}
    assert found.shown.panels
    assert found.shown.title


@pytest.mark.parametrize("kind", ["backbone", "classifier", "segmenter"])
@pytest.mark.parametrize("what", ["attention", "spectrum", "pca", "views"])
def test_perception_models_are_looked_into_too(draw: Draw, kind: str, what: Any) -> None:
    point = {"point": (0.5, 0.5)} if what == "attention" else {}
    found = look([(kind, perception(kind))], draw(150, 100), what, **point)  # type: ignore[arg-type]
    if what == "attention":
        assert len(found.numbers["interactions"]) == 4
        assert [row["view"] for row in found.numbers["self_attention"]] == ["branch 1", "branch 2"]
        box = {"classifier": [25.0, 0.0, 125.0, 100.0]}.get(kind)
        if box is not None:  # the middle square is what it sees
            assert found.numbers["interactions"][0]["box"] == box
    else:
        assert len(found.shown.panels) == (3 if what == "spectrum" else 2)


def test_several_models_stand_side_by_side(build: Build, draw: Draw) -> None:
    models = [("one", build(PIIP)), ("other", build(UHD_V2))]
    image = draw(64, 64)
    found = look(models, image, "spectrum")
    curve = found.shown.panels[0]
    assert isinstance(curve, Curve)
    assert {label.split(":")[0] for label in curve.lines} == {"one", "other"}
    assert {one["model"] for one in look(models, image, "pca").numbers["maps"]} == {"one", "other"}


def test_an_answer_is_looked_at_token_by_token(build: Build, draw: Draw, tmp_path: Path) -> None:
    found = look([("one", build(PIIP))], draw(90, 60), "attention", question="What?", max_new_tokens=3)
    found.write(tmp_path / "look.png")
    numbers = found.numbers
    assert len(numbers["heat"]["tokens"]) == len(numbers["where"]["tokens"])
    heat = torch.tensor(numbers["heat"]["answer"])
    layout = build(PIIP).layout(draw(90, 60))
    assert tuple(heat.shape) == layout.views[-1].grid


def test_windows_of_queries_and_of_encoders_are_told(build: Build, draw: Draw, tmp_path: Path) -> None:
    found = look([("uhd", build(UHD_V2))], draw(120, 60), "windows")
    found.write(tmp_path / "look.png")
    first = found.numbers["windows"][0]
    assert first["windows"] == [2, 2]
    assert [level["level"] for level in first["levels"]] == [0, 1, 2]
    assert [level["cells"] for level in first["levels"]][1:] == [
        (2 * first["levels"][i]["cells"][0], 2 * first["levels"][i]["cells"][1]) for i in (0, 1)
    ]


def test_at_most_so_many_panels_are_drawn_the_first_and_the_last_among_them() -> None:
    panels = [Curve(title=str(i), axes=("x", "y")) for i in range(30)]
    kept = chosen(panels)
    assert len(kept) == MOST_PANELS
    assert (kept[0].title, kept[-1].title) == ("0", "29")
    assert chosen(panels[:3]) == panels[:3]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--what", "attention"], "give --point X,Y or --question TEXT"),
        (["--what", "attention", "--point", "0.5,0.5", "--question", "What?"], "--point X,Y or --question"),
        (["--what", "attention", "--point", "1.5,0.5"], "fractions of the picture's sides"),
        (["--what", "attention", "--point", "here"], "--point is X,Y"),
        (["--what", "attention", "--question", " "], "the question is empty"),
        (["--what", "activation"], "give --token WORD"),
        (["--what", "views", "--token", "a"], "--token says nothing about views"),
        (["--what", "pca", "--layer", "1"], "--layer says nothing about pca"),
        (["--what", "views", "--model", "a", "--model", "b"], "views is of one model, got 2"),
        (["--what", "everything"], "'everything' is not one of"),
        (["--what", "views", "--region", "0.1,0.2"], "--region is LEFT,TOP,RIGHT,BOTTOM"),
        (["--what", "views", "--out", "look.txt"], "use a name that ends in"),
        (["--what", "views", "--out", "PICTURE"], "is one of the pictures, and would be written over"),
        (["--what", "views", "--out", "LABELS"], "would be written over"),
        (["--what", "pca", "--heads", "mean"], "--heads chooses among those of an answer"),
        (["--what", "attention", "--point", "0,0", "--heads", "mean"], "--heads chooses among those"),
        (
            ["--what", "attention", "--question", "What?", "--head", "1", "--heads", "mean"],
            "leave it out, or --head",
        ),
        ([], "missing option '--what'"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    picture = tmp_path / "one.png"
    Image.new("RGB", (60, 40)).save(picture)
    labels = tmp_path / "labels.json"
    labels.write_text('{"precious": true}')
    before = {path: path.read_bytes() for path in (picture, labels)}
    places = {"PICTURE": str(picture), "LABELS": str(labels.with_suffix(".png"))}
    assert cli.main(["look", str(picture), *(places.get(word, word) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before


def test_what_a_model_does_not_have_is_refused(build: Build, draw: Draw) -> None:
    one = [("one", build(PIIP))]
    for what, options, complaint in (
        ("windows", {}, "one has no windows"),
        ("attention", {"point": (0.5, 0.5), "head": 9}, "head 9 of 4"),
        ("activation", {"token": "Total", "question": "total?"}, "the question has no 'Total'"),
    ):
        with pytest.raises(ValueError, match=complaint):
            look(one, draw(60, 40), what, **options)  # type: ignore[arg-type]
    other = [("other", perception("classifier"))]
    for options, complaint in (
        ({"what": "activation", "token": "a"}, "other has no visual tokens"),
        ({"what": "attention", "question": "What?"}, "other answers no questions"),
        ({"what": "views", "region": (0, 0, 9, 9)}, "a region is looked at closely by assistants"),
        ({"what": "attention", "point": (0.01, 0.5)}, "no view of other shows the point"),
    ):
        with pytest.raises(ValueError, match=complaint):
            look(other, draw(90, 40), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no encoders of pictures to look into: it is a Linear"):
        look([("layer", torch.nn.Linear(1, 1))], draw(60, 40), "pca")
