"""A window slides over an image; every pixel has the mean of the windows that see it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stepwell.heads import sliding
from stepwell.heads.sliding import class_map, slide
from stepwell.ops.sliding_windows import windows


def test_the_last_window_ends_at_the_border():
    seen = windows((80, 107), (64, 64), (43, 43))
    assert seen == [(0, 0, 64, 64), (0, 43, 64, 107), (16, 0, 80, 64), (16, 43, 80, 107)]
    assert windows((64, 107), (64, 64), (43, 43))[-1] == (0, 43, 64, 107)
    assert windows((64, 108), (64, 64), (43, 43))[-2:] == [(0, 43, 64, 107), (0, 44, 64, 108)]


def test_a_short_side_makes_a_smaller_window():
    assert windows((48, 100), (64, 64), (43, 43)) == [(0, 0, 48, 64), (0, 36, 48, 100)]
    assert windows((5, 7), (64, 64), (43, 43)) == [(0, 0, 5, 7)]


side = st.integers(1, 60)


@given(height=side, width=side, crop=st.tuples(side, side), share=st.floats(0.1, 1))
def test_windows_cover_everything_as_the_official_count_says(height, width, crop, share):
    stride = tuple(max(1, int(share * c)) for c in crop)
    seen = windows((height, width), crop, stride)
    covered = torch.zeros(height, width, dtype=torch.bool)
    for top, left, bottom, right in seen:
        covered[top:bottom, left:right] = True
    assert covered.all()
    assert {(w.bottom - w.top, w.right - w.left) for w in seen} == {
        (min(height, crop[0]), min(width, crop[1]))
    }
    counts = [
        max(length - c + s - 1, 0) // s + 1
        for length, c, s in zip((height, width), crop, stride, strict=True)
    ]
    assert len(seen) == len(set(seen)) == counts[0] * counts[1]


@pytest.mark.parametrize("stride", [(5, 4), (0, 4), (4, -1)])
def test_a_stride_that_leaves_gaps_is_refused(stride):
    with pytest.raises(ValueError, match="move by 1 to as many pixels"):
        windows((10, 10), (4, 4), stride)


def test_overlaps_are_averaged():
    image = torch.zeros(1, 3, 4, 6)
    calls = iter([1.0, 2.0, 5.0])
    logits = slide(
        lambda views: torch.full((1, 1, *views.shape[-2:]), next(calls)),
        image,
        crop=(4, 3),
        stride=(4, 2),
        most=1,
    )
    assert logits[0, 0, 0].tolist() == [1, 1, 1.5, 3.5, 3.5, 5]


@pytest.mark.parametrize("most", [1, 3, 100])
def test_windows_of_all_images_share_passes(most):
    image = torch.randn(2, 3, 11, 14, dtype=torch.float64)
    batches = []

    def run(views):
        batches.append(len(views))
        return views.cumsum(-1)[:, :2]  # depends on where the window starts

    logits = slide(run, image, crop=(6, 6), stride=(5, 4), most=most)
    total, count = torch.zeros(2, 2, 11, 14, dtype=torch.float64), torch.zeros(11, 14)
    for top, left, bottom, right in windows((11, 14), (6, 6), (5, 4)):
        total[..., top:bottom, left:right] += image[:, :2, top:bottom, left:right].cumsum(-1)
        count[top:bottom, left:right] += 1
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, total / count)
    assert batches[0] == min(most, 12)
    assert sum(batches) == 12


def test_half_precision_is_averaged_in_single():
    image = torch.full((1, 3, 1, 100), 1.0078125)  # which bfloat16 holds; its multiples it does not
    logits = slide(lambda views: views.bfloat16(), image, crop=(1, 40), stride=(1, 1))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, image)


def test_logits_of_another_size_than_the_window_are_refused():
    with pytest.raises(ValueError, match=r"as large as the window, \(4, 4\), got \(2, 2\)"):
        slide(lambda views: views[..., ::2, ::2], torch.zeros(1, 3, 8, 8), crop=(4, 4), stride=(4, 4))


@pytest.mark.parametrize("values", [1, 5000, 2**26])
@pytest.mark.parametrize("size", [(13, 17), (40, 31)])
def test_classes_are_those_of_the_resized_probabilities(values, size, monkeypatch):
    monkeypatch.setattr(sliding, "MOST_VALUES", values)
    logits = torch.randn(2, 9, 8, 6)
    expected = F.interpolate(logits, size, mode="bilinear").softmax(1).argmax(1)
    classes = class_map(logits, size)
    assert classes.dtype == torch.int64
    assert torch.equal(classes, expected)


def test_the_first_of_equal_classes_is_taken(monkeypatch):
    monkeypatch.setattr(sliding, "MOST_VALUES", 1)
    assert class_map(torch.ones(1, 3, 2, 2), (2, 2)).max() == 0
