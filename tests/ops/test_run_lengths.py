import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell.ops.run_lengths import compressed, label_runs, mask_runs
from stepwell.ops.sliding_windows import Window

coco = pytest.importorskip("faster_coco_eval.core.mask")


def decoded(counts, size):
    return coco.decode({"size": list(size), "counts": compressed(counts).encode()}).astype(bool)


def test_counts_go_down_the_columns_and_begin_outside():
    mask = np.array([[False, True], [True, True]])
    assert mask_runs(mask, Window(0, 0, 2, 2), (2, 2)).tolist() == [1, 3]
    assert mask_runs(mask[:, 1:], Window(1, 1, 3, 2), (3, 3)).tolist() == [4, 2, 3]
    assert mask_runs(mask[:0], Window(1, 1, 1, 3), (3, 3)).tolist() == [9]


@given(st.integers(0, 2**32 - 1), st.tuples(st.integers(1, 90), st.integers(1, 90)), st.floats(0, 1))
def test_masks_come_back_from_the_text_of_coco(seed, size, share):
    random = np.random.default_rng(seed)
    top, left = (int(random.integers(side)) for side in size)
    bottom, right = (int(random.integers(low, side)) + 1 for low, side in zip((top, left), size, strict=True))
    whole = np.zeros(size, bool)
    whole[top:bottom, left:right] = random.random((bottom - top, right - left)) < share
    window = Window(top, left, bottom, right)
    assert (decoded(mask_runs(whole[top:bottom, left:right], window, size), size) == whole).all()


def test_a_long_run_takes_several_characters():
    mask = np.zeros((3000, 2000), bool)
    mask[17:2900, 3:1990] = True
    assert (decoded(mask_runs(mask, Window(0, 0, 3000, 2000), mask.shape), mask.shape) == mask).all()


def test_every_class_of_a_map_has_its_runs():
    labels = np.random.default_rng(0).integers(0, 4, (23, 17)).astype(np.uint8)
    labels[:, :5] = 1
    runs = label_runs(labels, 6)
    for label in range(6):
        assert (decoded(runs[label], labels.shape) == (labels == label)).all()
