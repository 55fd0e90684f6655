"""Masks of objects as files hold them -> arrays, and back.

Lin et al., arXiv 1405.0312: polygons, lists of x and y by turns in pixels; or run lengths of background and
object by turns, down one column after the other, as a list or as pycocotools' compressed text.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from stepwell.ops.run_lengths import compressed, mask_runs
from stepwell.ops.sliding_windows import Window
from stepwell.structures import Box, Size

__all__ = [
    "Mask",
    "Numbers",
    "compressed_mask",
    "decode_mask",
    "encode_mask",
    "mask_area",
    "mask_box",
    "mask_spans",
]

Mask = np.ndarray[Any, np.dtype[np.bool_]]
"""(H, W), True on the object."""
Numbers = np.ndarray[Any, np.dtype[Any]]

LONGEST = 1_000_000
"""Pixels around all polygons of a mask, and from the image's corner: drawing one takes 40 bytes for each."""


def decode_mask(segmentation: Any, size: Size) -> Mask:
    """Polygons or run lengths -> (H, W), size = (H, W). A polygon covers the pixels that pycocotools says.

    Raises ValueError of one line for what is no mask of that size; ImportError where faster-coco-eval, which
    draws polygons and reads compressed run lengths, is missing.
    """
    height, width = size
    if isinstance(segmentation, Mapping):
        runs = _runs(segmentation, size)
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    drawn: Mask = _library().decode([_drawn(segmentation, size)])[..., 0] > 0
    return drawn


def encode_mask(mask: Mask) -> dict[str, Any]:
    """(H, W) -> {"size": [H, W], "counts": text}, compressed run lengths that JSON can hold."""
    height, width = mask.shape
    runs = mask_runs(mask, Window(0, 0, height, width), (height, width))
    return {"size": [height, width], "counts": compressed(runs)}


def compressed_mask(segmentation: Any, size: Size) -> dict[str, Any]:
    """Polygons or run lengths -> what `encode_mask` would give of `decode_mask`, without a pixel in between.

    Run lengths that are compressed come as they are: who gets them from a stranger looks at them first
    (`mask_box`). Raises ValueError and ImportError as `decode_mask` does.
    """
    if not isinstance(segmentation, Mapping):
        counts = _drawn(segmentation, size)["counts"]
    elif isinstance(segmentation["counts"], str | bytes):
        counts = segmentation["counts"]
    else:
        counts = compressed(_runs(segmentation, size))
    return {"size": [*size], "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def mask_spans(segmentation: Any, size: Size) -> Numbers:
    """Polygons or run lengths -> (n, 2), where runs of the object start and end, counted down one column
    after the other: the pixels of `decode_mask`, of which none is made. Raises as it does.
    """
    runs = segmentation if isinstance(segmentation, Mapping) else compressed_mask(segmentation, size)
    ends = _runs(runs, size).cumsum()
    return np.stack([ends[:-1:2], ends[1::2]], 1)


def mask_area(mask: Mapping[str, Any]) -> int:
    """Pixels of compressed run lengths. Raises ImportError where faster-coco-eval, which reads them, is
    missing.
    """
    return int(_library().area([dict(mask)])[0])


def mask_box(segmentation: Any, size: Size) -> Box:
    """The box around a mask's pixels, or around its polygons, which may reach past the image. Draws nothing:
    a cheap look at a mask of a stranger.

    Raises ValueError and ImportError as `decode_mask` does, and ValueError for run lengths without a pixel.
    """
    if not isinstance(segmentation, Mapping):
        points = np.concatenate(_polygons(segmentation))
        (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
        return left, top, right, bottom
    runs = _runs(segmentation, size)
    ends = runs.cumsum()[1::2]
    ends, starts = ends[runs[1::2] > 0] - 1, (ends - runs[1::2])[runs[1::2] > 0]
    if not len(ends):
        raise ValueError("its segmentation has no pixel")
    height = size[0]
    if (starts // height != ends // height).any():  # a run that goes on in the next column
        top, bottom = 0, height - 1
    else:
        top, bottom = (starts % height).min(), (ends % height).max()
    return float(starts[0] // height), float(top), float(ends[-1] // height + 1), float(bottom + 1)


def _drawn(polygons: Any, size: Size) -> dict[str, Any]:
    """Polygons of one object -> run lengths, whose counts are compressed to bytes."""
    points = [polygon.flatten().tolist() for polygon in _polygons(polygons)]
    library = _library()
    drawn: dict[str, Any] = library.merge(library.frPoly(points, *size))
    return drawn


def _polygons(segmentation: Any) -> list[Numbers]:
    """Each (n, 2), x and y."""
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"its segmentation is {_short(segmentation)}, neither polygons nor run lengths")
    if not isinstance(segmentation[0], list):
        raise ValueError("its segmentation is one flat list; a polygon is a list in a list, [[x, y, ...]]")
    drawable = [points for points in segmentation if not _is_a_line(points)]
    polygons = [_polygon(points) for points in drawable or segmentation]
    around = sum(np.abs(points - np.roll(points, 1, axis=0)).max(1).sum() for points in polygons)
    if around > LONGEST or max(np.abs(points).max() for points in polygons) > LONGEST:
        raise ValueError(f"its segmentation reaches over more than {LONGEST:,} pixels")
    return polygons


def _is_a_line(points: Any) -> bool:
    """Of one or two points, or none, as tracers of outlines leave them beside the polygons of an object."""
    return isinstance(points, list) and len(points) in (0, 2, 4)


def _polygon(points: Any) -> Numbers:
    numbers = _array(points)
    if numbers.dtype.kind not in "iuf" or len(numbers) < 6 or len(numbers) % 2 or not _finite(numbers):
        raise ValueError(
            f"its segmentation has the polygon {_short(points)}, not x and y of three points or more"
        )
    return numbers.reshape(-1, 2).astype(np.float64)


def _runs(segmentation: Mapping[str, Any], size: Size) -> Numbers:
    """(n,): lengths of runs, of background and object by turns, which fill the image."""
    told = segmentation.get("size")
    if told != [*size]:
        raise ValueError(f"its segmentation is of size {_short(told)}, its image {[*size]} (height, width)")
    counts = segmentation.get("counts")
    runs = _array(_decompressed(counts, size) if isinstance(counts, str | bytes) else counts)
    pixels = size[0] * size[1]
    if runs.dtype.kind not in "iu" or len(runs) == 0 or runs.min() < 0:
        raise ValueError(f"its segmentation has the counts {_short(counts)}, not lengths of runs")
    if runs.max() > pixels or runs.sum() != pixels:
        raise ValueError(f"its segmentation's counts do not add up to the {pixels} pixels of its image")
    return runs


def _decompressed(counts: str | bytes, size: Size) -> Any:
    try:
        text = counts.encode("ascii") if isinstance(counts, str) else counts
        return _library().toUncompressedRLE([{"size": [*size], "counts": text}])[0]["counts"]
    except (ValueError, RuntimeError):
        raise ValueError("its segmentation's counts are no compressed run lengths of its image") from None


def _array(values: Any) -> Numbers:
    """A flat list of numbers -> (n,); of texts where it is something else."""
    if isinstance(values, list) and set(map(type, values)) <= {int, float}:
        with suppress(OverflowError):  # whole numbers that are none of a machine's
            return np.asarray(values)
    return np.array([""])


def _finite(numbers: Numbers) -> bool:
    return bool(np.isfinite(numbers).all())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _library() -> Any:
    try:
        from faster_coco_eval import mask_api_new_cpp
    except ImportError as error:
        raise ImportError('masks need faster-coco-eval: pip install "stepwell[detect]"') from error
    return mask_api_new_cpp
