"""Frames along lines, and the head that reads them."""

from __future__ import annotations

import torch

from stepwell.reader.line_head import ALPHABET, Frames, LineHead, frame_loss, frames_along
from stepwell.reader.page import Line


def frames_of(points, heights, classes):
    return Frames(points=points, heights=heights, classes=classes)


LINE = Line(text="A B", box=(10, 40, 34, 60), edges=(10, 20, 24, 34))


def test_frames_name_the_character_under_them():
    frames = frames_along([LINE], (100, 200), step=4)
    said = "".join("-" if not number else ALPHABET[number - 1] for number in frames["classes"].tolist())
    assert said == "AA-BBB"
    torch.testing.assert_close(frames["points"][:, 0] * 200, torch.arange(12.0, 33, 4))
    torch.testing.assert_close(frames["points"][:, 1], torch.full((6,), 0.5))
    torch.testing.assert_close(frames["heights"], torch.full((6,), 0.2))


def test_lines_with_guessed_edges_give_no_frames():
    guessed = Line(text="AB", box=(0, 0, 20, 10), edges=(0, 10, 20), exact=False)
    assert len(frames_along([guessed], (10, 20), step=4)["classes"]) == 0


def test_a_frame_sees_the_cells_of_its_own_row_and_column_only():
    head = LineHead(8, num_classes=5)
    tokens = torch.randn(6 * 10, 8, requires_grad=True)
    at = frames_of(torch.tensor([[0.35, 0.25]]), torch.tensor([0.1]), torch.tensor([2]))
    head(tokens, (6, 10), at).sum().backward()
    seen = tokens.grad.abs().sum(1).unflatten(0, (6, 10)).nonzero().tolist()
    assert seen == [[1, 3]]  # y = 0.25 of six rows is the middle of row 1


def test_a_frame_between_two_rows_blends_them():
    head = LineHead(8, num_classes=5)
    tokens = torch.randn(6 * 10, 8, requires_grad=True)
    between = frames_of(torch.tensor([[0.35, 2 / 6]]), torch.tensor([0.1]), torch.tensor([2]))
    head(tokens, (6, 10), between).sum().backward()
    assert tokens.grad.abs().sum(1).unflatten(0, (6, 10)).nonzero().tolist() == [[1, 3], [2, 3]]


def test_strips_of_one_cell_are_read_apart():
    head = LineHead(8, num_classes=5, num_columns=4)
    tokens = torch.randn(1, 8)
    x = torch.tensor([0.05, 0.2, 0.3, 0.6, 0.9])
    frames = frames_of(torch.stack([x, torch.full_like(x, 0.5)], 1), torch.ones(5), torch.zeros(5).long())
    logits = head(tokens, (1, 1), frames)
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])
    assert len({tuple(row) for row in logits.tolist()}) == 4


def test_places_on_the_border_are_inside_the_grid():
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    frames = frames_of(corners, torch.ones(3), torch.zeros(3).long())
    assert LineHead(8)(torch.randn(6, 8), (2, 3), frames).isfinite().all()
    assert LineHead(8)(torch.randn(3, 8), (1, 3), frames).isfinite().all()


def test_the_head_learns_to_read_cells():
    torch.manual_seed(0)
    tokens = torch.randn(30, 16)
    points = torch.rand(60, 2)
    classes = ((points[:, 1] * 5).long() * 6 + (points[:, 0] * 6).long()) % 4
    middle = torch.stack([points[:, 0], ((points[:, 1] * 5).long() + 0.5) / 5], 1)
    frames = frames_of(middle, torch.full((60,), 0.2), classes)
    head = LineHead(16, num_classes=4)
    optimiser = torch.optim.Adam(head.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        loss = frame_loss(head, tokens, (5, 6), frames)
        loss.backward()
        optimiser.step()
    assert loss < 0.1
