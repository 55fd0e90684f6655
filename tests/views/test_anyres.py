"""AnyRes: targets, tiles and cells against transformers' own functions, hand-worked cases and Pillow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import unpad_image

from stepwell.models.anyres import LLAVA_GRIDS, AnyResConfig
from stepwell.views.anyres import (
    AnyResGeometry,
    best_target,
    fitted_size,
    limited_cells,
    tile_grids,
    unpadded_cells,
)
from stepwell.views.preprocess import to_tensor

SIDE = st.integers(1, 3000)
SIZE = st.tuples(SIDE, SIDE)
GRIDS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8)
SIZES = [(50, 40), (40, 50), (300, 40), (40, 300), (1, 1), (1, 500), (500, 1), (64, 64)]  # (height, width)


def geometry(**changes: Any) -> AnyResGeometry:
    settings: dict[str, Any] = {"encoder": "vit_nano", "size": 64} | changes
    return AnyResConfig(**settings).geometry()


def image(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size[1], size[0]))


@given(SIZE, GRIDS)
@example((337, 336), [(2, 1), (1, 2), (2, 2), (1, 3), (3, 1)])
def test_the_best_target_is_transformers(size: tuple[int, int], grids: list[tuple[int, int]]) -> None:
    targets = [(rows * 336, cols * 336) for rows, cols in grids]
    assert best_target(size, targets) == select_best_resolution(size, targets)


@given(SIZE, st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_an_image_is_fitted_to_its_target_as_transformers_fits_it(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    target = (grid[0] * 336, grid[1] * 336)
    theirs = get_patch_output_size(np.empty((3, *size), dtype=np.bool_), target, ChannelDimension.FIRST)
    assert fitted_size(size, target) == theirs


@given(SIZE, st.tuples(st.integers(1, 144), st.integers(1, 144)))
@example((55, 176), (48, 48))  # where a product of floats lies under a whole number
@example((1, 500), (4, 12))  # nothing is left
def test_cells_without_padding_are_transformers(size: tuple[int, int], cells: tuple[int, int]) -> None:
    kept = unpadded_cells(size, cells)
    theirs = unpad_image(torch.empty(1, *cells), size)
    assert kept == tuple(theirs.shape[1:])


@given(SIZE, st.tuples(st.integers(1, 144), st.integers(1, 144)))
@example((55, 176), (48, 48))
def test_cells_rounded_as_llava_rounds_them(size: tuple[int, int], cells: tuple[int, int]) -> None:
    """Its floats, written out: the scale first, then a product that is cut off."""
    (height, width), (rows, cols) = size, cells
    if width / height > cols / rows:
        margin = (rows - int(height * (cols / width))) // 2
        expected = (rows - 2 * margin, cols)
    else:
        margin = (cols - int(width * (rows / height))) // 2
        expected = (rows, cols - 2 * margin)
    assert unpadded_cells(size, cells, "float") == expected


def test_the_two_roundings_differ() -> None:
    assert unpadded_cells((55, 176), (48, 48)) == (16, 48)
    assert unpadded_cells((55, 176), (48, 48), "float") == (14, 48)


@pytest.mark.parametrize(
    ("cells", "most", "expected"),
    [
        ((48, 48), 4 * 576, (48, 48)),
        ((53, 53), 4 * 576, (48, 48)),  # 1.104 times as long as it may be
        ((52, 52), 4 * 576, (52, 52)),  # 1.083 times
        ((144, 24), 576, (58, 9)),
        ((1, 2000), 100, (1, 447)),
    ],
)
def test_more_cells_than_may_be_are_brought_down_in_their_aspect(cells, most, expected) -> None:
    assert limited_cells(cells, most) == expected


def test_a_range_of_grids_is_all_of_them_columns_first() -> None:
    assert tile_grids("(1x1),...,(2x3)") == ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2))
    assert len(tile_grids(" (1x1), ... ,(6x6) ")) == 36
    assert geometry(grids="(1x2),...,(1x2)").grids == ((2, 1),)


@pytest.mark.parametrize(
    "text", ["", "(1x1)", "(1x1),(6x6)", "(2x2),...,(1x1)", "(0x1),...,(2x2)", "1x1,...,2x2"]
)
def test_other_texts_are_no_range(text) -> None:
    with pytest.raises(ValueError, match=r"range of grids|no grid"):
        tile_grids(text)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_a_layout_counts_what_is_left_of_the_tiles_and_of_the_overview(size, merge) -> None:
    made = geometry(merge=merge)
    layout = made.layout(size)
    plan, (rows, cols) = made.plan(size), layout.tiles
    assert plan is not None
    assert plan.grid == (rows, cols) in LLAVA_GRIDS
    assert layout.inputs == ((64, 64),) * (rows * cols + 1)
    assert [view.name for view in layout.views[-2:]] == [f"tile {rows}.{cols}", "overview"]
    assert layout.views[-1].box == (0, 0, size[1], size[0])
    expected = 16 * (rows * cols + 1)
    if merge == "spatial_unpad":
        kept = unpad_image(torch.empty(1, 4 * rows, 4 * cols), size)[0]
        expected = 16 + kept.shape[0] * (kept.shape[1] + 1)
    assert layout.num_visual == expected


def test_without_grids_there_is_the_overview_alone() -> None:
    for merge, count in (("flat", 16), ("spatial_unpad", 17)):
        layout = geometry(merge=merge, grids=()).layout((50, 40))
        assert (len(layout.views), layout.tiles, layout.num_visual) == (1, (0, 0), count)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_the_image_in_the_middle_of_black_and_the_overview_is_all_of_it(size) -> None:
    made, shown = geometry(), image(size)
    layout = made.layout(size)
    plan, (rows, cols) = made.plan(size), layout.tiles
    assert plan is not None
    *tiles, overview = made.inputs(shown, layout)
    assert torch.equal(overview, to_tensor(shown.resize((64, 64)), (64, 64), made.mean, made.std))
    whole = torch.stack(tiles).unflatten(0, (rows, cols)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    height, width = plan.content
    top, left = (whole.shape[1] - height) // 2, (whole.shape[2] - width) // 2
    expected = to_tensor(Image.new("RGB", (cols * 64, rows * 64)), plan.target, made.mean, made.std)
    content = to_tensor(shown.resize((width, height)), plan.content, made.mean, made.std)
    expected[:, top : top + height, left : left + width] = content
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("size", SIZES)
def test_the_box_of_a_tile_is_where_its_pixels_are_in_the_source(size) -> None:
    """Boxes go through the resize and the padding back to the source, by hand."""
    made = geometry()
    plan, layout = made.plan(size), made.layout(size)
    assert plan is not None
    (rows, cols), (height, width) = layout.tiles, plan.content
    for number, view in enumerate(layout.views[:-1]):
        row, col = divmod(number, cols)
        left, top, right, bottom = view.box
        corner = plan.corner
        assert left * width / size[1] + corner[1] == pytest.approx(col * 64)
        assert right * width / size[1] + corner[1] == pytest.approx(col * 64 + 64)
        assert top * height / size[0] + corner[0] == pytest.approx(row * 64)
        assert bottom * height / size[0] + corner[0] == pytest.approx(row * 64 + 64)
    assert rows * cols == number + 1


@pytest.mark.parametrize(("framing", "box"), [("pad", (-20, 0, 60, 80)), ("crop", (0, 20, 40, 60))])
def test_the_overview_may_be_padded_or_cut(framing, box) -> None:
    made = geometry(framing=framing)
    assert made.layout((80, 40)).views[-1].box == box
    *_, overview = made.inputs(image((80, 40)), made.layout((80, 40)))
    *_, squeezed = geometry().inputs(image((80, 40)), geometry().layout((80, 40)))
    assert not torch.equal(overview, squeezed)


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one pixel each way, got 0x5"):
        geometry().layout((0, 5))


def test_of_equally_good_grids_the_first_is_taken() -> None:
    assert geometry().layout((64, 64)).tiles == (2, 1)
    turned = replace(geometry(), grids=tuple((cols, rows) for rows, cols in LLAVA_GRIDS))
    assert turned.layout((64, 64)).tiles == (1, 2)
