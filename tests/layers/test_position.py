"""Facts about position embeddings and biases, and about what becomes of them on another grid."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import CubicSpline
from torch import nn

from stepwell.layers import position
from stepwell.layers.position import (
    RelativeBias,
    cubic_spline_weights,
    fraction_embedding,
    fraction_position_embedding,
    relative_position_bias,
    resize_patch_kernel,
    resize_position_embedding,
    resize_relative_table,
    sincos_position_embedding,
)


def test_a_table_is_resized_as_a_map_and_the_class_slot_is_not() -> None:
    table = torch.randn(1 + 3 * 4, 5)
    resized = resize_position_embedding(table, (3, 4), (6, 5), class_slot=True)
    map = F.interpolate(table[1:].T.reshape(1, 5, 3, 4), (6, 5), mode="bicubic", align_corners=False)
    assert torch.equal(resized[0], table[0])
    torch.testing.assert_close(resized[1:], map[0].flatten(1).T)


def test_a_table_on_its_own_grid_is_itself() -> None:
    table = torch.randn(12, 5, dtype=torch.bfloat16)
    assert resize_position_embedding(table, (3, 4), (3, 4)) is table


def test_resizing_keeps_a_tables_dtype_and_constants() -> None:
    resized = resize_position_embedding(torch.full((9, 2), 0.5, dtype=torch.bfloat16), (3, 3), (7, 4))
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized, torch.full((28, 2), 0.5, dtype=torch.bfloat16))


def test_a_table_with_the_wrong_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="has 9 rows, this one 10"):
        resize_position_embedding(torch.zeros(10, 2), (3, 3), (4, 4))


def test_a_patch_kernel_keeps_its_values_not_its_sum() -> None:
    kernel = resize_patch_kernel(torch.full((2, 3, 14, 14), 0.25), 16)
    torch.testing.assert_close(kernel, torch.full((2, 3, 16, 16), 0.25))


def test_sincos_position_embeddings_of_the_same_place_agree_at_any_resolution() -> None:
    """The centre of a cell of a 3 x 5 grid is the centre of the middle cell of its 3 x 3 split."""
    coarse = sincos_position_embedding(16, (3, 5)).view(3, 5, 16)
    fine = sincos_position_embedding(16, (9, 15)).view(9, 15, 16)
    torch.testing.assert_close(fine[1::3, 1::3], coarse, atol=1e-4, rtol=0)


def test_sincos_position_embeddings_split_into_rows_and_columns_and_tell_all_cells_apart() -> None:
    embedding = sincos_position_embedding(32, (40, 64)).view(40, 64, 32)
    assert torch.equal(embedding[3, 5, :16], embedding[3, 60, :16])
    assert torch.equal(embedding[3, 5, 16:], embedding[30, 5, 16:])
    assert torch.cdist(embedding.flatten(0, 1), embedding.flatten(0, 1)).fill_diagonal_(9).min() > 0.05
    torch.testing.assert_close(embedding.square().sum(-1), torch.full((40, 64), 16.0))  # sin^2 + cos^2 each


def test_a_sincos_position_embedding_needs_a_width_of_four() -> None:
    with pytest.raises(ValueError, match="divisible by 4, got 10"):
        sincos_position_embedding(10, (2, 2))


def test_the_sincos_frequencies_reach_from_half_a_turn_over_the_side_to_a_turn_in_four_of_its_128_cells() -> (
    None
):
    sines = sincos_position_embedding(32, (1, 128))[:, 16:24]  # of columns, from the lowest frequency on
    cells = (torch.arange(128) + 0.5) / 128
    torch.testing.assert_close(sines[:, 0], (torch.pi * cells).sin())
    torch.testing.assert_close(sines[4:, -1], sines[:-4, -1], atol=1e-4, rtol=0)
    assert (sines[2:, -1] + sines[:-2, -1]).abs().max() < 1e-4  # and no turn in two


def test_fractions_become_waves_whose_lengths_fall_from_the_longest_to_the_shortest() -> None:
    fractions = torch.linspace(0, 1, 33)
    waves = fraction_embedding(fractions, 10)
    for shift, wave in ((2.0, 0), (2.0 * (0.07 / 2.0) ** 0.5, 2), (0.07, 4)):
        shifted = fraction_embedding(fractions + shift, 10)
        for channel in (wave, 5 + wave):  # its sine, its cosine
            torch.testing.assert_close(shifted[:, channel], waves[:, channel], atol=1e-4, rtol=0)
            assert (shifted - waves)[:, channel - 1].abs().max() > 0.1
    assert waves[0].tolist() == [0] * 5 + [1] * 5
    longer = fraction_embedding(fractions, 10, longest=4.0, shortest=0.5)
    torch.testing.assert_close(longer[:, 0], (fractions * torch.pi / 2).sin())
    torch.testing.assert_close(longer[:, 4], (fractions * 4 * torch.pi).sin(), atol=1e-5, rtol=1e-4)


def test_a_fraction_position_embedding_is_of_the_columns_then_the_rows_centres() -> None:
    embedding = fraction_position_embedding(12, (2, 5)).view(2, 5, 12)
    columns, rows = ((torch.arange(n) + 0.5) / n for n in (5, 2))
    torch.testing.assert_close(embedding[1, :, :6], fraction_embedding(columns, 6))
    torch.testing.assert_close(embedding[:, 3, 6:], fraction_embedding(rows, 6))
    with pytest.raises(ValueError, match="divisible by 4, got 10"):
        fraction_position_embedding(10, (2, 2))


def test_a_fraction_position_embedding_in_boxes_is_of_places_in_the_whole() -> None:
    whole = fraction_position_embedding(12, (4, 6)).view(4, 6, 12)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1 / 3, 0.25, 2 / 3, 0.75]])
    found = fraction_position_embedding(12, (4, 6), boxes)
    torch.testing.assert_close(found[0], whole.flatten(0, 1))
    inner = fraction_position_embedding(12, (2, 2), boxes[1:]).view(2, 2, 12)
    torch.testing.assert_close(inner, whole[1:3, 2:4])
    finer = fraction_position_embedding(12, (4, 6), shortest=0.01)
    torch.testing.assert_close(finer[0, :6], fraction_embedding(torch.tensor([1 / 12]), 6, shortest=0.01)[0])
    finer_inner = fraction_position_embedding(12, (2, 2), boxes[1:], shortest=0.01).view(2, 2, 12)
    torch.testing.assert_close(finer_inner, finer.view(4, 6, 12)[1:3, 2:4], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("rows", "cols"), [(3, 4), (5, 2)])
def test_a_relative_position_bias_depends_on_the_offset_alone(rows: int, cols: int) -> None:
    offsets, cells = (2 * rows - 1) * (2 * cols - 1), rows * cols
    table = torch.arange(float(offsets))[:, None] * torch.tensor([1.0, -1.0])
    bias = relative_position_bias(table, (rows, cols))
    for query in range(cells):
        for key in range(cells):
            down, right = query // cols - key // cols, query % cols - key % cols
            row = (down + rows - 1) * (2 * cols - 1) + right + cols - 1
            assert bias[0, query, key] == row == -bias[1, query, key]


def test_the_spline_reproduces_cubics_and_passes_through_its_points() -> None:
    x = torch.tensor([-3.0, -1.2, 0.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    at = torch.linspace(-3, 4, 29, dtype=torch.float64)
    cubic = lambda t: 2 * t**3 - t**2 + 0.5 * t - 3  # noqa: E731
    torch.testing.assert_close(cubic_spline_weights(x, at) @ cubic(x), cubic(at))
    torch.testing.assert_close(cubic_spline_weights(x, x), torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("n", [4, 5, 9])
def test_the_spline_is_scipys_cubic_spline(n: int) -> None:
    x = torch.linspace(-2, 3, n, dtype=torch.float64).pow(3)
    at = torch.linspace(-8, 27, 57, dtype=torch.float64)
    values = torch.randn(n, dtype=torch.float64)
    expected = CubicSpline(x.numpy(), values.numpy(), bc_type="not-a-knot")(at.numpy())
    torch.testing.assert_close(cubic_spline_weights(x, at) @ values, torch.from_numpy(expected))


def test_the_spline_takes_the_border_value_outside() -> None:
    x = torch.arange(5, dtype=torch.float64)
    outside = cubic_spline_weights(x, torch.tensor([-2.0, 9.0], dtype=torch.float64))
    torch.testing.assert_close(outside, torch.eye(5, dtype=torch.float64)[[0, 4]])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tables that a bias was built of."""
    tables: list[torch.Tensor] = []
    monkeypatch.setattr(
        position,
        "relative_position_bias",
        lambda table, grid: tables.append(table) or relative_position_bias(table, grid),
    )
    return tables


def test_a_bias_is_built_once_where_no_gradient_is_recorded(built: list[torch.Tensor]) -> None:
    table, bias = nn.Parameter(torch.randn(15, 2)), RelativeBias((2, 3))
    with torch.inference_mode():
        first = bias(table)
        assert bias(table) is first
    with torch.no_grad():
        assert bias(table) is first
    assert len(built) == 1
    torch.testing.assert_close(first, relative_position_bias(table, (2, 3)))


def test_a_table_that_changed_in_any_way_gets_another_bias(built: list[torch.Tensor]) -> None:
    table, bias = nn.Parameter(torch.randn(15, 2)), RelativeBias((2, 3))
    for change in (
        lambda: table.add_(1),
        lambda: table.data.copy_(torch.randn(15, 2)),  # of which torch's version counter knows nothing
        lambda: table.data.fill_(1),
        lambda: setattr(table, "data", table.data.bfloat16()),  # ones are equal in both
    ):
        with torch.no_grad():
            bias(table)
            change()
            assert torch.equal(bias(table), relative_position_bias(table, (2, 3)))
            assert bias(table).dtype == table.dtype
    assert bias(nn.Parameter(torch.zeros(15, 2))).eq(0).all()


def test_a_bias_with_a_gradient_is_always_built_and_nothing_is_kept() -> None:
    table, bias = nn.Parameter(torch.randn(15, 2)), RelativeBias((2, 3))
    with torch.inference_mode():
        first = bias(table)
    for _ in range(2):
        bias(table).sum().backward()
    torch.testing.assert_close(table.grad.sum(), torch.tensor(2.0 * 2 * 36))
    with torch.no_grad():
        assert bias(table) is not first


def test_a_large_bias_and_one_without_numbers_are_not_kept(
    built: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = RelativeBias((2, 3))
    with torch.no_grad():
        for table in (torch.zeros(15, 2), nn.Parameter(torch.zeros(15, 2, device="meta"))):
            assert bias(table) is not bias(table)
        monkeypatch.setattr(position, "MOST_BYTES", 4 * 2 * 36 - 1)
        table = nn.Parameter(torch.zeros(15, 2))
        assert bias(table) is not bias(table)
        monkeypatch.setattr(position, "MOST_BYTES", 4 * 2 * 36)
        assert bias(table) is bias(table)


def test_copies_leave_the_kept_bias_behind(built: list[torch.Tensor]) -> None:
    table, bias = nn.Parameter(torch.randn(15, 2)), RelativeBias((2, 3))
    with torch.no_grad():
        bias(table)
        for other in (copy.deepcopy(bias), pickle.loads(pickle.dumps(bias))):
            assert torch.equal(other(table), bias(table))
    assert len(built) == 3


def test_a_resized_relative_table_keeps_the_centre_and_stretches_the_rest() -> None:
    """Offset 0 and 1 sit where they were; the outermost of the source becomes the outermost of the target."""
    table = torch.randn(13 * 13, 2)
    source, target = table.view(13, 13, 2), resize_relative_table(table, (7, 7), (10, 10)).view(19, 19, 2)
    for theirs, ours in ((6, 9), (7, 10), (5, 8)):
        torch.testing.assert_close(target[ours, 9], source[theirs, 6])
        torch.testing.assert_close(target[9, ours], source[6, theirs])
    torch.testing.assert_close(target[18, 0], source[12, 0], atol=1e-4, rtol=1e-4)


def test_offsets_of_a_resized_relative_table_grow_by_a_factor_to_the_outermost() -> None:
    """A table that holds the places of its own offsets: 1 + q + ... + q^5 = 9. Splines reproduce lines."""
    q = next(
        root.real for root in np.roots([1, 1, 1, 1, 1, 1 - 9]) if abs(root.imag) < 1e-9 and root.real > 0
    )
    away = torch.tensor(np.cumsum(q ** np.arange(6)), dtype=torch.float32)
    places = torch.cat([-away.flip(0), torch.zeros(1), away])
    table = torch.stack(torch.meshgrid(places, places, indexing="ij"), -1).flatten(0, 1)
    resized = resize_relative_table(table, (7, 7), (10, 10)).view(19, 19, 2)
    whole = torch.arange(-9.0, 10.0)
    torch.testing.assert_close(resized[:, 4, 0], whole, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(resized[4, :, 1], whole, atol=1e-3, rtol=1e-3)


def test_a_relative_table_for_the_same_window_is_itself() -> None:
    table = torch.randn(13 * 13, 2)
    assert resize_relative_table(table, (7, 7), (7, 7)) is table
    rows_only = resize_relative_table(table, (7, 7), (9, 7)).view(17, 13, 2)
    torch.testing.assert_close(rows_only[8], table.view(13, 13, 2)[6])


def test_a_relative_table_for_a_smaller_window_keeps_its_near_offsets() -> None:
    table = torch.randn(13 * 11, 2)
    smaller = resize_relative_table(table, (7, 6), (4, 6)).view(7, 11, 2)
    torch.testing.assert_close(smaller[2:5], table.view(13, 11, 2)[5:8])


@pytest.mark.parametrize(("source", "target"), [((16, 16), (44, 34)), ((24, 16), (7, 20)), ((5, 3), (1, 1))])
def test_antialiased_resizes_are_exported_as_products_of_the_same_weights(source, target):
    class Resized(torch.nn.Module):
        def forward(self, table):
            return resize_position_embedding(table, source, target, antialias=True, class_slot=True)

    torch.manual_seed(0)
    table = torch.randn(source[0] * source[1] + 1, 4, dtype=torch.float64)
    program = torch.export.export(Resized(), (table,))
    assert not [node for node in program.graph.nodes if "upsample" in str(node.target)]
    torch.testing.assert_close(program.module()(table), Resized()(table), rtol=0, atol=1e-12)
