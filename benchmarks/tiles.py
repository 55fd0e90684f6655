"""Pictures far larger than a model's view: tiles a second, and the memory of the largest.

The detector is the shipped one, on boards laid side by side, so that there is much to find at the seams;
those with masks and with maps are the pyramids of own_images with random weights: they cost as much, and find
nothing. Other: the same tiles, as so many pictures of their size, by the same `predict`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from measure import Row, compare, peak_gib
from PIL import Image

import stepwell
from stepwell.folders import SHIPPED_DETECTOR
from stepwell.train.recipe import load_recipe
from stepwell.train.tasks import find_task

Kind = Literal["boxes", "masks", "label map"]
KINDS: tuple[Kind, ...] = ("boxes", "masks", "label map")
HERE = Path(__file__).parent
RECIPES = {"masks": "nuclei", "label map": "dubai"}
BOARD = HERE.parent / "examples" / "board_1.jpg"
ENTRY = "import sys; from stepwell.cli import run; sys.argv[0] = 'stepwell'; sys.exit(run())"
TIMED = (1664, 2048)  # (H, W) of the picture that is timed
LARGE = (9000, 12000)
LEAST, MOST_GIB = 0.9, 3.0


def rows() -> list[Row]:
    return [(f"tiles, {kind}", partial(_rate, kind)) for kind in KINDS]


def memory_rows() -> list[Row]:
    return [(f"tiles, {kind}, peak memory", partial(_memory, kind)) for kind in KINDS]


def _rate(kind: Kind) -> Iterator[str]:
    count = len(_tiles(_network(kind)))
    name = f"tiles, {kind}, {TIMED[1]}x{TIMED[0]}, {count} tiles"
    ours, other = (("tiles", "build", kind, how) for how in ("tiled", "one by one"))
    yield str(compare(name, ours, other, target=LEAST, close=None))


def build(kind: Kind, how: str) -> Callable[[], None]:
    """What a worker times."""
    network, picture = _network(kind), boards(TIMED)
    if how == "tiled":
        return lambda: network.predict(picture, tiles=stepwell.Tiles()) and None
    windows = [tile.source for tile in _tiles(network)]
    crops = [picture.crop((w.left, w.top, w.right, w.bottom)) for w in windows]
    return lambda: network.predict(crops) and None


def _tiles(network: Any) -> list[Any]:
    return stepwell.Tiles().cut(TIMED, side=network.image_processor().tile_side)


def _network(kind: Kind) -> Any:
    if kind == "boxes":
        return stepwell.load(SHIPPED_DETECTOR, device="cpu")
    recipe: Any = load_recipe(HERE / "own_images" / f"{RECIPES[kind]}.yaml", ['model.classes=["a", "b"]'])
    torch.manual_seed(0)
    task = find_task(recipe.task)
    return task.model_class(task.configuration(recipe)).eval()


def boards(size: tuple[int, int]) -> Image.Image:
    """The board again and again."""
    with Image.open(BOARD) as board:
        gray = board.convert("L")
    picture = Image.new("L", (size[1], size[0]))
    for top in range(0, size[0], gray.height):
        for left in range(0, size[1], gray.width):
            picture.paste(gray, (left, top))
    return picture


def _memory(kind: Kind) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        boards(LARGE).save(folder / "large.png")
        model = SHIPPED_DETECTOR
        if kind != "boxes":
            model = folder / "model"
            _network(kind).save_pretrained(model)
        command = ["predict", str(folder / "large.png"), "--model", str(model), "--tiles", "--device", "cpu"]
        peak = peak_gib("-c", ENTRY, *command)
    met = "met" if peak <= MOST_GIB else "missed"
    yield f"| {kind}, {LARGE[1]}x{LARGE[0]} | {peak:.2f} | {MOST_GIB:.0f}, {met} |"
