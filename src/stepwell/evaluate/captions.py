"""Captions: CIDEr (arXiv 1411.5726), by pycocoevalcap, whose tokenizer is a program in Java."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

__all__ = ["check_cider", "cider"]


def check_cider() -> None:
    """Raises ImportError, one line, where pycocoevalcap or Java is missing."""
    try:
        import pycocoevalcap.cider.cider  # noqa: F401
    except ImportError:
        raise ImportError("CIDEr needs pycocoevalcap: pip install 'stepwell[eval]'") from None
    if shutil.which("java") is None:
        raise ImportError("CIDEr needs Java, in which pycocoevalcap's tokenizer is written; install a JRE")


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The CIDEr of every prediction, 0 to 10; words count by how rare they are among all the references."""
    check_cider()
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenize = PTBTokenizer().tokenize
    right = tokenize({i: [_caption(text) for text in texts] for i, texts in enumerate(references)})
    said = tokenize({i: [_caption(text)] for i, text in enumerate(predictions)})
    _, scores = Cider().compute_score(right, said)
    return [float(score) for score in scores]


def _caption(text: str) -> dict[str, str]:
    """One line: the tokenizer takes a caption a line, and leaves out what is empty."""
    return {"caption": " ".join(text.split()) or "."}
