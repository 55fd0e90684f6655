"""Two-stage detectors as wholes: batches, strides, precisions, images without anything."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from stepwell.heads.anchors import AnchorConfig
from stepwell.heads.assign import Sampling
from stepwell.heads.box_coder import BoxCoder
from stepwell.heads.box_head import BoxHead, BoxHeadConfig, Selection
from stepwell.heads.box_loss import BoxLoss
from stepwell.heads.cascade import MMDET_CASCADE, CascadeConfig, StageConfig
from stepwell.heads.mask_head import MaskHeadConfig, mask_targets
from stepwell.heads.rcnn import RcnnConfig
from stepwell.heads.rpn import ProposalConfig, Rpn, RpnConfig, _best
from stepwell.structures import Extent, Objects

SMALL = {
    "dim": 8,
    "rpn": RpnConfig(
        dim=8,
        sampling=Sampling(num=24, positive=0.5),
        training=ProposalConfig(per_level=20, num=20),
        testing=ProposalConfig(per_level=20, num=20),
    ),
    "mask": MaskHeadConfig(num_convs=1, dim=8),
}
BOX = BoxHeadConfig(dim=12)
SAMPLING = Sampling(num=16)
EXTENT = Extent((60, 90), (64, 96))


def rcnn(**changes):
    return RcnnConfig(**{**SMALL, "box": BOX, "sampling": SAMPLING, **changes})


def cascade(**changes):
    stages = tuple(
        StageConfig(
            box=BoxHeadConfig(
                dim=12,
                conv_dim=8,
                num_convs=1,
                norm="batch",
                num_linears=1,
                coder=stage.box.coder,
                box_loss=stage.box.box_loss,
            ),
            assignment=stage.assignment,
            sampling=SAMPLING,
            weight=stage.weight,
        )
        for stage in CascadeConfig().stages
    )
    return CascadeConfig(**{**SMALL, "stages": stages, **changes})


def maps(strides, *, batch=1, dim=6, dtype=torch.float32):
    return [torch.randn(batch, dim, 64 // s, 96 // s, dtype=dtype) for s in strides]


def square(*boxes, masks=True):
    filled = torch.zeros(len(boxes), 64, 96, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(filled, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
    found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Objects(found, torch.arange(len(boxes)) % 3, filled if masks else None)


OBJECTS = [square((5, 5, 40, 40), (30, 20, 80, 60)), square()]
CONFIGS = {"rcnn": rcnn(), "cascade": cascade()}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("objects", [OBJECTS, [square(), square()]], ids=["some", "none"])
def test_every_parameter_has_a_finite_gradient_even_without_objects(kind, objects):
    head = CONFIGS[kind].build([6, 6], [8, 16], 3).train()
    losses = head.losses(maps([8, 16], batch=2), [EXTENT, EXTENT], objects)
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name  # noqa: PT018
    with_objects = any(len(image.boxes) for image in objects)
    assert all((loss > 0) == with_objects for name, loss in losses.items() if name.startswith("masks"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_batch_finds_what_its_images_find_alone(kind):
    torch.manual_seed(0)
    selection = Selection(above=0.0, num=20)
    config = rcnn(selection=selection) if kind == "rcnn" else cascade(selection=selection)
    head = config.build([6, 6], [8, 16], 3).eval().double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(5)
        both = maps([8, 16], batch=2, dtype=torch.float64)
        extents = [EXTENT, Extent((50, 70), (64, 80))]
        together = head.detect(both, extents)
        for i, found in enumerate(together):
            (alone,) = head.detect([x[i : i + 1] for x in both], extents[i : i + 1])
            assert len(found.boxes) > 0
            for a, b in zip(found, alone, strict=True):
                torch.testing.assert_close(a, b)
            height, width = extents[i].valid
            assert (found.boxes >= 0).all()
            assert (found.boxes <= torch.tensor([width, height, width, height])).all()
            assert (found.scores.diff() <= 0).all()
            assert found.masks.shape == (len(found.boxes), 28, 28)


def test_nothing_found_is_empty_and_no_error():
    head = rcnn(selection=Selection(above=1.0)).build([6], [16], 3).eval()
    (found,) = head.detect(maps([16]), [EXTENT])
    assert [tuple(x.shape) for x in found] == [(0, 4), (0,), (0,), (0, 28, 28)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_proposal_is_no_error(kind):
    rpn = RpnConfig(dim=8, training=ProposalConfig(smallest=1e6), testing=ProposalConfig(smallest=1e6))
    config = rcnn(rpn=rpn) if kind == "rcnn" else cascade(rpn=rpn)
    head = config.build([6, 6], [8, 16], 3).train()
    losses = head.losses(maps([8, 16]), [EXTENT], [square()])
    sum(losses.values()).backward()
    assert losses["classes" if kind == "rcnn" else "classes_0"] == 0
    (found,) = head.eval().detect(maps([8, 16]), [EXTENT])
    assert len(found.boxes) == 0


def test_faster_rcnn_has_no_masks_and_needs_none():
    head = rcnn(masks=False).build([6], [16], 3)
    assert not any("mask" in name for name, _ in head.named_parameters())
    losses = head.losses(maps([16]), [EXTENT], [square((5, 5, 40, 40), masks=False)])
    assert set(losses) == {"rpn_objectness", "rpn_boxes", "classes", "boxes"}
    assert head.detect(maps([16]), [EXTENT])[0].masks is None


def test_objects_without_masks_are_refused_where_masks_are_learnt():
    head = rcnn().build([6], [16], 3)
    with pytest.raises(ValueError, match="masks=False"):
        head.losses(maps([16]), [EXTENT], [square((5, 5, 40, 40), masks=False)])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="finest first"):
        rcnn().build([6, 6], [16, 8], 3)
    with pytest.raises(ValueError, match="a class to find"):
        rcnn().build([6], [16], 0)
    head = rcnn().build([6], [16], 3)
    with pytest.raises(ValueError, match="reads 1 maps, got 2"):
        head.detect(maps([8, 16]), [EXTENT])
    with pytest.raises(ValueError, match="extent for each of 2"):
        head.detect(maps([16], batch=2), [EXTENT])
    with pytest.raises(ValueError, match="1 boxes and 0 labels"):
        head.losses(maps([16]), [EXTENT], [Objects(torch.zeros(1, 4), torch.zeros(0))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", CONFIGS)
def test_boxes_scores_and_losses_are_in_single_precision_at_least(kind, dtype):
    head = CONFIGS[kind].build([6, 6], [8, 16], 3).to(dtype)
    wanted = torch.promote_types(dtype, torch.float32)
    losses = head.losses(maps([8, 16], batch=2), [EXTENT] * 2, OBJECTS)
    assert {loss.dtype for loss in losses.values()} == {wanted}
    sum(losses.values()).backward()
    found = head.eval().detect(maps([8, 16]), [EXTENT])[0]
    assert found.boxes.dtype == found.scores.dtype == found.masks.dtype == wanted


def test_draws_follow_torchs_seed():
    head = rcnn(sampling=Sampling(num=4)).build([6], [8], 3)
    x = maps([8])

    def losses(seed):
        torch.manual_seed(seed)
        return sum(head.losses(x, [EXTENT], OBJECTS[:1]).values()).item()

    assert losses(1) == losses(1)
    assert len({losses(seed) for seed in range(4)}) > 1


def test_published_settings_are_the_defaults():
    config, stages = RcnnConfig(), CascadeConfig().stages
    assert (config.rpn.training.per_level, config.rpn.training.num, config.rpn.border) == (2000, 1000, None)
    assert config.selection == CascadeConfig().selection == Selection(above=0.05, iou=0.5, num=100)
    assert (config.rpn.testing.per_level, config.rpn.testing.num, config.rpn.testing.iou) == (1000, 1000, 0.7)
    assert [stage.weight for stage in stages] == [1, 0.5, 0.25]
    assert [stage.assignment.positive for stage in stages] == [0.5, 0.6, 0.7]
    assert stages[0].box.num_convs == 4
    assert stages[0].box.per_class
    assert not MMDET_CASCADE.stages[0].box.per_class
    assert MMDET_CASCADE.stages[0].box.num_linears == 2


def test_whole_detectors_are_built_without_memory():
    with torch.device("meta"):
        head = RcnnConfig().build([768] * 4, [4, 8, 16, 32], 80)
    assert sum(p.numel() for p in head.parameters()) > 2e7


def test_starting_values_are_those_of_the_papers():
    head = RcnnConfig().build([32, 32], [8, 16], 5)
    assert head.rpn.objectness.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head.box.deltas.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert head.box.classes.weight.std().item() == pytest.approx(0.01, rel=0.1)
    bound = (6 / (256 * 9 * 2)) ** 0.5
    assert bound * 0.99 < head.neck.output[0].weight.abs().max().item() <= bound
    assert head.mask.convs[0].weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.05)
    assert all(p.eq(0).all() for name, p in head.named_parameters() if name.endswith("bias"))


def test_stages_of_a_cascade_get_moved_boxes_without_those_that_were_given():
    torch.manual_seed(0)
    head = cascade(masks=False).build([6], [8], 3).eval()
    proposals = [torch.tensor([[4.0, 4, 42, 42], [50, 10, 80, 40], [0, 0, 20, 20]])]
    pyramid = head.neck(maps([8]))
    losses, seen = head.learn(pyramid, proposals, [EXTENT], OBJECTS[:1])
    for samples, output in seen:
        assert len(output.boxes[0]) == 2 + 3  # two objects stand in front of three proposals, in every stage
        assert samples[0].is_given.sum() == 2
        torch.testing.assert_close(samples[0].boxes[samples[0].is_given], OBJECTS[0].boxes)
    samples, output = seen[1]
    own = head.box_heads[1].losses(
        output.logits, output.deltas, output.boxes[0], samples[0].labels, samples[0].targets
    )
    torch.testing.assert_close(losses["classes_1"], 0.5 * own["classes"])


def test_a_cascade_scores_by_the_mean_of_its_stages_logits():
    torch.manual_seed(0)
    head = cascade(masks=False, selection=Selection(above=0.0)).build([6], [8], 3).eval()
    proposals, pyramid = [torch.tensor([[4.0, 4, 42, 42]])], head.neck(maps([8]))
    outputs = head.run_stages(pyramid, proposals, [EXTENT])
    mean = sum(output.logits for output in outputs) / 3
    (found,) = head.detect_in(pyramid, proposals, [EXTENT])
    expected = mean.softmax(1)[0, :-1].sort(descending=True)
    torch.testing.assert_close(found.scores, expected.values)
    assert found.labels.tolist() == expected.indices.tolist()


def test_a_cascade_takes_boxes_of_its_last_stage_and_the_mean_of_all_masks_probabilities():
    torch.manual_seed(0)
    head = cascade(selection=Selection(above=0.0)).build([6], [8], 3).eval()
    proposals, pyramid = [torch.tensor([[4.0, 4, 42, 42]])], head.neck(maps([8]))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(4)
        last = head.run_stages(pyramid, proposals, [EXTENT])[-1]
        (found,) = head.detect_in(pyramid, proposals, [EXTENT])
        moved = head.config.stages[-1].box.coder.decode(last.boxes[0], last.deltas, EXTENT.valid)[0]
        regions = head.pool(pyramid, [found.boxes], 14)
        masks = [mask_head(regions, found.labels).sigmoid() for mask_head in head.mask_heads]
    torch.testing.assert_close(found.boxes, moved[found.labels])
    torch.testing.assert_close(found.masks, sum(masks) / 3)
    assert (masks[0] - masks[-1]).abs().max() > 0.05


def test_regions_move_by_their_own_class_and_those_of_background_by_the_best():
    head = BoxHead(1, 1, 2, BoxHeadConfig(dim=1, coder=BoxCoder()))
    boxes = torch.tensor([[10.0, 10, 20, 20]]).expand(3, -1)
    logits = torch.tensor([[1.0, 0, 9]]).expand(3, -1)
    deltas = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0]]).expand(3, -1, -1)
    moved = head.refine(logits, deltas, boxes, (64, 64), torch.tensor([0, 1, 2]))
    assert moved[:, 0].tolist() == [20, 30, 20]
    assert head.refine(logits, deltas, boxes, (64, 64))[:, 0].tolist() == [20, 20, 20]


def test_the_next_stage_learns_from_boxes_that_moved_by_the_class_they_were_given():
    torch.manual_seed(0)
    head = cascade(masks=False).build([6], [8], 3).eval()
    torch.nn.init.normal_(head.box_heads[0].deltas.bias)
    proposals = [torch.tensor([[4.0, 4, 42, 42], [50, 10, 80, 40], [0, 0, 20, 20]])]
    (((first,), output), ((second,), _), _) = head.learn(
        head.neck(maps([8])), proposals, [EXTENT], OBJECTS[:1]
    )[1]
    wanted = head.box_heads[0].refine(*next(iter(output.images())), EXTENT.valid, first.labels)
    positive = int((~first.is_given[: len(first.sample.positive)]).nonzero()[0, 0])
    assert (second.boxes == wanted[positive]).all(1).any()
    assert (
        not (second.boxes == head.box_heads[0].refine(*next(iter(output.images())), EXTENT.valid)[positive])
        .all(1)
        .any()
    )


def test_a_score_on_the_threshold_finds_nothing():
    head, boxes = BoxHead(1, 1, 1, BoxHeadConfig(dim=1)), torch.tensor([[0.0, 0, 9, 9]])
    for above, count in ((0.5, 0), (0.499, 1)):
        found = head.select(torch.zeros(1, 2), torch.zeros(1, 1, 4), boxes, (64, 64), Selection(above=above))
        assert len(found.boxes) == count


def test_a_mask_has_the_cells_of_which_it_fills_half_and_what_lies_outside_is_cut():
    masks = torch.zeros(2, 4, 4)
    masks[0, :, 0], masks[1] = 1, 1
    half = mask_targets(masks, torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([0]), 1)
    assert half.tolist() == [[[1]]]
    cut = mask_targets(masks, torch.tensor([[-8.0, 0, 4, 4]]), torch.tensor([1]), 2)
    assert cut.tolist() == [[[1, 1], [1, 1]]]


def test_equal_scores_stand_as_torch_sorts_them():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.rand(60, generator=generator)
        order = scores.argsort(descending=True)
        at_the_end = scores.index_put((order[10:14],), scores[order[9]])
        for tied in (at_the_end, (scores * 6).round(), torch.ones(60)):
            assert _best(tied, 10).tolist() == tied.sort(descending=True).indices[:10].tolist()


@pytest.mark.parametrize(("levels", "count"), [(2, 2), (1, 1)])
def test_boxes_of_two_maps_are_proposed_although_they_overlap(levels, count):
    """The same box from anchors of 64 and 128 pixels, or twice from 64."""
    anchors = AnchorConfig(ratios=(1.0,) * (3 - levels))
    rpn = Rpn(8, [8, 16][:levels], RpnConfig(dim=8, anchors=anchors))
    logits = [torch.zeros(1, 3 - levels, 1, 1)] * levels
    deltas = [torch.zeros(1, 4 * (3 - levels), 1, 1) for _ in range(levels)]
    if levels == 2:
        deltas[1][:, 2:] = math.log(0.5)
    (found,) = rpn.propose(logits, deltas, [EXTENT], ProposalConfig())
    assert len(found.boxes) == count
    torch.testing.assert_close(found.boxes, torch.tensor([[0.0, 0, 32, 32]] * count))


def test_an_image_without_objects_counts_one_more_anchor_than_it_has():
    head = rcnn().build([6], [16], 3)
    torch.nn.init.zeros_(head.rpn.objectness.weight)
    losses = head.losses(maps([16]), [EXTENT], [square()])
    assert losses["rpn_objectness"].item() == pytest.approx(math.log(2) * 24 / 25)


def test_losses_have_their_weights():
    changes = {
        "rpn": replace(SMALL["rpn"], objectness_weight=2.0, box_loss=BoxLoss(weight=3.0)),
        "box": replace(BOX, class_weight=4.0, box_loss=BoxLoss(weight=5.0)),
        "mask": replace(SMALL["mask"], weight=6.0),
    }
    x, found = maps([8]), []
    for config in (rcnn(), rcnn(**changes)):
        torch.manual_seed(0)
        found.append(config.build([6], [8], 3).losses(x, [EXTENT], OBJECTS[:1]))
    weights = {"rpn_objectness": 2, "rpn_boxes": 3, "classes": 4, "boxes": 5, "masks": 6}
    for name, weight in weights.items():
        assert found[0][name] > 0
        torch.testing.assert_close(found[1][name], weight * found[0][name])
