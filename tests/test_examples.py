"""Each example is short, runs as its first lines say, and prints what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RECEIPT = str(EXAMPLES / "receipt.jpg")


def run(name: str, *arguments: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_under_sixty_lines_and_listed(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()


def test_the_demo_prints_every_answer_beside_the_truth_and_draws_the_views(tmp_path: Path) -> None:
    out = run("demo.py", folder=tmp_path)
    assert out.count("(printed: ") == 6
    assert (tmp_path / "views.png").stat().st_size > 10_000


def test_ask_and_pipeline_print_the_same_answer(tmp_path: Path) -> None:
    """Two ways to one model: ours, and transformers' own pipeline."""
    question = "How much is the total?"
    ours = run("ask.py", RECEIPT, question, folder=tmp_path).strip()
    assert ours
    assert run("pipeline.py", RECEIPT, question, folder=tmp_path).strip() == ours


def test_features_prints_views_maps_and_tokens(tmp_path: Path) -> None:
    kinds = {line.split()[0] for line in run("features.py", RECEIPT, folder=tmp_path).splitlines()}
    assert kinds == {"view", "map", "visual"}
