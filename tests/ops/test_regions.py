"""Boxes that overlap, regions of maps, and masks put into images."""

from __future__ import annotations

import builtins

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, generalized_box_iou, nms

from stepwell.ops import regions
from stepwell.ops.boxes import paired_giou, pairwise_iou
from stepwell.ops.paste import paste
from stepwell.ops.regions import pool_region_levels, pool_regions, region_levels, suppress


def boxes(n, side=100.0, dtype=torch.float32):
    corners = torch.rand(n, 2, dtype=dtype) * side
    return torch.cat([corners, corners + 1 + torch.rand(n, 2, dtype=dtype) * side / 2], dim=1)


def test_overlaps_are_torchvisions():
    a, b = boxes(7), boxes(5)
    torch.testing.assert_close(pairwise_iou(a, b), box_iou(a, b))
    torch.testing.assert_close(paired_giou(a[:5], b), generalized_box_iou(a[:5], b).diagonal())


def test_gradients_of_giou():
    a, b = boxes(4, dtype=torch.float64).requires_grad_(), boxes(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: paired_giou(x, b), a)


@pytest.mark.parametrize("most", [10, 1000])
def test_groups_do_not_meet_however_they_are_looked_at(monkeypatch, most):
    monkeypatch.setattr(regions, "MOST_TOGETHER", most)
    torch.manual_seed(0)
    x, scores, groups = boxes(200), torch.rand(200), torch.randint(0, 4, (200,))
    expected = []
    for group in range(4):
        inside = (groups == group).nonzero()[:, 0]
        expected.append(inside[nms(x[inside], scores[inside], 0.5)])
    expected = torch.cat(expected)
    expected = expected[scores[expected].argsort(descending=True)]
    assert suppress(x, scores, groups, 0.5).tolist() == expected.tolist()
    assert len(expected) < 200


def test_nothing_is_suppressed_of_nothing():
    assert len(suppress(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), 0.5)) == 0


def test_levels_follow_the_strides():
    side = torch.tensor([10.0, 55.9, 56.0, 111.9, 112.1, 448.1, 5000.0])
    x = torch.stack([side * 0, side * 0, side, side], dim=1)
    doubling = torch.floor(torch.log2(side / 56 + 1e-6)).clamp(0, 3).long()
    assert region_levels(x, [4, 8, 16, 32], 56).tolist() == doubling.tolist()
    assert region_levels(x, [4, 16], 56).tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert region_levels(x, [16], 56).tolist() == [0] * 7


def test_regions_of_several_levels_keep_their_order():
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)]
    x, images = boxes(9, 64), torch.randint(0, 2, (9,))
    levels = region_levels(x, [4, 8], 5)
    assert 0 < levels.sum() < 9
    pooled = pool_region_levels(maps, x, images, 5, strides=[4, 8], finest=5)
    for i, level in enumerate(levels.tolist()):
        alone = pool_regions(maps[level], x[i : i + 1], images[i : i + 1], 5, stride=[4, 8][level])
        torch.testing.assert_close(pooled[i], alone[0])


def test_a_linear_map_is_read_at_the_centres_of_cells():
    columns = torch.arange(20.0).expand(1, 1, 20, 20)
    pooled = pool_regions(columns, torch.tensor([[8.0, 8, 40, 40]]), torch.zeros(1).long(), 4, stride=4)
    torch.testing.assert_close(pooled[0, 0, 0], torch.tensor([3.0, 5, 7, 9]) - 0.5)


def test_half_precision_maps_are_read_in_single():
    x = torch.randn(1, 2, 8, 8).bfloat16()
    box, image = torch.tensor([[3.0, 3, 25, 25]]), torch.zeros(1).long()
    pooled = pool_regions(x, box, image, 3, stride=4)
    torch.testing.assert_close(pooled, pool_regions(x.float(), box, image, 3, stride=4).bfloat16())


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_where_torchvision_is_another_releases_it_is_said_which_is_needed(monkeypatch, error):
    """As torch has it, RuntimeError: operator torchvision::nms does not exist."""
    real = builtins.__import__

    def without(name, *rest):
        if name == "torchvision":
            raise error(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=f"need the torchvision of torch {torch.__version__}".replace("+", r"\+")
    ):
        suppress(boxes(2), torch.rand(2), torch.zeros(2).long(), 0.5)


def test_masks_are_pasted_as_grid_sample_reads_them():
    torch.manual_seed(0)
    masks = torch.rand(3, 6, 6)
    x = torch.tensor([[2.3, 1.1, 11.7, 8.2], [-4.0, -3.0, 30.0, 25.0], [14.5, 9.5, 40.0, 12.0]])
    height, width = 14, 21
    pasted = paste(masks, x, (height, width))
    for mask, (x0, y0, x1, y1), ours in zip(masks, x.tolist(), pasted, strict=True):
        across = ((torch.arange(width) + 0.5 - x0) / (x1 - x0) * 2 - 1).expand(height, width)
        down = ((torch.arange(height) + 0.5 - y0) / (y1 - y0) * 2 - 1)[:, None].expand(height, width)
        grid = torch.stack([across, down], dim=-1)[None]
        expected = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
        rows, cols = torch.arange(height), torch.arange(width)
        near = (rows >= int(y0 // 1) - 1) & (rows < -(-y1 // 1) + 1)  # a pixel beyond the box, and no further
        near = near[:, None] & (cols >= int(x0 // 1) - 1) & (cols < -(-x1 // 1) + 1)
        torch.testing.assert_close(ours, expected * near, atol=1e-5, rtol=1e-5)
    marked = paste(masks, x, (height, width), threshold=0.5)
    assert marked.dtype == torch.bool
    assert torch.equal(marked, pasted >= 0.5)


def test_boxes_outside_the_image_leave_nothing():
    assert not paste(torch.ones(1, 4, 4), torch.tensor([[30.0, 30, 40, 40]]), (10, 10)).any()


def test_a_threshold_that_takes_every_pixel_is_refused():
    with pytest.raises(ValueError, match="positive, got 0"):
        paste(torch.ones(1, 4, 4), torch.zeros(1, 4), (10, 10), threshold=0)


def test_equal_scores_stand_as_torch_sorts_them():
    corners = torch.arange(60.0)[:, None] * 20
    apart, scores = torch.cat([corners, corners, corners + 10, corners + 10], 1), torch.ones(60)
    kept = suppress(apart, scores, torch.zeros(60).long(), 0.5)
    assert kept.tolist() == scores.sort(descending=True).indices.tolist()
