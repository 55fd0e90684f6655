"""Text as a tokenizer can take it.

A lone surrogate is no character: Python stands one for a byte that it could not decode (a question out of a
Latin-1 terminal), and JSON can spell one out.
"""

from __future__ import annotations

import re

__all__ = ["well_formed"]


def well_formed(text: str) -> str:
    """Undecoded bytes are read as UTF-8, and what is none, or half a character, becomes U+FFFD."""
    decoded = re.sub("[\udc80-\udcff]+", lambda found: _from_utf8(found[0]), text)
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", decoded)


def _from_utf8(undecoded: str) -> str:
    return undecoded.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
