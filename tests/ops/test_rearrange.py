"""Tokens, maps and windows."""

from __future__ import annotations

import pytest
import torch

from stepwell.ops.rearrange import map_to_tokens, merge_windows, split_windows, tokens_to_map


def test_map_holds_token_r_times_width_plus_c_at_row_r_column_c():
    tokens = torch.arange(15.0).view(1, 15, 1)
    assert tokens_to_map(tokens, (3, 5))[0, 0, 2, 1] == 11
    assert torch.equal(map_to_tokens(tokens_to_map(tokens, (3, 5))), tokens)


@pytest.mark.parametrize(
    ("size", "window"), [((4, 6), 2), ((5, 7), 3), ((1, 9), 4), ((2, 3), 14), ((4, 6), 4), ((6, 4), 4)]
)
def test_merge_windows_inverts_split_windows(size, window):
    tokens = torch.randn(2, size[0] * size[1], 3)
    windows = split_windows(tokens, size, window)
    assert windows.shape[1:] == (window * window, 3)
    assert torch.equal(merge_windows(windows, size, window), tokens)


def test_windows_start_top_left_and_pad_right_and_bottom_with_zeros():
    tokens = torch.arange(1.0, 10.0).view(1, 9, 1)  # 1 2 3 / 4 5 6 / 7 8 9
    windows = split_windows(tokens, (3, 3), 2)[..., 0]
    assert windows.tolist() == [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]


def test_a_divided_grid_is_only_viewed_and_padding_is_what_was_asked_for():
    tokens = torch.arange(1.0, 7.0).view(1, 6, 1)
    windows = split_windows(tokens, (2, 3), 2, padding=torch.tensor([9.0]))[..., 0]
    assert windows.tolist() == [[1, 2, 4, 5], [3, 9, 6, 9]]
