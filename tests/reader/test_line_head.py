"""Frames along lines, and the head that reads them."""

from __future__ import annotations

from itertools import groupby, product

import torch

from stepwell.reader.line_head import (
    ALPHABET,
    Frames,
    LineHead,
    ctc_loss,
    frame_loss,
    frames_along,
    spelled_along,
)
from stepwell.reader.page import Line


def frames_of(points, heights, classes):
    return Frames(points=points, heights=heights, classes=classes)


LINE = Line(text="A B", box=(10, 40, 34, 60), edges=(10, 20, 24, 34))


def test_frames_name_the_character_under_them():
    frames = frames_along([LINE], (0, 0, 200, 100), step=4)
    said = "".join("-" if not number else ALPHABET[number - 1] for number in frames["classes"].tolist())
    assert said == "AA-BBB"
    torch.testing.assert_close(frames["points"][:, 0] * 200, torch.arange(12.0, 33, 4))
    torch.testing.assert_close(frames["points"][:, 1], torch.full((6,), 0.5))
    torch.testing.assert_close(frames["heights"], torch.full((6,), 0.2))


def test_lines_with_guessed_edges_give_no_frames():
    guessed = Line(text="AB", box=(0, 0, 20, 10), edges=(0, 10, 20), exact=False)
    assert len(frames_along([guessed], (0, 0, 20, 10), step=4)["classes"]) == 0


def test_a_frame_sees_its_column_over_the_height_of_its_line():
    head = LineHead(8, num_classes=5)
    for height, rows in ((0.01, [1]), (0.4, [0, 1, 2])):  # y = 0.25 of six rows is the middle of row 1
        tokens = torch.randn(6 * 10, 8, requires_grad=True)
        at = frames_of(torch.tensor([[0.35, 0.25]]), torch.tensor([height]), torch.tensor([2]))
        head(tokens, (6, 10), at).sum().backward()
        seen = tokens.grad.abs().sum(1).unflatten(0, (6, 10)) > 1e-4
        assert seen.nonzero()[:, 1].unique().tolist() == [3]
        assert set(rows) <= set(seen[:, 3].nonzero()[:, 0].tolist())


def test_a_place_between_two_rows_blends_them():
    head = LineHead(8, num_classes=5)
    tokens = torch.zeros(6, 10, 8)
    tokens[1], tokens[2] = 1.0, 3.0
    between = frames_of(torch.tensor([[0.35, 2 / 6]]), torch.tensor([0.0]), torch.tensor([2]))
    same = torch.full_like(tokens, 2.0)
    torch.testing.assert_close(
        head(tokens.flatten(0, 1), (6, 10), between), head(same.flatten(0, 1), (6, 10), between)
    )


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


def test_frames_of_a_part_of_an_image_are_those_within():
    cut = (16, 20, 66, 80)
    frames = frames_along([LINE], cut, step=4)
    torch.testing.assert_close(frames["points"][:, 0] * 50 + 16, torch.tensor([16.0, 20, 24, 28, 32]))
    torch.testing.assert_close(frames["points"][:, 1] * 60 + 20, torch.full((5,), 50.0))
    torch.testing.assert_close(frames["heights"] * 60, torch.full((5,), 20.0))
    assert len(frames_along([LINE], (0, 50, 200, 100), step=4)["points"]) == 0  # half of the line is cut off


def test_lines_with_guessed_edges_give_frames_where_they_are_asked_for():
    guessed = Line(text="AB", box=(0, 0, 20, 10), edges=(0, 10, 20), exact=False)
    frames = frames_along([guessed], (0, 0, 20, 10), step=4, spread=True)
    assert [ALPHABET[number - 1] for number in frames["classes"].tolist()] == [*"AABBB"]


def test_lines_are_spelled_without_blanks_and_what_is_not_in_the_alphabet():
    second = Line(text="\u00e9!!", box=(50, 40, 80, 60), edges=(50, 60, 70, 80), exact=False)
    spelled = spelled_along([LINE, second], (0, 0, 200, 100), step=4)
    assert spelled["lengths"].tolist() == [6, 7]
    assert "".join(ALPHABET[number - 1] for number in spelled["targets"].tolist()) == "AB!!"
    assert spelled["target_lengths"].tolist() == [2, 2]


def test_lines_that_do_not_fit_are_left_out():
    narrow = Line(text="!!!", box=(0, 40, 16, 60), edges=(0, 5, 10, 16), exact=False)  # 4 frames, 5 needed
    cut_off = (20, 0, 200, 100)
    assert len(spelled_along([narrow], (0, 0, 200, 100), step=4)["lengths"]) == 0
    assert len(spelled_along([LINE], cut_off, step=4)["lengths"]) == 1  # by half its height at most
    assert len(spelled_along([LINE], (24, 0, 200, 100), step=4)["lengths"]) == 0


def test_the_loss_of_a_line_is_that_of_its_text_alone():
    torch.manual_seed(0)
    head, tokens = LineHead(8), torch.randn(60, 8)
    lines = [LINE, Line(text="CAB", box=(60, 10, 100, 30), edges=(60, 70, 90, 100), exact=False)]
    both = ctc_loss(head, tokens, (6, 10), spelled_along(lines, (0, 0, 200, 100), step=4))
    each = [
        ctc_loss(head, tokens, (6, 10), spelled_along([line], (0, 0, 200, 100), step=4)) for line in lines
    ]
    torch.testing.assert_close(both, torch.stack(each).mean())
    logits = head(tokens, (6, 10), spelled_along([LINE], (0, 0, 200, 100), step=4), spelled=True)
    paths = logits.double().softmax(1)
    a, b = (ALPHABET.index(character) + 1 for character in "AB")
    likelihood = sum(
        torch.stack([paths[i, step] for i, step in enumerate(path)]).prod()
        for path in product((0, a, b), repeat=6)
        if [step for step, _ in groupby(path) if step] == [a, b]
    )
    torch.testing.assert_close(each[0].double(), -likelihood.log() / 2, rtol=1e-4, atol=1e-4)
