"""CIDEr is pycocoevalcap's; where that or Java is missing, one line says so."""

from __future__ import annotations

import shutil
import sys

import pytest

from stepwell.evaluate.captions import check_cider, cider


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ImportError, match=r"^CIDEr needs pycocoevalcap: pip install 'stepwell\[eval\]'$"):
        check_cider()


def test_java_is_asked_for_before_anything_is_run(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ImportError, match=r"^CIDEr needs Java"):
        check_cider()


@pytest.mark.slow
def test_captions_are_scored_one_by_one_whatever_they_hold():
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("no Java on this machine")
    references = [["a dog on the grass", "the dog is on grass"], ["a red bus"], ["two cats asleep"]]
    alike, empty, broken = cider(["A dog on the grass.", "", "two\u2028cats\nasleep"], references)
    assert alike > 3
    assert empty == 0
    assert broken == pytest.approx(
        10 * 3 / 4
    )  # of three words: their runs of 1 to 3 are right, and none of 4
    assert cider(["two cats asleep"] * 3, references)[2] == pytest.approx(broken)
