"""LLaVA training files: a JSON list of images and conversations about them.

Format of LLaVA-1.5 (arXiv 2310.03744): `image`, a path (or none), and `conversations`, turns that are "from"
a "human" or "gpt" with a "value" each. The placeholder is moved to the front of its turn, as the official
code does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepwell.data.sample import Sample
from stepwell.language.conversation import from_llava

__all__ = ["Conversations"]


class Conversations:
    """A source of the entries of one LLaVA file.

    Images stay paths. Raises ValueError, at once, for a file that is not such a list; at an index, for turns
    that do not alternate and an `image` that is not one path; KeyError for an entry without turns.
    """

    def __init__(self, path: Path, *, images: Path | None = None) -> None:
        """images: the folder that image paths start from, by default the one of `path`."""
        entries = json.loads(path.read_text("utf-8"))
        if not isinstance(entries, list):
            raise ValueError(f"{path} must hold a JSON list of conversations, got {type(entries).__name__}")
        self.entries: list[dict[str, Any]] = entries
        self.images = path.parent if images is None else images

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        image = entry.get("image") or None
        if not isinstance(image, str | None):
            raise ValueError(f"conversation {index}: an image is one path, got {image!r}")
        try:
            messages = from_llava(entry["conversations"], has_image=image is not None)
            roles = [message["role"] for message in messages]
            if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
                raise ValueError(f"human and gpt must take turns, got {', '.join(roles) or 'none'}")
        except ValueError as error:
            raise ValueError(f"conversation {index}: {error}") from None
        return Sample(
            image=None if image is None else self.images / image,
            messages=tuple(messages),
        )
