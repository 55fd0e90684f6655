"""Denoising queries: how many, where they lie, what they are to find and what they may see."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepwell.heads.dino_boxes import to_centres
from stepwell.heads.dino_denoising import Draws, contents, denoising, draw, num_groups, unseen_queries

BOXES = [torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 0.9, 0.5]]), torch.tensor([[0.0, 0.1, 0.4, 1.0]])]
LABELS = [torch.tensor([3, 1]), torch.tensor([2])]


def make(groups=2, *, label_noise=0.0, box_noise=0.0, **changes):
    draws = draw(2 * groups * 3, 5, generator=torch.Generator().manual_seed(0))._replace(**changes)
    return denoising(BOXES, LABELS, draws, groups, label_noise=label_noise, box_noise=box_noise)


@pytest.mark.parametrize(
    ("counts", "num_queries", "groups"),
    [([3, 2], 100, 33), ([2, 0], 9, 4), ([1], 100, 100), ([7, 200], 100, 1), ([0, 0], 100, 1), ([5], 5, 1)],
)
def test_groups_fill_the_queries_of_the_fullest_image_and_one_is_the_least(counts, num_queries, groups):
    assert num_groups(counts, num_queries) == groups


def test_without_noise_every_slot_holds_its_object_and_empty_ones_nothing():
    made = make()
    assert made.labels.tolist() == [[3, 1] * 4, [2, -1] * 4]
    assert made.assigned.tolist() == [[0, 1, -1, -1] * 2, [2, -1, -1, -1] * 2]
    found = made.box_logits.sigmoid()
    torch.testing.assert_close(found[0, :2], to_centres(BOXES[0]))
    torch.testing.assert_close(found[1, 6], to_centres(BOXES[1])[0])
    assert (made.box_logits[1, 1::2] == 0).all()


def test_positives_move_less_than_half_a_box_and_negatives_further_both_inside_the_image():
    half = torch.full((12, 4), 0.5)
    made = make(box_noise=0.4, part=half, sign=torch.tensor([[-1, 1, 1, -1]]).expand(12, 4))
    box = BOXES[0][0]
    for slot, part in ((0, 0.5), (2, 1.5), (4, 0.5), (6, 1.5)):
        moved = box + torch.tensor([-1, 1, 1, -1]) * part * 0.4 * 0.2  # the box has sides of 0.4
        torch.testing.assert_close(made.box_logits[0, slot].sigmoid(), to_centres(moved.clamp(0, 1)))
    far = make(box_noise=9.0, part=half, sign=torch.tensor([[-1, -1, 1, 1]]).expand(12, 4))
    torch.testing.assert_close(
        far.box_logits[0, 0].sigmoid(), torch.tensor([0.5, 0.5, 0.999, 0.999]), atol=1e-4, rtol=0
    )


def test_labels_below_half_the_noise_are_replaced():
    chance = torch.linspace(0, 0.99, 12)
    made = make(label_noise=1.0, label_chance=chance, new_label=torch.full((12,), 4))
    rows = torch.where(chance < 0.5, 4, torch.tensor([3, 1, 2]).repeat(4)).view(4, 3)
    assert made.labels[0].tolist() == rows[:, :2].flatten().tolist()
    assert made.labels[1, ::2].tolist() == rows[:, 2].tolist()


def test_random_numbers_are_drawn_within_their_bounds_and_again_by_a_seed():
    draws, again = (draw(4000, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert sorted(set(draws.new_label.tolist())) == [0, 1, 2]
    assert sorted(set(draws.sign.flatten().tolist())) == [-1, 1]
    for numbers in (draws.label_chance, draws.part):
        assert 0 <= numbers.min() < 0.01
        assert 0.99 < numbers.max() < 1
    assert [tuple(x.shape) for x in draws] == [(4000,), (4000,), (4000, 4), (4000, 4)]


def test_groups_see_themselves_and_the_other_queries_which_see_no_group():
    unseen = unseen_queries(make(groups=2), 3)
    group = torch.tensor([0] * 4 + [1] * 4 + [2] * 3)  # two slots, positive and negative
    expected = torch.tensor([[key != 2 and key != query for key in group] for query in group])
    assert torch.equal(unseen, expected)


def test_an_empty_slot_starts_as_zeros_and_others_as_their_label():
    table = nn.Embedding(5, 4)
    rows = contents(table, make())
    assert torch.equal(rows[0, 0], table.weight[3])
    assert (rows[1, 1::2] == 0).all()


def test_no_objects_at_all_make_no_queries():
    none = [torch.zeros(0, 4)] * 2
    draws = Draws(torch.zeros(0), torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, 4))
    made = denoising(none, [torch.zeros(0).long()] * 2, draws, 1, label_noise=0.5, box_noise=1.0)
    assert made.num_queries == 0
    assert made.box_logits.shape == (2, 0, 4)
    assert not unseen_queries(made, 3).any()
