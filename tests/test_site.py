"""The documentation site: every page is reached, links lead somewhere, the API is whole, and it builds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import stepwell
from stepwell.models.register import MODELS
from stepwell.models.systems import SYSTEMS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def load_site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("documentation_site", DOCS / "site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = load_site()


def repository(folder: Path, **pages: str) -> Path:
    """With these pages in docs/, and a program and a card elsewhere."""
    for name, text in pages.items():
        path = folder / "docs" / f"{name.replace('__', '/')}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "src").mkdir()
    (folder / "src/one.py").write_text("x = [0](1)\n")
    (folder / "src/card.md").write_text("[home](../docs/index.md#here) [program](one.py)")
    return folder


def test_the_navigation_reaches_every_page() -> None:
    site.check_navigation()


def test_a_page_that_the_navigation_does_not_reach_is_named(tmp_path: Path) -> None:
    repository(tmp_path, index="# A", decisions__one="# B")
    nav = '[project]\nnav = [{ "A" = "index.md" }, { "More" = ["decisions/one.md"] }]\n'
    (tmp_path / "zensical.toml").write_text(nav)
    site.check_navigation(tmp_path)
    (tmp_path / "docs/lost.md").write_text("# C")
    with pytest.raises(ValueError, match=r"docs/lost\.md"):
        site.check_navigation(tmp_path)
    (tmp_path / "docs/lost.md").unlink()
    (tmp_path / "docs/decisions/one.md").unlink()
    with pytest.raises(ValueError, match=r"docs/decisions/one\.md"):
        site.check_navigation(tmp_path)


def test_files_outside_docs_become_pages_and_links_follow(tmp_path: Path) -> None:
    text = "[card](../../src/card.md) [out](https://a.b/c.md) [below](#here)"
    root = repository(tmp_path / "root", index="[b](decisions/b.md#x) [p](../src/one.py)", decisions__b=text)
    (root / "docs/site.py").write_text("")
    (root / "docs/picture.png").write_bytes(b"\x89")
    pages = tmp_path / "pages"
    (pages / "old").mkdir(parents=True)
    site.stage(root, pages)
    assert {path.relative_to(pages).as_posix() for path in pages.rglob("*") if path.is_file()} == {
        *("index.md", "decisions/b.md", "picture.png", "files/src/card.md", "files/src/one.py.md"),
    }
    assert (pages / "index.md").read_text() == "[b](decisions/b.md#x) [p](files/src/one.py.md)"
    assert (pages / "decisions/b.md").read_text() == text.replace("../../src", "../files/src")
    assert (pages / "files/src/card.md").read_text() == "[home](../../index.md#here) [program](one.py.md)"
    assert (pages / "files/src/one.py.md").read_text() == "# src/one.py\n\n````python\nx = [0](1)\n````\n"


def test_what_looks_like_a_link_in_code_is_none(tmp_path: Path) -> None:
    text = "```python\nf[0](one.md)\n```\n"
    root = repository(tmp_path / "root", index=text)
    site.stage(root, tmp_path / "pages")
    assert (tmp_path / "pages/index.md").read_text() == text


@pytest.mark.parametrize("target", ["nowhere.md", "../src", "../src/two.py#x"])
def test_a_link_that_leads_to_no_file_is_named(target: str, tmp_path: Path) -> None:
    root = repository(tmp_path / "root", index=f"[a]({target})")
    with pytest.raises(ValueError, match=re.escape(target.partition("#")[0])):
        site.stage(root, tmp_path / "pages")


def test_the_api_tells_every_public_name_once() -> None:
    told = re.findall(r"^::: stepwell\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(told) == sorted(stepwell.__all__)


def test_the_page_of_a_models_folder_tells_every_kind_and_key() -> None:
    text = (DOCS / "model_folder.md").read_text()
    own = {"transformers_version", "architectures"}
    for kind, model in MODELS.items():
        saved = model.config_class().to_diff_dict().keys() - own
        assert {name for name in (kind, *saved) if f"`{name}`" not in text} == set()
    assert {kind for kind in SYSTEMS if f"`{kind}`" not in text} == set()


def test_decisions_are_numbered_and_listed() -> None:
    pages = sorted((DOCS / "decisions").glob("[0-9]*.md"))
    text = (DOCS / "decisions/index.md").read_text()
    for number, page in enumerate(pages, start=1):
        title = page.read_text().partition("\n")[0].removeprefix("# ")
        assert title.startswith(f"{number}. ")
        assert f"| {number} | [{title.partition('. ')[2]}]({page.name}) |" in text
        for head in ("Situation", "Decision", "What follows", "What would change our mind"):
            assert f"**{head}.**" in page.read_text(), page


@pytest.mark.slow
def test_the_site_builds_without_a_warning() -> None:
    pytest.importorskip("zensical")
    site.stage()
    build = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    page = (ROOT / "site/api.html").read_text()
    assert "A model, ready to use" in page  # the docstring of load
