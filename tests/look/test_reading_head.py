"""Which head reads: heads whose attention is written by hand."""

from __future__ import annotations

import torch

from stepwell.look.reading_head import places_of, reading_scores
from stepwell.structures import TokenGrid, TokenLayout, TokenRun


def layout(grids: tuple[TokenGrid, ...], count: int) -> TokenLayout:
    return TokenLayout(image_size=(40, 80), inputs=(), views=(), runs=(TokenRun(count=count),), grids=grids)


def looking_at(cells: list[int], weight: float, count: int = 32) -> torch.Tensor:
    """(n, N): so much at each of the cells."""
    rows = torch.zeros(len(cells), count)
    rows[range(len(cells)), cells] = weight
    return rows


def test_who_steps_along_a_line_scores_by_its_weight_and_others_not() -> None:
    places = places_of([layout((TokenGrid.over((0, 0, 80, 40), (4, 8)),), 32)])
    heads = [
        looking_at([8, 9, 10, 11], 0.6),  # along the second row
        looking_at([8, 9, 10, 11], 0.3),
        looking_at([5, 5, 5, 5], 0.9),  # one token whatever is written
        looking_at([0, 31, 0, 31], 0.9),  # leaps
        looking_at([8, 9, 9, 31], 0.9),  # one step in three
    ]
    scores = reading_scores(torch.stack(heads), places)
    torch.testing.assert_close(scores, torch.tensor([0.6, 0.3, 0.0, 0.0, 0.3]))


def test_a_single_token_tells_no_reader() -> None:
    places = places_of([layout((TokenGrid.over((0, 0, 80, 40), (4, 8)),), 32)])
    assert reading_scores(looking_at([3], 1.0)[None], places).tolist() == [0.0]


def test_two_cells_are_near_and_three_are_not() -> None:
    places = places_of([layout((TokenGrid.over((0, 0, 80, 40), (4, 8)),), 32)])
    assert reading_scores(looking_at([0, 18], 1.0)[None], places).item() == 1
    assert reading_scores(looking_at([0, 3], 1.0)[None], places).item() == 0


def test_other_images_and_tokens_without_a_place_are_not_near() -> None:
    one = layout((TokenGrid.over((0, 0, 80, 40), (2, 2)),), 5)  # the fifth token has no cell
    places = places_of([one, one])
    assert places.images.tolist() == [0] * 5 + [1] * 5
    assert torch.isnan(places.centres[4]).all()
    rows = torch.zeros(2, 2, 10)
    rows[0, [0, 1], [1, 6]] = 1  # the same place of two images
    rows[1, [0, 1], [3, 4]] = 1
    assert reading_scores(rows, places).tolist() == [0.0, 0.0]
    torch.testing.assert_close(places.centres[3], torch.tensor([60.0, 30.0]))
    torch.testing.assert_close(places.sizes[3], torch.tensor([40.0, 20.0]))
