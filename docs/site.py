"""The pages of the documentation site, from docs/, for `make docs`.

Documents link to one another and to files elsewhere in the repository, in the way that GitHub follows. On the
site such a file is a page of its own, beneath files/: Markdown as it is, program text and settings as code.
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"  # docs_dir in zensical.toml
PICTURES = {".png", ".jpg", ".svg"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json"}

LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:|#)([^)#\s]+)(?=[)#])")
FENCE = re.compile(r"^ *```")


def stage(root: Path = ROOT, pages: Path = PAGES) -> None:
    """Writes all pages anew. root: of the repository. Raises ValueError for a link that leads to no file."""
    shutil.rmtree(pages, ignore_errors=True)
    waiting = sorted(path for path in (root / "docs").rglob("*") if path.is_file() and path.suffix != ".py")
    known = set(waiting)
    while waiting:
        source = waiting.pop()
        target = pages / _place(source.relative_to(root))
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".md":
            _write_other(source, target, source.relative_to(root))
            continue
        text = source.read_text("utf-8")
        target.write_text(_relinked(text, source, root), "utf-8")
        found = {path for path in _linked(text, source) if path not in known}
        known |= found
        waiting += found


def check_navigation(root: Path = ROOT) -> None:
    """Raises ValueError for a page that the navigation in zensical.toml does not reach, or that is not there:
    a build would pass over both.
    """
    project = tomllib.loads((root / "zensical.toml").read_text("utf-8"))["project"]
    listed = list(_entries(project["nav"]))
    pages = {path.relative_to(root / "docs").as_posix() for path in (root / "docs").rglob("*.md")}
    if wrong := sorted(pages.symmetric_difference(listed)):
        raise ValueError(
            f"docs/{wrong[0]} is in docs/ or in the navigation of zensical.toml, but not in both"
        )


def _entries(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
        return
    for entry in nav.values() if isinstance(nav, dict) else nav:
        yield from _entries(entry)


def _place(path: Path) -> PurePosixPath:
    """Where a file of the repository is among the pages."""
    if path.parts[0] == "docs":
        return PurePosixPath(*path.parts[1:])
    ending = "" if path.suffix == ".md" or path.suffix in PICTURES else ".md"
    return PurePosixPath("files", *path.parts[:-1], path.name + ending)


def _write_other(source: Path, target: Path, path: Path) -> None:
    if target.suffix != ".md":
        shutil.copyfile(source, target)
        return
    text = source.read_text("utf-8").rstrip("\n")
    fence = "````"  # longer than any in the text
    block = f"{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}"
    target.write_text(f"# {path.as_posix()}\n\n{block}\n", "utf-8")


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """Lines, and whether links are links there, not code."""
    is_code = False
    for line in text.splitlines(keepends=True):
        is_fence = bool(FENCE.match(line))
        is_code ^= is_fence
        yield line, not (is_code or is_fence)


def _linked(text: str, source: Path) -> Iterator[Path]:
    """The files that a page links to. Raises ValueError for one that is not there."""
    for line, has_links in _lines(text):
        for target in LINK.findall(line) if has_links else []:
            path = Path(os.path.normpath(source.parent / target))
            if not path.is_file():
                raise ValueError(f"{source}: the link to {target} leads to no file")
            yield path


def _relinked(text: str, source: Path, root: Path) -> str:
    here = _place(source.relative_to(root)).parent

    def relink(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(source.parent / match[0])).relative_to(root)
        return PurePosixPath(os.path.relpath(_place(path), here)).as_posix()

    return "".join(LINK.sub(relink, line) if has_links else line for line, has_links in _lines(text))


if __name__ == "__main__":
    try:
        check_navigation()
        stage()
    except ValueError as error:
        raise SystemExit(str(error)) from None
