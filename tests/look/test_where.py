"""Heat maps and boxes against cases worked by hand, and over every system's tokens."""

from __future__ import annotations

import pytest
import torch
from systems_to_see import SYSTEMS

from stepwell.look.where import Heat, box_at_peak, heat_map
from stepwell.structures import TokenGrid, TokenLayout, TokenRun


def layout_of(size: tuple[int, int], grids: tuple[TokenGrid, ...], count: int) -> TokenLayout:
    return TokenLayout(image_size=size, inputs=(), views=(), runs=(TokenRun(count=count),), grids=grids)


def test_a_coarse_cell_is_spread_over_the_fine_ones_and_sums_stay() -> None:
    """Four fine tokens over the right half, one coarse token over everything."""
    fine = TokenGrid.over((40, 0, 80, 40), (2, 2), first=0)
    whole = TokenGrid.over((0, 0, 80, 40), (1, 1), first=4)
    heat = heat_map(layout_of((40, 80), (fine, whole), 5), torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0]))
    assert heat.box == (0, 0, 80, 40)
    expected = torch.tensor([[1.0, 1, 2, 3], [1, 1, 4, 5]])
    torch.testing.assert_close(heat.map, expected)


def test_what_lies_in_padding_is_left_out_and_tokens_of_several_cells_are_shared() -> None:
    """The image is the middle half of a padded square; token 0 stands for two cells, another for none."""
    padded = TokenGrid((0, -20, 80, 60), ((0, 0), (1, -1)))
    heat = heat_map(layout_of((40, 80), (padded,), 3), torch.tensor([8.0, 4.0, 100.0]))
    assert heat.box == (0, 0, 80, 40)
    torch.testing.assert_close(heat.map.sum(), torch.tensor(6.0))  # half of each cell is image
    torch.testing.assert_close(heat.map.sum(0), torch.tensor([4.0, 2.0]))


@pytest.mark.parametrize("kind", SYSTEMS)
@pytest.mark.parametrize("size", [(80, 150), (200, 60)])
def test_of_every_system_no_weight_is_lost_in_the_image(kind: str, size: tuple[int, int]) -> None:
    layout = SYSTEMS[kind].geometry().layout(size)
    placed = {token for grid in layout.grids for row in grid.rows for token in row} - {-1}
    weights = torch.zeros(layout.num_visual)
    weights[list(placed)] = 1.0
    heat = heat_map(layout, weights)
    inside = all(
        left >= 0 and top >= 0 and right <= size[1] + 1e-6 and bottom <= size[0] + 1e-6
        for (left, top, right, bottom), _ in layout.grids
    )
    if inside:
        assert float(heat.map.sum()) == pytest.approx(len(placed), rel=1e-4)
    else:
        assert 0 < float(heat.map.sum()) < len(placed)


def test_one_weight_lies_where_its_cell_is() -> None:
    grid = TokenGrid.over((0, 0, 100, 50), (5, 10))
    weights = torch.zeros(50)
    weights[23] = 1.0
    heat = heat_map(layout_of((50, 100), (grid,), 50), weights)
    assert box_at_peak(heat) == (30, 20, 40, 30)


def test_the_box_grows_along_the_heat_until_it_holds_the_share() -> None:
    values = torch.zeros(4, 6)
    values[1, 1:5] = torch.tensor([1.0, 4.0, 3.0, 2.0])
    values[3, 5] = 0.5
    heat = Heat(values, (0, 0, 60, 40))
    assert box_at_peak(heat, 0.35) == (20, 10, 30, 20)
    assert box_at_peak(heat, 0.5) == (20, 10, 40, 20)
    assert box_at_peak(heat, 0.8) == (20, 10, 50, 20)
    assert box_at_peak(heat, 0.95) == (10, 10, 50, 20)


def test_the_box_ends_where_the_image_does() -> None:
    assert box_at_peak(Heat(torch.ones(2, 3), (0, 0, 30, 20)), 1.0) == (0, 0, 30, 20)
    corner = torch.ones(2, 3)
    corner[1, 2] = 2.0
    assert box_at_peak(Heat(corner, (0, 0, 30, 20)), 1.0) == (0, 0, 30, 20)


def test_what_has_no_heat_or_no_place_is_refused() -> None:
    grid = TokenGrid.over((0, 0, 10, 10), (1, 1))
    with pytest.raises(ValueError, match="no heat"):
        box_at_peak(heat_map(layout_of((10, 10), (grid,), 1), torch.zeros(1)))
    with pytest.raises(ValueError, match="1 visual tokens need as many weights"):
        heat_map(layout_of((10, 10), (grid,), 1), torch.zeros(2))
    with pytest.raises(ValueError, match="no place in the image"):
        heat_map(layout_of((10, 10), (), 1), torch.zeros(1))
