"""PUBLISHED: all published configurations by name; a paper is a file beside this one and a line here."""

from __future__ import annotations

from typing import Any

from stepwell.models.published.inf import INF
from stepwell.models.published.llava import LLAVA
from stepwell.models.published.llava_hr import LLAVA_HR
from stepwell.models.published.piip import PIIP
from stepwell.models.published.published import LLAMA3_8B, VICUNA_7B, VICUNA_13B, Published
from stepwell.models.published.uhd import UHD

__all__ = ["LANGUAGE_MODELS", "PUBLISHED", "find_published"]

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": VICUNA_7B,
    "lmsys/vicuna-13b-v1.5": VICUNA_13B,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA3_8B,
}
"""Names on the hub from which the published assistants start -> their configurations, of transformers."""

PUBLISHED: dict[str, Published] = {
    published.name: published
    for published in [
        *INF,
        *LLAVA,
        *LLAVA_HR,
        *PIIP,
        *UHD,
    ]
}


def find_published(name: str) -> Published | None:
    """By our name, by the released one (`repository`, `repository:file`), or by the last part of that."""
    sought = name.removesuffix(".pth").casefold()
    for published in PUBLISHED.values():
        last_part = (published.file or published.repository or "").rpartition("/")[2]
        names = [published.name, published.released or "", last_part]
        if sought and sought in [name.removesuffix(".pth").casefold() for name in names]:
            return published
    return None
