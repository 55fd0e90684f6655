"""Matching and losses of DINO: against torchvision, and against all pairings there are."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from stepwell.heads.dino_boxes import to_centres, to_corners
from stepwell.heads.dino_matching import (
    BoxTerms,
    Truths,
    assign,
    average_over_processes,
    costs,
    focal_loss,
    set_losses,
)
from stepwell.ops.boxes import paired_giou
from stepwell.structures import Extent, Objects

TERMS = BoxTerms(label=2.0)


def random_corners(count, *, generator=None, scale=1.0):
    corners = torch.rand(count, 2, 2, dtype=torch.float64, generator=generator).sort(1).values
    return corners.flatten(1) * scale


def make(counts=(2, 0, 3), queries=4, sets=2, classes=3):
    """Predictions (S, B, Q, ...) and truths of images of 40 x 60."""
    generator = torch.Generator().manual_seed(len(counts))
    logits = torch.randn(sets, len(counts), queries, classes, dtype=torch.float64, generator=generator)
    boxes = torch.stack(
        [to_centres(random_corners(len(counts) * queries, generator=generator)) for _ in range(sets)]
    ).view(sets, len(counts), queries, 4)
    objects = [
        Objects(
            random_corners(n, generator=generator, scale=40.0),
            torch.randint(classes, (n,), generator=generator),
        )
        for n in counts
    ]
    extents = [Extent((40, 60), (48, 64))] * len(counts)
    return logits, boxes, Truths.of(extents, objects, like=logits)


def test_generalised_iou_is_torchvisions():
    a, b = random_corners(7, scale=30.0), random_corners(5, scale=30.0)
    torch.testing.assert_close(paired_giou(a[:, None], b), generalized_box_iou(a, b))
    assert paired_giou(torch.zeros(4), torch.zeros(4)).isfinite()


def test_corners_and_centres_undo_each_other():
    boxes = random_corners(5)
    torch.testing.assert_close(to_corners(to_centres(boxes)), boxes)


def test_focal_loss_is_torchvisions():
    logits, wanted = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6, 3)).double()
    for alpha, gamma in ((0.25, 2.0), (0.6, 1.5)):
        torch.testing.assert_close(
            focal_loss(logits, wanted, alpha=alpha, gamma=gamma),
            sigmoid_focal_loss(logits, wanted, alpha, gamma),
        )


def test_a_cost_is_what_the_loss_would_save():
    """Of the label: the focal loss as positive less the one as negative, by its gamma and alpha."""
    logits, boxes, truths = make(counts=(3,))
    terms = BoxTerms(label=1.5, box=0.5, giou=3.0, alpha=0.4, gamma=1.5)
    label, box, giou = costs(logits[0, 0], boxes[0, 0], truths, terms)
    ones = torch.ones_like(logits[0, 0])
    saved = focal_loss(logits[0, 0], ones, alpha=0.4, gamma=1.5) - focal_loss(
        logits[0, 0], 0 * ones, alpha=0.4, gamma=1.5
    )
    torch.testing.assert_close(label, 1.5 * saved[:, truths.labels])
    scale = torch.tensor([60.0, 40, 60, 40], dtype=torch.float64)
    away = (boxes[0, 0][:, None] - to_centres(truths.boxes / scale)).abs().sum(-1)
    torch.testing.assert_close(box, 0.5 * away)
    pixels = to_corners(boxes[0, 0]) * scale
    torch.testing.assert_close(giou, -3 * generalized_box_iou(pixels, truths.boxes))


def test_no_other_pairing_is_cheaper():
    logits, boxes, truths = make()
    assigned = assign(logits, boxes, truths, TERMS)
    assert (assigned[:, 1] == -1).all()
    first = 0
    for image, of_image in enumerate(truths.by_image()):
        count = of_image.counts[0]
        for s in range(2):
            if not count:
                continue
            cost = sum(costs(logits[s, image], boxes[s, image], of_image, TERMS))
            best = min(
                itertools.permutations(range(4), count),
                key=lambda queries: sum(cost[q, n] for n, q in enumerate(queries)),
            )
            expected = torch.full((4,), -1)
            expected[list(best)] = torch.arange(count) + first
            assert torch.equal(assigned[s, image], expected)
        first += count


def test_fewer_queries_than_objects_all_get_one():
    logits, boxes, truths = make(counts=(6,))
    assigned = assign(logits, boxes, truths, TERMS)
    assert all(len(set(row.tolist()) - {-1}) == 4 for row in assigned[:, 0])


def test_losses_of_every_set_are_sums_over_its_pairs():
    logits, boxes, truths = make()
    assigned = assign(logits, boxes, truths, TERMS)
    losses = set_losses(logits, boxes, assigned, truths, TERMS, torch.tensor(5.0))
    scale = torch.tensor([60.0, 40, 60, 40], dtype=torch.float64)
    for s in range(2):
        wanted = torch.zeros_like(logits[s])
        box = giou = 0.0
        for image, query in (assigned[s] >= 0).nonzero().tolist():
            n = assigned[s, image, query]
            wanted[image, query, truths.labels[n]] = 1
            found, right = boxes[s, image, query], truths.boxes[n]
            box += (found - to_centres(right / scale)).abs().sum()
            giou += 1 - generalized_box_iou(to_corners(found)[None] * scale, right[None])[0, 0]
        label = sigmoid_focal_loss(logits[s], wanted, 0.25, 2.0).sum()
        torch.testing.assert_close(
            torch.stack([x[s] for x in losses]), torch.stack([2 * label, 5 * box, 2 * giou]) / 5
        )


def test_no_objects_cost_labels_alone():
    logits, boxes, truths = make(counts=(0, 0))
    assigned = assign(logits, boxes, truths, TERMS)
    label, box, giou = set_losses(logits, boxes, assigned, truths, TERMS, torch.tensor(1.0))
    assert (label > 0).all()
    assert box.tolist() == giou.tolist() == [0, 0]


def test_counts_are_averaged_over_processes_and_one_is_the_least(monkeypatch):
    counts = torch.tensor([6.0, 0.0])
    assert average_over_processes(counts).tolist() == [6, 1]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x: x.add_(torch.tensor([4.0, 2.0])))
    assert average_over_processes(counts).tolist() == [2.5, 1]
    assert counts.tolist() == [6, 0]


def test_predictions_that_are_no_numbers_are_told_as_such():
    logits, boxes, truths = make()
    with pytest.raises(ValueError, match="the training has diverged"):
        assign(logits * float("nan"), boxes, truths, TERMS)


def test_without_scipy_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'stepwell\[detect\]'"):
        assign(*make(), TERMS)
