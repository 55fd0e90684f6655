"""Which object a box has to find, and which boxes are drawn."""

from __future__ import annotations

import pytest
import torch

from stepwell.heads.assign import BACKGROUND, NEITHER, Assignment, Sampling

OBJECTS = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 3], [20, 0, 30, 4], [50, 50, 60, 60]])
RPN = Assignment(positive=0.7, negative=0.3, smallest=0.3, low_quality=True)


def test_thresholds_leave_boxes_out_and_every_object_takes_its_best():
    assert RPN(BOXES, OBJECTS).tolist() == [0, NEITHER, NEITHER, 1, BACKGROUND]
    strict = Assignment(positive=0.5, negative=0.5, smallest=0.5, low_quality=False)
    assert strict(BOXES, OBJECTS).tolist() == [0, 0, BACKGROUND, BACKGROUND, BACKGROUND]


def test_of_two_objects_that_tie_for_a_box_the_last_takes_it():
    assert RPN(BOXES[:1], OBJECTS[[0, 0]]).tolist() == [1]


def test_all_boxes_that_tie_are_taken():
    assert RPN(BOXES[[3, 3, 4]], OBJECTS[1:]).tolist() == [0, 0, BACKGROUND]


def test_without_objects_all_is_background():
    assert RPN(BOXES, OBJECTS[:0]).tolist() == [BACKGROUND] * 5
    assert len(RPN(BOXES[:0], OBJECTS)) == 0


ASSIGNED = torch.tensor([BACKGROUND] * 40 + [3] * 20 + [NEITHER] * 5)


@pytest.mark.parametrize("choice", ["random", "first"])
def test_a_sample_has_its_number_and_share(choice):
    sample = Sampling(num=16, positive=0.25, choice=choice)(ASSIGNED)
    assert len(sample.positive) == 4
    assert len(sample.negative) == 12
    assert (ASSIGNED[sample.positive] == 3).all()
    assert (ASSIGNED[sample.negative] == BACKGROUND).all()
    assert sample.objects.tolist() == [3] * 4
    assert (sample.places[:4].diff() > 0).all()
    assert (sample.negative.diff() > 0).all()


def test_first_takes_the_first():
    sample = Sampling(num=4, positive=0.5, choice="first")(ASSIGNED)
    assert sample.places.tolist() == [40, 41, 0, 1]


def test_random_follows_the_seed_and_reaches_all():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(Sampling(num=16)(ASSIGNED).places.tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    every = {place for _ in range(60) for place in Sampling(num=16)(ASSIGNED).places.tolist()}
    assert every == set(range(60))


def test_negatives_fill_up_and_may_be_limited():
    few = torch.tensor([0] + [BACKGROUND] * 40)
    assert len(Sampling(num=16)(few).negative) == 15
    assert len(Sampling(num=16, most_negatives=3)(few).negative) == 3
    assert len(Sampling(num=16, most_negatives=3)(few[1:]).negative) == 3
