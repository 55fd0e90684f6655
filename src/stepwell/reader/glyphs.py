"""Drawing characters fast, and knowing where each of them went.

Typefaces are the DejaVu and STIX files that travel inside matplotlib's wheel, and files of a folder that a
user names. A character is rasterised once per typeface and size and then only pasted, so its edges are known
exactly: no kerning, whole pixels.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

from stepwell.folders import one_line
from stepwell.reader.page import Line

__all__ = ["FONTS", "HELD_OUT", "Face", "Glyph", "face", "typefaces"]

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
)
"""Of training."""
HELD_OUT = ("cmtt10", "DejaVuSansMono-Oblique", "STIXGeneralItalic")
"""That training never sees: those of test pages."""


class Glyph(NamedTuple):
    ink: NDArray[np.uint8]  # (h, w) coverage
    left: int  # from the pen to the ink
    top: int  # from the top of the line to the ink
    advance: int


class Face:
    """A font at one size in pixels (its em). Glyphs are cached for the life of the face."""

    def __init__(self, name: str, size: int) -> None:
        """name: of a file in matplotlib's wheel, or a file. Raises ValueError where it is no typeface."""
        self.name, self.size = name, size
        file = name if Path(name).suffix else str(_folder() / f"{name}.ttf")
        try:
            self._font = ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            raise ValueError(f"{name} is no typeface that can be read: {one_line(error)}") from None
        self._glyphs: dict[str, Glyph] = {}
        self.line_height = sum(self._font.getmetrics())

    def glyph(self, character: str) -> Glyph:
        glyph = self._glyphs.get(character)
        if glyph is None:
            mask, (left, top) = self._font.getmask2(character, mode="L")
            width, height = mask.size
            ink = np.array(mask, dtype=np.uint8).reshape(height, width)
            glyph = Glyph(ink, int(left), int(top), max(1, round(self._font.getlength(character))))
            self._glyphs[character] = glyph
        return glyph

    def width(self, text: str, spacing: int = 0) -> int:
        """Pixels from the first pen position to the last, `spacing` more after every character."""
        return sum(self.glyph(character).advance + spacing for character in text)

    def draw(self, page: NDArray[np.uint8], left: int, top: int, text: str, spacing: int = 0) -> Line | None:
        """Adds the text's ink to `page` (H, W) and returns where it stands, or None if nothing of it is
        visible.

        The box is tight around the ink. Characters that would leave the page to the right are left out.
        """
        pen, edges, drawn = left, [float(left)], []
        first, last = page.shape[0], 0
        for character in text:
            glyph = self.glyph(character)
            height, width = glyph.ink.shape
            x, y = pen + glyph.left, top + glyph.top
            if x < 0 or y < 0 or x + width > page.shape[1] or y + height > page.shape[0]:
                break
            if glyph.ink.size:
                spot = page[y : y + height, x : x + width]
                np.maximum(spot, glyph.ink, out=spot)
                if character != " ":
                    first, last = min(first, y), max(last, y + height)
            pen += glyph.advance + spacing
            edges.append(float(pen))
            drawn.append(character)
        while drawn and drawn[-1] == " ":
            drawn.pop()
            edges.pop()
        if not drawn or last <= first:
            return None
        box = (edges[0], float(first), edges[-1], float(last))
        return Line(text="".join(drawn), box=box, edges=tuple(edges))


@lru_cache(maxsize=256)
def face(name: str, size: int) -> Face:
    """The cached typeface `name`, as `Face` takes it, at `size` pixels."""
    return Face(name, size)


@lru_cache(maxsize=8)
def typefaces(folder: Path) -> tuple[str, ...]:
    """The typefaces in a folder and those below it that have all printable ASCII characters, as `face` takes
    them.

    Raises ValueError where there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf"))
    found = tuple(str(path) for path in files if _is_complete(path))
    if not found:
        raise ValueError(f"{folder} holds no typeface (.ttf, .otf) with all printable ASCII characters")
    return found


def _is_complete(path: Path) -> bool:
    from fontTools.ttLib import TTFont, TTLibError

    try:
        characters = TTFont(path, lazy=True).getBestCmap() or {}
    except (TTLibError, OSError, ValueError):
        return False
    return all(code in characters for code in range(33, 127))


@lru_cache(maxsize=1)
def _folder() -> Path:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("drawn pages use matplotlib's fonts: pip install 'stepwell[train]'") from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"
