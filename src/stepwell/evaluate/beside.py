"""What a model finds, beside what is there: the images that it understands best, and worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from stepwell.data.sheet import SamplePainter, captioned, thumbnail
from stepwell.evaluate.tasks import PerceptionTask
from stepwell.images.draw import save_whole
from stepwell.images.open import open_image
from stepwell.views.panels import side_by_side, stack

__all__ = ["BEST", "WORST", "draw_best_and_worst"]

BEST = "best.png"
WORST = "worst.png"


def draw_best_and_worst(
    folder: Path, task: PerceptionTask[Any], found: Mapping[int, Any], count: int
) -> None:
    """best.png and worst.png in a folder: so many images each, their truth at the left. found: as
    `task.found` gives it, by entry of the data.
    """
    order = sorted(found, key=lambda entry: (-task.quality(entry, found[entry]), entry))
    for name, entries in ((BEST, order[:count]), (WORST, order[::-1][:count])):
        if entries:
            save_whole(_sheet(task, entries, found), folder / name)


def _sheet(task: PerceptionTask[Any], entries: Sequence[int], found: Mapping[int, Any]) -> Image.Image:
    paint = SamplePainter(task.source)
    rows = []
    for pair in [entries[i : i + 2] for i in range(0, len(entries), 2)]:
        panels = []
        for entry in pair:
            image = open_image(task.image(entry), limits=task.source.limits)
            text = f"found, {task.quality(entry, found[entry]):.2f}"
            drawn = thumbnail(task.shown(image).draw(image))
            panels += [paint(task.source[entry]).panel, captioned(drawn, text, (image.height, image.width))]
        rows.append(side_by_side(panels))
    return stack(rows)
