"""What a data source yields: an image and a conversation about it.

A source is anything with a length and an index; nothing else is asked of it (`Source`). The same index gives
the same sample for the life of a source, so that a run can resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stepwell.language.messages import Message

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Sample", "Source"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An image (or the path of one; None for text alone) and messages about it, user and assistant by turns.

    With an image, a user's content is a string, and the first begins with `<image>`. Without one, only text
    in parts may spell `<image>`.
    """

    image: Image | Path | None
    messages: tuple[Message, ...]


class Source(Protocol):
    """Where samples come from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Raises IndexError past the end, and stepwell.ImageError or OSError for an image that cannot be
        read.
        """
        ...
