"""Slices tile the image, views are whole cells of about one size, and pixels are Pillow's.

That sizes and grids are the official ones is held against recorded tables in tests/parity.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import ceil, prod, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from stepwell.structures import CLIP_MEAN, CLIP_STD, Size, TokenLayout
from stepwell.views.slices import SliceGeometry, long_side_size, slice_plan, total_area_size

SETTINGS: dict[str, Any] = {"side": 336, "stride": 14, "max_slices": 7}
UHD = SliceGeometry(
    name="",
    **SETTINGS,
    never_split=False,
    token_grid=(12, 12),
    organised=True,
    newline="\n",
    comma=",",
    before_overview="comma",
    long_side=None,
    mean=CLIP_MEAN,
    std=CLIP_STD,
)
TINY = replace(  # for images of few pixels; its tensors hold 8-bit values
    UHD, side=28, stride=7, max_slices=6, token_grid=(2, 2), mean=(0.0,) * 3, std=(1 / 255,) * 3
)
LENGTH = st.one_of(st.integers(1, 600), st.integers(1, 20_000))
PLANS = st.fixed_dictionaries(
    {
        "side": st.sampled_from([28, 224, 336, 384, 448]),
        "stride": st.sampled_from([14, 16]),
        "max_slices": st.integers(1, 12),
    }
)


def noise(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("size", "max_slices", "overview", "grid", "slice_size"),
    [
        ((336, 336), 7, (336, 336), (0, 0), (0, 0)),
        ((1, 1), 7, (336, 336), (0, 0), (0, 0)),  # what is small is enlarged
        ((90, 150), 7, (252, 420), (0, 0), (0, 0)),  # 260.2 x 433.3, in whole cells
        ((672, 1008), 7, (266, 406), (2, 3), (336, 336)),
        ((480, 640), 7, (280, 378), (2, 2), (280, 378)),
        ((1080, 1920), 7, (252, 448), (2, 3), (308, 364)),
        ((1080, 1920), 9, (252, 448), (2, 4), (350, 308)),
        ((448, 448), 7, (336, 336), (2, 1), (224, 462)),  # of two equal grids, the one with fewer columns
        ((672, 672), 2, (336, 336), (2, 1), (224, 462)),
        ((672, 672), 1, (336, 336), (0, 0), (0, 0)),
    ],
)
def test_sizes_worked_out_by_hand(
    size: Size, max_slices: int, overview: Size, grid: Size, slice_size: Size
) -> None:
    plan = slice_plan(size, side=336, stride=14, max_slices=max_slices)
    assert (plan.overview, plan.grid, plan.slice_size) == (overview, grid, slice_size)


def test_the_width_follows_from_the_rounded_height() -> None:
    """Upright sqrt(337 / 336) * 336 is 336.5 and 336 of it 335.0 wide; lying, 335.5 high is 335."""
    upright, lying = (slice_plan(size, **SETTINGS) for size in ((337, 336), (336, 337)))
    assert (upright.overview, lying.overview) == ((336, 322), (322, 322))


@pytest.mark.parametrize("count", range(1, 10))
def test_an_image_of_exactly_so_many_views_has_so_many_slices(count: int) -> None:
    for size, grid in (((336, 336 * count), (1, count)), ((336 * count, 336), (count, 1))):
        plan = slice_plan(size, side=336, stride=14, max_slices=9)
        assert plan.grid == (grid if count > 1 else (0, 0))
        assert plan.slice_size == ((336, 336) if count > 1 else (0, 0))
        more = slice_plan((size[0], size[1] + 1), side=336, stride=14, max_slices=count)
        assert prod(more.grid) <= (count if count > 1 else 0), "max_slices is never passed"
    assert prod(slice_plan((336, 337), side=336, stride=14, max_slices=9).grid) == 2


@given(LENGTH, LENGTH, PLANS)
@settings(max_examples=2000)
@example(1, 20_000, SETTINGS)
@example(20_000, 1, SETTINGS)
@example(6, 20_000, SETTINGS)
@example(20_000, 6, {**SETTINGS, "max_slices": 9})
@example(20_000, 20_000, {**SETTINGS, "max_slices": 2})
@example(3, 3, {"side": 1, "stride": 1, "max_slices": 8})  # four rows of slices of three rows of pixels
def test_views_are_whole_cells_and_tile_the_image(height: int, width: int, plan: dict[str, int]) -> None:
    geometry, stride = replace(UHD, **plan), plan["stride"]
    layout = geometry.layout((height, width))
    (rows, cols), (*slices, overview) = layout.tiles, layout.views
    assert layout.inputs == tuple(view.size for view in layout.views)
    for view in layout.views:
        assert view.size == (view.grid[0] * stride, view.grid[1] * stride)
        assert min(view.grid) >= 1
    assert len({view.size for view in slices}) == min(len(slices), 1)
    assert overview.box == (0, 0, width, height)
    across = [Fraction(width * col, cols) for col in range(cols + 1)] if cols else []
    down = [Fraction(height * row, rows) for row in range(rows + 1)] if rows else []
    assert [view.box for view in slices] == [
        tuple(map(float, (across[col], down[row], across[col + 1], down[row + 1])))
        for row, col in product(range(rows), range(cols))
    ]
    area, views = plan["side"] ** 2, ceil(Fraction(height * width, plan["side"] ** 2))
    assert (len(slices) == 0) == (min(views, plan["max_slices"]) == 1)
    assert len(slices) <= plan["max_slices"]
    assert not slices or abs(len(slices) - min(views, plan["max_slices"])) <= 1
    most = max(
        Fraction(area, stride**2), plan["side"] / stride * sqrt(max(height, width) / min(height, width))
    )
    assert prod(overview.grid) <= most
    if slices and min(height // rows, width // cols) > 20:  # less is bent by whole pixels
        assert prod(slices[0].grid) <= most


@given(LENGTH, LENGTH, st.integers(2, 12))
@settings(max_examples=1000)
def test_no_other_grid_is_nearer_to_the_aspect(height: int, width: int, max_slices: int) -> None:
    rows, cols = slice_plan((height, width), side=336, stride=14, max_slices=max_slices).grid
    count = min(ceil(Fraction(height * width, 336**2)), max_slices)
    if count == 1:
        assert rows == cols == 0
        return

    def bent(rows: int, cols: int) -> Fraction:
        by = Fraction(width * rows, height * cols)
        return max(by, 1 / by)

    counts = {count - 1, count, count + 1} - {1, max_slices + 1}
    grids = [(n // c, c) for n in counts for c in range(1, n + 1) if n % c == 0]
    assert (rows, cols) in grids
    assert bent(rows, cols) <= min(bent(*grid) for grid in grids) * (1 + Fraction(1, 10**12))


def test_a_line_of_pixels_becomes_a_line_of_cells() -> None:
    """The largest view there is up to an aspect of 20000:1 with views of 336 pixels and patches of 14."""
    (view,) = UHD.layout((20_000, 1)).views
    assert view.grid == (int(24 * sqrt(20_000)), 1) == (3394, 1)
    assert max(prod(UHD.layout((600 * 30, 30)).views[-1].grid), 576) == 24 * 24 + 11


@given(LENGTH, LENGTH, st.integers(1, 9), st.integers(1, 16), st.integers(1, 16))
@settings(max_examples=500)
def test_counts_are_those_of_the_papers_formulas(
    height: int, width: int, max_slices: int, token_rows: int, token_cols: int
) -> None:
    geometry = replace(
        UHD, max_slices=max_slices, token_grid=(token_rows, token_cols), newline=(13,), comma=(29892,)
    )
    layout = geometry.layout((height, width))
    (rows, cols), view = layout.tiles, token_rows * token_cols
    assert layout.num_visual == (rows * cols + 1) * view
    assert layout.token_grid == (token_rows, token_cols)
    per_slice = replace(geometry, organised=False).layout((height, width))
    assert per_slice.num_visual == layout.num_visual
    separators = rows * token_rows + 1 if rows else 0
    assert length(layout) == layout.num_visual + separators
    assert length(per_slice) == layout.num_visual + rows * cols


def length(layout: TokenLayout) -> int:
    return sum(run.count + len(run.ids or ()) for run in layout.runs)


@pytest.mark.parametrize(
    ("size", "organised", "per_slice"), [((672, 1008), 1033, 1014), ((1008, 672), 1045, 1014)]
)
def test_lengths_worked_out_by_hand(size: Size, organised: int, per_slice: int) -> None:
    geometry = replace(UHD, newline=(13,), comma=(29892,))
    assert length(geometry.layout(size)) == organised
    assert length(replace(geometry, organised=False).layout(size)) == per_slice


def written(layout: TokenLayout) -> list[int | str | tuple[int, ...] | None]:
    return [run.count or (run.ids if run.text is None else run.text) for run in layout.runs]


@pytest.mark.parametrize(("newline", "comma"), [("\n", ","), ((13,), (29892, 7)), ("", ())])
def test_separators_stand_where_they_are_told(newline: Any, comma: Any) -> None:
    geometry = replace(TINY, newline=newline, comma=comma)
    whole = [12 // 2, newline] * 4  # two rows of three slices, of two rows of two tokens each
    assert written(geometry.layout((56, 84))) == [*whole, comma, 4]
    slices = [4, comma, 4, comma, 4, newline] * 2
    assert written(replace(geometry, organised=False).layout((56, 84))) == [*slices, 4]
    for one_view in (geometry, replace(geometry, organised=False)):
        assert written(one_view.layout((28, 28))) == [4]


def test_before_the_overview_stands_a_comma_or_what_stands_behind_the_first_slice() -> None:
    first = replace(TINY, before_overview="first")
    assert written(first.layout((84, 28))) == [2, "\n"] * 6 + ["\n", 4]
    assert written(TINY.layout((84, 28))) == [2, "\n"] * 6 + [",", 4]
    assert written(first.layout((28, 84))) == written(TINY.layout((28, 84))) == [6, "\n"] * 2 + [",", 4]


@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 8))
@settings(max_examples=200)
def test_inputs_are_cut_from_one_resized_image(height: int, width: int, max_slices: int) -> None:
    geometry, image = replace(TINY, max_slices=max_slices), noise(height, width)
    layout = geometry.layout((height, width))
    *slices, overview = geometry.inputs(image, layout)
    assert tuple(tensor.shape[1:] for tensor in (*slices, overview)) == layout.inputs
    expected = [image.resize(layout.inputs[-1][::-1], Image.Resampling.BICUBIC)]
    if slices:
        (rows, cols), (h, w) = layout.tiles, layout.inputs[0]
        whole = image.resize((cols * w, rows * h), Image.Resampling.BICUBIC)
        places = [(col * w, row * h) for row in range(rows) for col in range(cols)]
        expected = [whole.crop((x, y, x + w, y + h)) for x, y in places] + expected
    for tensor, part in zip([*slices, overview], expected, strict=True):
        np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), np.asarray(part), atol=1e-3)


def test_statistics_are_subtracted_and_divided_by() -> None:
    image = Image.new("RGB", (40, 20), (255, 51, 0))
    geometry = replace(TINY, mean=(0.5, 0.1, 0.25), std=(0.25, 0.2, 0.5))
    for tensor in geometry.inputs(image, geometry.layout((20, 40))):
        assert tensor.mean(dim=(1, 2)).tolist() == pytest.approx([2, 0.5, -0.5])


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 90))
@settings(max_examples=200)
def test_a_long_side_is_a_resize_beforehand(height: int, width: int, side: int) -> None:
    geometry, image = replace(TINY, long_side=side), noise(height, width)
    size = long_side_size((height, width), side)
    resized = image.resize(size[::-1], Image.Resampling.BICUBIC)
    layout, expected = geometry.layout((height, width)), TINY.layout(size)
    assert (layout.inputs, layout.tiles, layout.runs) == (expected.inputs, expected.tiles, expected.runs)
    assert layout.image_size == (height, width)
    assert layout.views[-1].box == (0, 0, width, height)
    pairs = zip(geometry.inputs(image, layout), TINY.inputs(resized, expected), strict=True)
    assert all(ours.equal(theirs) for ours, theirs in pairs)


@given(LENGTH, LENGTH, st.sampled_from([1, 336, 1024, 1536]))
def test_a_long_side_keeps_the_aspect(height: int, width: int, side: int) -> None:
    resized = long_side_size((height, width), side)
    assert max(resized) == side
    exact = Fraction(side * min(height, width), max(height, width))
    assert max(exact - 1, 1) - Fraction(1, 10**9) <= min(resized) <= max(exact, 1)
    assert (resized[0] - resized[1]) * (height - width) >= 0


@given(LENGTH, LENGTH, st.integers(1, 9))
def test_an_area_keeps_the_aspect(height: int, width: int, count: int) -> None:
    area = count * 336**2
    resized = total_area_size((height, width), area)
    for length, before in zip(resized, (height, width), strict=True):
        exact = before * sqrt(area / (height * width))
        assert length == max(int(exact), 1)


def test_an_image_with_as_many_slices_already_keeps_its_size() -> None:
    assert UHD.resized((1080, 1920), slices=6) == (1080, 1920)
    assert UHD.resized((480, 640), slices=6) == total_area_size((480, 640), 6 * 336**2) == (712, 950)
    assert UHD.layout((712, 950)).tiles == (2, 3)


@pytest.mark.parametrize("size", [(2000, 3000), (3000, 500), (20_000, 1), (30, 30)])
def test_an_image_that_is_never_split_is_one_view(size: Size) -> None:
    whole = replace(UHD, never_split=True)
    layout = whole.layout(size)
    assert (layout.tiles, len(layout.views), layout.num_visual) == ((0, 0), 1, 144)
    assert layout == replace(UHD, max_slices=1).layout(size)
    assert layout.runs == UHD.layout((1, 1)).runs


@pytest.mark.parametrize("long_side", [None, 1024])
@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (6, 20_000), (20_000, 7), (3, 200)])
def test_pictures_of_any_shape_can_be_cut_without_a_huge_one_on_the_way(
    size: Size, long_side: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, made = Image.new("RGB", size[::-1], (7, 8, 9)), []
    new = Image.Image._new

    def seen(self: Image.Image, im: object) -> Image.Image:
        image = new(self, im)
        made.append(image.width * image.height)
        return image

    monkeypatch.setattr(Image.Image, "_new", seen)
    geometry = replace(UHD, long_side=long_side)
    layout = geometry.layout(size)
    inputs = geometry.inputs(image, layout)
    assert tuple(tensor.shape[1:] for tensor in inputs) == layout.inputs
    assert all(tensor.isfinite().all() for tensor in inputs)
    assert max(made) < 4e6


@pytest.mark.parametrize(("long_side", "times"), [(None, 2), (50, 1)])
def test_the_source_is_resized_once_or_twice(
    long_side: int | None, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, resized = noise(300, 400), []
    resize = Image.Image.resize

    def seen(self: Image.Image, *arguments: Any, **keywords: Any) -> Image.Image:
        resized.append(self.size)
        return resize(self, *arguments, **keywords)

    monkeypatch.setattr(Image.Image, "resize", seen)
    geometry = replace(TINY, long_side=long_side)
    layout = geometry.layout((300, 400))
    assert layout.tiles != (0, 0)
    geometry.inputs(image, layout)
    assert resized.count(image.size) == times


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0), (-3, 4)])
@pytest.mark.parametrize("long_side", [None, 1024])
def test_an_image_without_pixels_is_refused(size: Size, long_side: int | None) -> None:
    with pytest.raises(ValueError, match=f"at least one pixel each way, got {size[0]}x{size[1]}"):
        replace(UHD, long_side=long_side).layout(size)
