"""Each example is short, runs as its first lines say, and prints what it promises."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RECEIPT = str(EXAMPLES / "receipt.jpg")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """An example run as a program, with these arguments and in an empty folder; what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_under_sixty_lines_and_listed(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()


def test_the_demo_prints_every_answer_beside_the_truth_and_draws_the_views(
    run: Callable[..., str], tmp_path: Path
) -> None:
    out = run("demo.py")
    assert out.count("(printed: ") == 4
    assert (tmp_path / "views.png").stat().st_size > 10_000


def test_ask_and_pipeline_print_the_same_answer(run: Callable[..., str]) -> None:
    """Two ways to one model: ours, and transformers' own pipeline."""
    question = "How much is the total?"
    ours = run("ask.py", RECEIPT, question).strip()
    assert ours
    assert run("pipeline.py", RECEIPT, question).strip() == ours


def test_features_prints_views_maps_and_tokens(run: Callable[..., str]) -> None:
    kinds = {line.split()[0] for line in run("features.py", RECEIPT).splitlines()}
    assert kinds == {"view", "map", "visual"}
