"""A report and the picture of a sweep, of answers made up here."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from stepwell import __version__
from stepwell.evaluate.answers import Answer
from stepwell.evaluate.curve import draw_sweep
from stepwell.evaluate.report import build_report, report_as_json, report_as_table, versions_here
from stepwell.evaluate.rows import BadRow, Row
from stepwell.evaluate.scoring import RESAMPLES
from stepwell.evaluate.sweep import Point, sweep_as_table
from stepwell.evaluate.sweep import _as_json as point_as_json

ABOUT = {"model": {"name": "m", "commit": None}, "data": "d", "batch_size": 2, "settings": {}}


def answered(entry, image, kind, right, said, *, tokens=4, seconds=1.0):
    row = Row(
        entry=entry,
        where="",
        images=(Path(image),),
        names=(image,),
        question="?",
        answers=(right,),
        type=kind,
    )
    answer = Answer(
        entry=entry,
        question_id=None,
        image=[image],
        question="?",
        answers=[right],
        prediction=said,
        seconds=seconds,
        visual_tokens=[tokens],
        image_sizes=[(1, 2)],
        regions=[None],
    )
    return row, answer


def report(*rows, metric="exact", official=False, bad=()):
    return build_report(metric, rows, list(bad), official=official, about=ABOUT)


def test_types_are_resampled_by_their_own_images():
    rows = [
        answered(i, image, kind, "x", said)
        for i, (image, kind, said) in enumerate(
            [("a", "p", "x"), ("b", "p", "y"), ("c", "q", "x"), ("c", "q", "y"), ("c", "q", "x")]
        )
    ]
    types = report(*rows).types
    assert {kind: (s.images, s.interval is None) for kind, s in types.items()} == {
        "p": (2, False),
        "q": (1, True),
    }


def test_the_official_score_is_asked_of_all_questions():
    rows = [answered(0, "a", "", "Blue", "Blue")]
    assert [report(*rows, official=way).scores.score for way in (False, True)] == [1, 0]


def test_means_and_medians_are_both_told():
    rows = [
        answered(i, name, "", "x", "x", tokens=tokens, seconds=seconds)
        for i, (name, tokens, seconds) in enumerate([("a", 1, 1.0), ("b", 2, 2.0), ("c", 9, 6.0)])
    ]
    made = report(*rows)
    assert (made.visual_tokens, made.seconds) == ((4, 2), (3, 2))
    assert json.loads(report_as_json(made))["all"]["questions"] == 3
    assert f"{RESAMPLES} resamples of the 3 images" in report_as_table(made)
    assert "mean 4.0, median 2; seconds a question: mean 3.00, median 2.00" in report_as_table(made)


def test_a_table_has_a_column_for_every_measure():
    rows = [
        answered(i, f"{i}.png", "", right, said)
        for i, (right, said) in enumerate([("yes", "yes"), ("no", "yes"), ("no", "no"), ("no", "no")])
    ]
    heads, _, every, *_ = report_as_table(report(*rows, metric="pope")).splitlines()
    assert heads.split()[4:] == [
        *("f1", "95", "%", "interval"),
        "accuracy",
        "precision",
        "recall",
        "yes_ratio",
    ]
    assert every.split()[-4:] == ["0.7500", "0.5000", "1.0000", "0.5000"]
    assert every.split()[2] == "0.6667"


@pytest.fixture
def points():
    """Three sizes; nothing was answered at the second."""
    rows = [answered(i, f"{i}.png", "", "x", said, tokens=i * i) for i, said in enumerate("xxyxxyxy")]
    bad = [BadRow(9, "line 10", "it has no image")]
    reports = [report(*rows[:4], bad=bad), report(bad=bad), report(*rows)]
    return [
        Point(
            size=size,
            sizes=[size],
            report=made,
            paper_gflops=None if made.scores is None else size / 10,
            true_gflops=None if made.scores is None else size / 4,
        )
        for size, made in zip((64, 96, 128), reports, strict=True)
    ]


def test_a_sweep_is_drawn_against_size_and_cost_with_its_intervals(points, tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *x, **y: drawn.append(self) or save(self, *x, **y))
    draw_sweep(tmp_path / "sweep.png", points, name="exact")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]
    scores = [point.report.scores for point in points if point.report.scores]
    for axes, places in zip(drawn[0].axes, ([64, 128], [16, 32]), strict=True):
        (bars,) = axes.containers
        line, _, (ends,) = bars
        assert line.get_xdata().tolist() == places
        assert line.get_ydata().tolist() == [each.score for each in scores]
        for segment, each in zip(ends.get_segments(), scores, strict=True):
            assert segment[:, 1].tolist() == pytest.approx(list(each.interval))


@pytest.mark.parametrize("side", [0, 1])
def test_a_sweep_is_drawn_where_rounding_puts_a_score_beside_its_interval(points, tmp_path, side):
    scores = points[0].report.scores
    ends = (scores.score * (1 + 1e-12), 1.0) if side == 0 else (0.0, scores.score * (1 - 1e-12))
    beside = replace(points[0].report, scores=replace(scores, interval=ends))
    draw_sweep(tmp_path / "sweep.png", [replace(points[0], report=beside)], name="exact")
    assert (tmp_path / "sweep.png").stat().st_size


def test_a_picture_that_cannot_be_saved_leaves_nothing(points, tmp_path, monkeypatch):
    def half(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        draw_sweep(tmp_path / "sweep.png", points, name="exact")
    assert not list(tmp_path.iterdir())


def test_a_sweep_tells_bad_rows_and_the_mean_of_visual_tokens(points):
    told = [point_as_json(point) for point in points]
    assert [entry["bad_rows"] for entry in told] == [1, 1, 0]
    assert told[0]["measures"] == asdict(points[0].report.scores)["measures"]
    lines = [line.split() for line in sweep_as_table(points).splitlines()[2:]]
    assert [line[-4:] for line in lines] == [
        ["3.5", "1.00", "6.40", "16.00"],
        ["-", "-", "-", "-"],
        ["17.5", "1.00", "12.80", "32.00"],
    ]


def test_versions_are_told_where_the_source_runs_without_being_installed(monkeypatch):
    def installed(name):
        if name == "stepwell":
            raise PackageNotFoundError(name)
        return distribution(name).version

    monkeypatch.setattr("stepwell.evaluate.report.version", installed)
    told = versions_here()
    assert told["stepwell"] == __version__
    assert told["torch"] == distribution("torch").version
