"""Where deformable attention samples: a case worked by hand, and against what its operation is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from systems_to_see import PIIP, PLAIN, Build, Draw

from stepwell.fuse.interaction import DeformableCrossAttention, InteractionConfig
from stepwell.look.sampling import sampled, to_source
from stepwell.look.subject import subject
from stepwell.structures import View


def test_without_offsets_every_point_is_the_middle_of_the_cell_that_asks(build: Build, draw: Draw) -> None:
    assistant = build(PIIP)
    seen, point = subject(assistant, draw(128, 64)), (70.0, 20.0)
    for module in seen.network.modules():
        if isinstance(module, DeformableCrossAttention):
            torch.nn.init.zeros_(module.offsets.weight)
            torch.nn.init.zeros_(module.offsets.bias)
    found = sampled(seen, point)
    assert [(one.interaction, one.source, one.target) for one in found] == [
        (0, 1, 0),
        (0, 0, 1),
        (1, 1, 0),
        (1, 0, 1),
    ]
    for one in found:
        rows, cols = seen.views[one.target].grid
        row, col = int(20 / 64 * rows), int(70 / 128 * cols)
        assert one.cell == (row, col)
        middle = torch.tensor([(col + 0.5) / cols * 128, (row + 0.5) / rows * 64])
        assert one.places is not None
        torch.testing.assert_close(one.places, middle.expand(4, 4, 2))
        torch.testing.assert_close(one.weights.sum(1), torch.ones(4))


def test_places_are_those_that_the_operation_is_given(
    build: Build, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stepwell.layers.deformable as layer

    given: list[Any] = []
    operation = layer.deform_attn

    def remember(value: Any, sizes: Any, x: Any, y: Any, weights: Any) -> Any:
        given.append((sizes[0], x, y, weights))
        return operation(value, sizes, x, y, weights)

    monkeypatch.setattr(layer, "deform_attn", remember)
    seen = subject(build(PIIP), draw(90, 60))
    found = sampled(seen, (80.0, 10.0))
    assert len(found) == len(given) == 4
    for one, (grid, x, y, weights) in zip(found, given, strict=True):
        cols = seen.views[one.target].grid[1]
        index = one.cell[0] * cols + one.cell[1]
        assert one.places is not None
        torch.testing.assert_close(one.weights, weights[0, index])
        torch.testing.assert_close(one.places[..., 0], (x[0, index] + 0.5) / grid[1] * 90)
        torch.testing.assert_close(one.places[..., 1], (y[0, index] + 0.5) / grid[0] * 60)
        assert one.gate > 0


def test_of_a_close_up_places_lie_where_each_branch_looks(build: Build, draw: Draw) -> None:
    """Branch 2 sees a cut: without offsets both read the place of the cell that asks, in the whole image."""
    seen, point = subject(build(PIIP), draw(300, 200), region=(100, 100, 160, 140)), (130.0, 120.0)
    for module in seen.network.modules():
        if isinstance(module, DeformableCrossAttention):
            torch.nn.init.zeros_(module.offsets.weight)
            torch.nn.init.zeros_(module.offsets.bias)
    for one in sampled(seen, point):
        target = seen.views[one.target]
        left, top, right, bottom = target.box
        height, width = (bottom - top) / target.grid[0], (right - left) / target.grid[1]
        middle = torch.tensor([left + (one.cell[1] + 0.5) * width, top + (one.cell[0] + 0.5) * height])
        assert one.places is not None
        torch.testing.assert_close(one.places, middle.expand(4, 4, 2), atol=0.01, rtol=0)
    outside = sampled(seen, (10.0, 10.0))
    assert {one.target for one in outside} == {0}  # branch 2 does not show that point


def test_regular_cross_attention_reads_every_cell(build: Build, draw: Draw) -> None:
    regular = replace(PIIP, interaction=InteractionConfig(attention="regular", num_heads=4))
    seen = subject(build(regular), draw(128, 128))
    found = sampled(seen, (70.0, 20.0))
    assert [one.places for one in found] == [None] * 4
    for one in found:
        assert one.weights.shape == (4, *seen.views[one.source].grid)
        torch.testing.assert_close(one.weights.sum((1, 2)), torch.ones(4))


def test_centres_of_cells_become_source_pixels() -> None:
    view = View(name="one", size=(32, 64), box=(10, 20, 90, 60), grid=(2, 4))
    places = to_source(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 1.0]), (2, 4), view)
    assert places.tolist() == [[20, 30], [80, 50]]


def test_one_branch_reads_nobody(build: Build, draw: Draw) -> None:
    assert sampled(subject(build(PLAIN), draw(64, 64)), (1.0, 1.0)) == []
