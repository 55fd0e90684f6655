"""Windows of a map are those of torchvision's RoIAlign."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align

from stepwell.ops.window_pool import pooling_matrix, window_edges, window_pool

sides = st.integers(1, 40)
counts = st.integers(1, 13)
bins = st.integers(1, 5)


def official(x: Tensor, grid: tuple[int, int], bins: tuple[int, int]) -> Tensor:
    (height, width), (rows, cols) = x.shape[-2:], grid
    boxes = torch.tensor(
        [
            [j * width / cols, i * height / rows, (j + 1) * width / cols, (i + 1) * height / rows]
            for i in range(rows)
            for j in range(cols)
        ],
        dtype=torch.float64,
    ).to(x.dtype)
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    pooled = roi_align(exact, [boxes.to(exact.dtype)] * len(x), bins, sampling_ratio=-1, aligned=False)
    return pooled.flatten(2).transpose(1, 2).unflatten(0, (len(x), -1)).to(x.dtype)


@given(st.tuples(sides, sides), st.tuples(counts, counts), st.tuples(bins, bins), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_values_are_those_of_roi_align(
    size: tuple[int, int], grid: tuple[int, int], bins: tuple[int, int], seed: int
) -> None:
    """Maps smaller than the grid included, and one cell high."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(window_pool(x, grid, bins), official(x, grid, bins), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "grid", "bins"),
    [
        ((24, 24), (12, 12), (3, 3)),
        ((25, 22), (12, 12), (3, 3)),
        ((50, 46), (12, 16), (2, 3)),
        ((3, 5), (12, 12), (2, 4)),
        ((1, 1), (2, 2), (2, 2)),
        ((19, 29), (8, 8), (4, 3)),
        ((41, 7), (3, 5), (4, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_edges_are_rounded_as_the_map_is(
    size: tuple[int, int], grid: tuple[int, int], bins: tuple[int, int], dtype: torch.dtype
) -> None:
    """Samples are counted in single precision, where a side of three cells may be a bit more than three."""
    x = torch.randn(1, 3, *size).to(dtype)
    got = window_pool(x, grid, bins)
    assert got.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, official(x, grid, bins), rtol=tolerance, atol=tolerance)


def test_edges_may_be_rounded_otherwise_than_the_map() -> None:
    x = torch.randn(1, 2, 50, 46)
    rounded = window_pool(x, (12, 12), (3, 3), edges=torch.bfloat16)
    torch.testing.assert_close(rounded, _rounded_edges(x))
    assert (rounded - window_pool(x, (12, 12), (3, 3))).abs().max() > 0.1


def _rounded_edges(x: Tensor) -> Tensor:
    rows, cols = (window_edges(side, 12, torch.bfloat16).float() for side in x.shape[-2:])
    boxes = torch.stack(
        [torch.stack([cols[j], rows[i], cols[j + 1], rows[i + 1]]) for i in range(12) for j in range(12)]
    )
    pooled = roi_align(x, [boxes], (3, 3), sampling_ratio=-1, aligned=False)
    return pooled.flatten(2).transpose(1, 2)[None]


def test_edges_tile_the_axis() -> None:
    assert window_edges(25, 10, torch.float64).tolist() == [2.5 * i for i in range(11)]


def test_gradients() -> None:
    x = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: window_pool(x, (2, 4), (3, 2)), x)


def test_a_bin_that_lies_beyond_the_map_has_a_share_below_one() -> None:
    shares = pooling_matrix(3, 12, 2, torch.float64).sum(1).unflatten(0, (12, 2))
    assert shares[0].tolist() == [1, 1]
    assert shares[-1].tolist() == [
        1,
        0,
    ]  # a window of one cell from 2.75 on: the map ends at 3, samples do at 3.5


def test_autocast_does_not_round_the_means() -> None:
    x = torch.randn(1, 2, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        inside = window_pool(x, (3, 3), (2, 2))
    assert torch.equal(inside, window_pool(x, (3, 3), (2, 2)))


def test_all_windows_of_a_map_are_one_product_of_matrices() -> None:
    """A map of one and the same number keeps it, in any grid that is not finer than the map."""
    for length, windows, parts in ((24, 12, 3), (7, 7, 2), (40, 3, 4)):
        matrix = pooling_matrix(length, windows, parts, torch.float64)
        assert matrix.shape == (windows * parts, length)
        assert math.isclose(float(matrix.sum()), windows * parts)
