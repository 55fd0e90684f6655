"""Every pixel belongs to one object, or to none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stepwell.heads.instances import instance_map, region_of
from stepwell.structures import FoundObjects


def paste(masks, boxes, size):
    """Bilinear, zero outside, pixel centres at half coordinates, as detectors paste masks."""
    (rows, cols), (x1, y1, x2, y2) = size, boxes.T[..., None]
    x = ((torch.arange(cols) + 0.5) - x1) / (x2 - x1) * 2 - 1
    y = ((torch.arange(rows) + 0.5) - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, cols)], dim=-1)
    return F.grid_sample(masks[:, None], grid.float(), align_corners=False)[:, 0]


def found(boxes, scores, masks=None):
    masks = torch.ones(len(boxes), 4, 4) if masks is None else masks
    labels = torch.arange(len(boxes)) + 7
    return FoundObjects(torch.tensor(boxes).view(-1, 4).float(), torch.tensor(scores), labels, masks)


def test_the_better_object_has_the_pixels_that_two_share():
    two = found([[0, 0, 4, 4], [2, 0, 8, 4]], [0.6, 0.9])
    segmentation, segments = instance_map(two, (4, 10), overlap_mask_area_threshold=0.4)
    assert segmentation.dtype == torch.int32
    assert segmentation.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, -1, -1]] * 4
    assert segments == [
        {"id": 0, "label_id": 7, "was_fused": False, "score": 0.6},
        {"id": 1, "label_id": 8, "was_fused": False, "score": 0.9},
    ]


def test_an_object_of_which_too_little_is_left_is_left_out():
    three = found([[0, 0, 4, 4], [2, 0, 8, 4], [8, 0, 10, 4]], [0.6, 0.9, 0.5])
    segmentation, segments = instance_map(three, (4, 10), overlap_mask_area_threshold=0.5)
    assert segmentation.tolist() == [[-1, -1, 0, 0, 0, 0, 0, 0, 1, 1]] * 4
    assert [segment["label_id"] for segment in segments] == [8, 9]


def test_probability_counts_beside_the_score():
    masks = torch.ones(2, 4, 4)
    masks[1] = 0.6
    segmentation, _ = instance_map(found([[0, 0, 4, 4]] * 2, [0.6, 0.9], masks), (4, 4))
    assert (segmentation == 0).all()


def test_all_masks_at_once_give_the_same_map():
    torch.manual_seed(0)
    corners = torch.rand(12, 2) * 40 - 5
    boxes = torch.cat([corners, corners + 3 + torch.rand(12, 2) * 25], dim=1)
    one = FoundObjects(boxes, torch.rand(12), torch.arange(12), torch.rand(12, 7, 7))
    for threshold in (0.5, 0.2):
        segmentation, segments = instance_map(
            one, (37, 45), mask_threshold=threshold, overlap_mask_area_threshold=0.3
        )
        pasted = paste(one.masks, boxes, (37, 45))
        inside = pasted >= threshold
        strength, owner = torch.where(inside, pasted * one.scores[:, None, None], 0).max(0)
        owner[strength == 0] = -1
        kept = [k for k in range(12) if 0 < (owner == k).sum() > 0.3 * inside[k].sum()]
        assert [segment["label_id"] for segment in segments] == kept
        for number, k in enumerate(kept):
            assert torch.equal(segmentation == number, owner == k)
    assert len(kept) < 12


@pytest.mark.parametrize("box", [[20, 20, 30, 30], [-9, -9, -3, -3], [2, 2, 2, 2]])
def test_an_object_without_a_pixel_is_left_out(box):
    segmentation, segments = instance_map(found([box], [0.9]), (8, 8))
    assert (segmentation == -1).all()
    assert segments == []


def test_no_object_at_all():
    segmentation, segments = instance_map(found([], [], torch.ones(0, 4, 4)), (3, 5))
    assert (segmentation.shape, segments) == ((3, 5), [])
    assert (segmentation == -1).all()


def test_detections_without_masks_are_refused():
    with pytest.raises(ValueError, match="mask head"):
        instance_map(found([[0, 0, 4, 4]], [0.9])._replace(masks=None), (4, 4))


def test_a_region_is_a_cell_wider_than_its_box_and_within_the_image():
    assert region_of([10.5, 20.0, 38.5, 76.0], 28, (100, 100)) == (18, 9, 78, 40)
    assert region_of([-5.0, 90.0, 200.0, 99.5], 28, (100, 100)) == (89, 0, 100, 100)
