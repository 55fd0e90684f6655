"""Parts of maps, against coordinates and areas that are known."""

from __future__ import annotations

import pytest
import torch

from stepwell.ops.resize import cell_centres, cut_from_map, put_on_map, resize_map

BOXES = torch.tensor(
    [[0.2, 0.25, 0.8, 0.75], [0.0, 0.0, 1.0, 1.0], [0.5, 0.1, 0.6, 0.9]], dtype=torch.float64
)


def places(size, boxes=None):
    """(B, 2, H, W): columns and rows of the cells' centres, in fractions of the whole."""
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64) if boxes is None else boxes
    left, top, right, bottom = boxes.unbind(1)
    cols, rows = cell_centres(size[1], left, right), cell_centres(size[0], top, bottom)
    shape = (-1, *size)
    return torch.stack([cols[:, None].expand(shape), rows[:, :, None].expand(shape)], 1)


def test_centres_of_cells_between_two_ends():
    first, last = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 6.0])
    assert cell_centres(4, first, last).tolist() == [[0.125, 0.375, 0.625, 0.875], [2.5, 3.5, 4.5, 5.5]]


def test_what_is_cut_from_a_map_knows_its_place():
    cut = cut_from_map(places((20, 30)).expand(3, -1, -1, -1), (7, 5), BOXES)
    expected = places((7, 5), BOXES)
    torch.testing.assert_close(cut[[0, 2]], expected[[0, 2]])
    inner = slice(1, -1)
    torch.testing.assert_close(cut[1][:, inner, inner], expected[1][:, inner, inner])


@pytest.mark.parametrize("size", [(9, 7), (3, 2), (5, 4)])
def test_all_of_a_map_is_cut_as_it_is_resized(size):
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(cut_from_map(x, size, BOXES[1:2]), resize_map(x, size))


def test_beside_a_map_there_is_what_its_edge_holds():
    x = torch.arange(4.0).view(1, 1, 1, 4)
    cut = cut_from_map(x, (1, 4), torch.tensor([[-1.0, -2.0, 2.0, 3.0]]))
    assert cut.flatten().tolist() == pytest.approx([0, 0, 3, 3], abs=1e-5)


def test_half_precision_is_rounded_once():
    x = torch.randn(3, 2, 6, 5).bfloat16()
    for change in (cut_from_map, put_on_map):
        assert torch.equal(change(x, (4, 9), BOXES), change(x.float(), (4, 9), BOXES).bfloat16())


def test_a_map_fills_its_box_and_nothing_else():
    ones = torch.ones(1, 1, 6, 10, dtype=torch.float64)
    placed = put_on_map(ones, (4, 5), torch.tensor([[0.2, 0.25, 0.8, 0.75]], dtype=torch.float64))[0, 0]
    expected = torch.zeros(4, 5, dtype=torch.float64)
    expected[1:3, 1:4] = 1
    torch.testing.assert_close(placed, expected)


def test_cells_at_the_edge_of_a_box_hold_their_share():
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    placed = put_on_map(ones, (1, 4), torch.tensor([[0.125, 0.0, 0.5, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(placed.flatten(), torch.tensor([0.5, 1, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("grid", [(4, 6), (40, 60), (3, 100)])
def test_what_is_put_keeps_its_sum_by_area(grid):
    x = torch.rand(3, 2, 8, 12, dtype=torch.float64)
    areas = (BOXES[:, 2] - BOXES[:, 0]) * (BOXES[:, 3] - BOXES[:, 1])
    placed = put_on_map(x, grid, BOXES).mean((2, 3))
    torch.testing.assert_close(placed, x.mean((2, 3)) * areas[:, None])


def test_all_of_a_grid_is_means_of_what_falls_together():
    x = torch.rand(1, 2, 8, 12, dtype=torch.float64)
    pooled = torch.nn.functional.avg_pool2d(x, (2, 3))
    torch.testing.assert_close(put_on_map(x, (4, 4), BOXES[1:2]), pooled)
    torch.testing.assert_close(put_on_map(x, (8, 12), BOXES[1:2]), x)
