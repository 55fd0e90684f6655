"""What the documents promise exists: files linked to, commands and options shown, names imported."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import stepwell
from stepwell import cli
from stepwell.train.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", path.read_text(), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> Iterator[list[str]]:
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.partition(" #")[0])
            if words[:1] == ["stepwell"]:
                yield words[1:]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_and_options_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, *arguments in commands(path):
        assert cli.main([command, "--help"]) == 0, command
        options = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
        assert {word for word in arguments if word.startswith("--")} <= options, arguments


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_python_parses_and_uses_public_names(path: Path) -> None:
    for block in blocks(path, "python"):
        for node in ast.walk(
            ast.parse(re.sub(r"^  ", "", block, flags=re.MULTILINE) if block[0] == " " else block)
        ):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "stepwell"
            ):
                assert node.attr in stepwell.__all__


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_recipes_that_are_shown_are_recipes(path: Path, tmp_path: Path) -> None:
    for block in blocks(path, "yaml"):
        if "stages:" in block:
            (tmp_path / "shown.yaml").write_text(textwrap.dedent(block))
            load_recipe(tmp_path / "shown.yaml")


def test_the_makefile_explains_each_of_its_targets() -> None:
    text = (ROOT / "Makefile").read_text()
    (listed,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    explained = re.findall(r'@echo "make ([a-z-]+) ', text)
    assert sorted(explained) == sorted(set(listed.split()) - {"help"})
