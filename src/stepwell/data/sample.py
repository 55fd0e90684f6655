"""What a data source yields, and what becomes of a sample that cannot be used.

A source is anything with a length, an index and a name for each place (`Source`); nothing else is asked of
it. The same index gives the same sample for the life of a source, so that a run can resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from stepwell.folders import one_line
from stepwell.language.characters import well_formed
from stepwell.language.messages import Message
from stepwell.structures import Size

if TYPE_CHECKING:
    from stepwell.images.open import ImageSource

__all__ = ["FAULT", "BadSample", "Prepare", "Sample", "Source", "read"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Images, or where they are, and messages about them: user and assistant by turns, behind at most one
    system message.

    With images, a user's content is a string, with `<image>` where each stands. Without, it is text in parts,
    and `<image>` in it is text like any other.
    """

    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()
    regions: tuple[Any, ...] = ()  # of each image what is looked at closely, in fractions, or None
    resize: Callable[[Size], Size] | None = None  # the size an image is brought to before it is looked at

    @property
    def image(self) -> ImageSource | None:
        """The one image, None where there is none. Raises ValueError for several."""
        if len(self.images) > 1:
            raise ValueError(f"a sample of {len(self.images)} images has no one image; read its images")
        return self.images[0] if self.images else None


class Source(Protocol):
    """Where samples come from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Raises whatever it likes for a sample that cannot be had, best an error of one line."""
        ...

    def where(self, index: int) -> str:
        """The file and the entry that a sample comes from, for people to find it."""
        ...


class BadSample(NamedTuple):
    """A sample that cannot be used."""

    source: int  # the number of its source, among those of a run
    place: int  # its index there; FAULT for what a source says is wrong with its file
    where: str
    reason: str  # one line


FAULT = -1

Prepare = Callable[[Any], Any]
"""A sample -> what a batch is made of: images decoded, text rendered. Raises for one that cannot be used."""


def read(sources: list[Source], number: int, index: int, prepare: Prepare) -> Any:
    """The sample at an index of source `number`, prepared, or a BadSample: the one place where samples are
    read, decoded and rendered, so that whatever is wrong with one is caught here.
    """
    source = sources[number]
    try:
        return prepare(source[index])
    except Exception as error:  # decoders, tokenizers and the sources of others raise whatever they like
        return BadSample(number, index, well_formed(source.where(index)), well_formed(one_line(error)))
