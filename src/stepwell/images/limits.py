"""How large an image may be and how long it may take, and the error of one that cannot or may not be read."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from stepwell.structures import Size

__all__ = ["DEFAULT_LIMITS", "NO_LIMITS", "TILED_LIMITS", "ImageError", "ImageLimits"]


class ImageError(ValueError):
    """An image that cannot or may not be read. One line, which never repeats what was in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What is taken of files, bytes and data: URLs, which strangers may have made.

    The defaults keep opening within 1 GiB of memory; loosened, a pixel takes 8 to 28 bytes, beside the file.
    `math.inf` sets no limit. WEBP, AVIF and HEIC are decoded in one call, which no limit of time can end. PIL
    images, arrays and tensors are in memory already, and are held to none.
    """

    max_bytes: float = 32_000_000  # of the file
    max_pixels: float = 36_000_000
    max_side: float = 16_384  # pixels
    max_aspect: float = 200.0  # long side over short side
    max_seconds: float = 5.0  # of processor time; 36 million pixels take one or two

    def __post_init__(self) -> None:
        sizes = (self.max_bytes, self.max_pixels, self.max_side, self.max_aspect)
        if not (all(limit >= 1 for limit in sizes) and self.max_seconds > 0):
            raise ValueError(f"image limits must be at least 1, and the seconds above 0, got {self}")

    def check_size(self, size: Size) -> None:
        """(H, W) of an image before it is decoded. Raises ImageError."""
        height, width = size
        if min(size) < 1:
            raise ImageError(f"an image needs at least one pixel each way, got {width} x {height}")
        needed = {
            "max_pixels": height * width,
            "max_side": max(size),
            "max_aspect": -(-max(size) // min(size)),
        }
        needed = {name: value for name, value in needed.items() if value > getattr(self, name)}
        if needed:
            raise self.refusal(f"an image of {width} x {height} pixels is too large", **needed)

    def refusal(self, reason: str, **needed: float) -> ImageError:
        """reason: what is refused. needed: limits, by name, that would let it through or are worth a try."""
        limits = ", ".join(f"{name}={value}" for name, value in needed.items())
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in needed.items())
        return ImageError(
            f"{reason}; limits=ImageLimits({limits}) allows more, and so does {options} on the command line, "
            "or image_limits in a recipe"
        )


DEFAULT_LIMITS = ImageLimits()
TILED_LIMITS = ImageLimits(max_bytes=500_000_000, max_pixels=150_000_000, max_side=65_535, max_seconds=60.0)
"""Of pictures that are predicted in tiles: opening one keeps within 2 GiB."""
NO_LIMITS = ImageLimits(max_bytes=inf, max_pixels=inf, max_side=inf, max_aspect=inf, max_seconds=inf)
