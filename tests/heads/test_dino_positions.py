"""Cells, proposals and sine codes of a padded batch, worked out by hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from stepwell.heads.dino_boxes import inverse_sigmoid
from stepwell.heads.dino_positions import (
    box_code,
    cell_centres,
    cell_code,
    level_geometry,
    proposals,
    sine_code,
)
from stepwell.structures import Extent

EXTENTS = [Extent((20, 30), (24, 32)), Extent((24, 9), (24, 16)), Extent((7, 32), (8, 32))]
SIZES = [(6, 8), (3, 4), (2, 2)]


def make_levels(sizes=SIZES, extents=EXTENTS):
    return level_geometry(sizes, extents, dtype=torch.float64, device=torch.device("cpu"))


def padding_by_nearest(size):
    """At the pixels of the batch, resized as a map is."""
    padding = torch.ones(len(EXTENTS), 24, 32)
    for image, extent in zip(padding, EXTENTS, strict=True):
        image[: extent.valid[0], : extent.valid[1]] = 0
    return F.interpolate(padding[None], size)[0].bool()


def test_padding_is_that_of_the_batch_in_pixels_resized_to_every_level():
    levels = make_levels([*SIZES, (5, 7)])
    expected = [padding_by_nearest(size) for size in levels.sizes]
    assert torch.equal(levels.padding, torch.cat([p.flatten(1) for p in expected], 1))
    for level, padding in enumerate(expected):
        assert levels.counts[:, level, 0].tolist() == (~padding[:, 0]).sum(1).tolist()  # columns
        assert levels.counts[:, level, 1].tolist() == (~padding[:, :, 0]).sum(1).tolist()


def test_images_without_padding_have_no_mask():
    assert make_levels(extents=[Extent((24, 32), (24, 32))] * 2).padding is None


def test_centres_are_fractions_of_the_valid_cells():
    x, y = cell_centres(make_levels())
    assert x.shape == y.shape == (3, 48 + 12 + 4)
    # The second image shows 3 of 8 columns and 6 of 6 rows of the finest level.
    assert x[1, :8].tolist() == [(col + 0.5) / 3 for col in range(8)]
    assert y[1, :48:8].tolist() == [(row + 0.5) / 6 for row in range(6)]
    assert x[0, 48:52].tolist() == [(col + 0.5) / 4 for col in range(4)]


def test_proposals_are_boxes_around_cells_and_none_near_a_border_or_in_padding():
    levels = make_levels([(60, 3), (2, 2)], [Extent((60, 3), (60, 3)), Extent((60, 2), (60, 3))])
    logits, none = proposals(levels)
    boxes = logits.sigmoid()
    torch.testing.assert_close(
        boxes[0, 3], torch.tensor([0.5 / 3, 1.5 / 60, 0.05, 0.05], dtype=torch.float64)
    )
    torch.testing.assert_close(boxes[0, -4], torch.tensor([0.25, 0.25, 0.1, 0.1], dtype=torch.float64))
    assert none[0, :3].all()  # half of a row of sixty is nearer than a hundredth
    assert none[0, 177:180].all()
    assert not none[0, 3:177].any()
    assert none[1, 2:180:3].all()  # padding
    assert logits[none].isinf().all()
    assert logits[~none].isfinite().all()


def test_a_sine_code_is_pairs_of_sine_and_cosine_of_slower_and_slower_angles():
    code = sine_code(torch.tensor([0.7], dtype=torch.float64), 6, temperature=100.0)[0]
    expected = [f(0.7 / 100.0 ** (2 * pair / 6)) for pair in range(3) for f in (math.sin, math.cos)]
    torch.testing.assert_close(code, torch.tensor(expected, dtype=torch.float64))


def test_cells_are_told_by_counting_valid_rows_then_columns():
    """By two-dimensional sums over the padding, as the official code does."""
    levels = make_levels()
    code = cell_code(levels, 8, temperature=20.0)
    first = 0
    for size in SIZES:
        valid = (~padding_by_nearest(size)).double()
        halves = []
        for axis in (1, 2):
            count = valid.cumsum(axis)
            last = count.narrow(axis, size[axis - 1] - 1, 1)
            halves.append(sine_code(count / (last + 1e-6) * 2 * math.pi, 4, temperature=20.0))
        cells = size[0] * size[1]
        expected = torch.cat(halves, -1).flatten(1, 2)
        torch.testing.assert_close(code[:, first : first + cells], expected)
        first += cells


def test_a_box_is_told_as_y_x_width_height():
    box = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]], dtype=torch.float64)
    code = box_code(box, 4, temperature=50.0)
    expected = [sine_code(torch.tensor(2 * math.pi * v), 4, temperature=50.0) for v in (0.2, 0.1, 0.3, 0.4)]
    torch.testing.assert_close(code[0, 0], torch.cat(expected).double(), rtol=1e-5, atol=1e-6)


def test_logits_stop_at_a_thousandth_from_either_end():
    x = torch.tensor([-1, 0, 0.25, 1, 2], dtype=torch.float64)
    end = math.log(1 / 0.001)
    torch.testing.assert_close(
        inverse_sigmoid(x), torch.tensor([-end, -end, math.log(1 / 3), end, end], dtype=torch.float64)
    )
