"""A class for every pixel, from any number of maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from stepwell.heads.upernet import ConvNormRelu, UperNetConfig

SMALL = UperNetConfig(channels=6, auxiliary_channels=5, auxiliary_map=1)
GRIDS = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


def maps_of(count, dim=4, batch=2, dtype=torch.float32):
    return [torch.randn(batch, dim + i, *grid, dtype=dtype) for i, grid in enumerate(GRIDS[:count])]


def build(count, config=SMALL, num_classes=3, strides=(4, 8, 16, 32, 64)):
    torch.manual_seed(0)
    return config.build([4 + i for i in range(count)], strides[:count], num_classes)


@pytest.mark.parametrize("count", [2, 4, 5])
def test_any_number_of_maps_gives_logits_on_the_finest_grid(count):
    logits = build(count).eval()(maps_of(count))
    assert logits.shape == (2, 3, 16, 24)


def test_one_map_needs_no_finer_one():
    config = UperNetConfig(channels=6, auxiliary_map=None)
    assert build(1, config).eval()(maps_of(1)).shape == (2, 3, 16, 24)


def test_every_map_matters():
    head, maps = build(4).eval(), maps_of(4)
    before = head(maps)
    for i in range(4):
        changed = [x + 1 if i == j else x for j, x in enumerate(maps)]
        assert not torch.allclose(head(changed), before)


def test_strides_that_are_no_powers_of_two_are_resized_to_the_finest():
    grids = [(15, 22), (7, 9), (3, 5)]
    maps = [torch.randn(1, 4 + i, *grid) for i, grid in enumerate(grids)]
    assert build(3, strides=(16 / 3.5, 11.4, 32)).eval()(maps).shape == (1, 3, 15, 22)


def test_the_auxiliary_head_takes_no_part_in_inference():
    head, maps = build(3).eval(), maps_of(3)
    before = head(maps)
    nn.init.constant_(head.auxiliary.classifier.weight, 9)
    assert torch.equal(head(maps), before)


def test_the_auxiliary_head_reads_the_map_that_is_named():
    maps, labels = maps_of(3), torch.randint(0, 3, (2, 32, 48))
    for place in range(3):
        head = build(3, UperNetConfig(channels=6, auxiliary_channels=5, auxiliary_map=place)).eval()
        before = head.losses(maps, labels)["auxiliary"]
        for i in range(3):
            changed = [x + 1 if i == j else x for j, x in enumerate(maps)]
            assert torch.equal(head.losses(changed, labels)["auxiliary"], before) == (i != place)


def test_losses_are_means_over_all_pixels_with_their_weights():
    head, maps = build(3).eval(), maps_of(3)
    labels = torch.randint(0, 3, (2, 32, 48))
    labels[0, :16] = 255
    losses = head.losses(maps, labels)
    both = {"segmentation": (1, head(maps)), "auxiliary": (0.4, head.auxiliary(maps[1]))}
    assert losses.keys() == both.keys()
    for name, (weight, logits) in both.items():
        at_labels = F.interpolate(logits, (32, 48), mode="bilinear")
        kept = F.cross_entropy(at_labels, labels, ignore_index=255)
        torch.testing.assert_close(losses[name], weight * kept * 3 / 4)  # a quarter is ignored


def test_losses_may_be_means_over_the_pixels_that_are_kept():
    config = UperNetConfig(channels=6, auxiliary_map=None, ignored_label=7, loss_mean="kept_pixels")
    head, maps = build(3, config).eval(), maps_of(3)
    labels = torch.randint(0, 3, (2, 16, 24))
    labels[0, :9] = 7
    losses = head.losses(maps, labels)
    torch.testing.assert_close(losses["segmentation"], F.cross_entropy(head(maps), labels, ignore_index=7))
    assert list(losses) == ["segmentation"]
    assert head.losses(maps, torch.full_like(labels, 7))["segmentation"] == 0


@pytest.mark.parametrize("shape", [(2, 1, 16, 24), (1, 16, 24), (16, 24)])
def test_labels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"labels are \(B, H, W\).* for 2 images"):
        build(2).losses(maps_of(2), torch.zeros(shape, dtype=torch.long))


def test_one_image_trains_only_where_batch_norm_has_more_than_one_value():
    head, maps, labels = build(3), maps_of(3, batch=1), torch.zeros(1, 16, 24, dtype=torch.long)
    with pytest.raises(ValueError, match="at least 2 images"):
        head.losses(maps, labels)
    assert head.eval().losses(maps, labels)["segmentation"] > 0
    wide = build(3, UperNetConfig(channels=6, auxiliary_map=None, pool_sizes=(2, 3)))
    assert wide.losses(maps, labels)["segmentation"] > 0


def test_norms_become_those_of_several_processes():
    head = nn.SyncBatchNorm.convert_sync_batchnorm(build(3))
    norms = [module.norm for module in head.modules() if isinstance(module, ConvNormRelu)]
    assert len(norms) == 11
    assert all(type(norm) is nn.SyncBatchNorm for norm in norms)


def test_dropout_takes_whole_channels_before_both_classifiers():
    config = UperNetConfig(channels=16, auxiliary_channels=16, auxiliary_map=0, dropout=0.5)
    head, seen = build(2, config), []
    for classifier in (head.classifier, head.auxiliary.classifier):
        classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    maps, labels = maps_of(2), torch.zeros(2, 16, 24, dtype=torch.long)
    head.losses(maps, labels)
    head.eval().losses(maps, labels)
    for training, whole in ((seen[0], seen[2]), (seen[1], seen[3])):
        gone = (training == 0).flatten(2).all(-1)
        assert 0 < gone.sum() < gone.numel()
        assert not (whole == 0).flatten(2).all(-1).any()


def test_starting_values():
    head = UperNetConfig(channels=64, auxiliary_channels=32).build([32] * 4, [4, 8, 16, 32], 150)
    for classifier in (head.classifier, head.auxiliary.classifier):
        assert abs(classifier.weight.std().item() - 0.01) < 1e-3
        assert classifier.bias.abs().max() == 0
    for block, area in ((head.laterals[0], 1), (head.join, 9)):
        assert abs(block.conv.weight.std().item() / (2 / (64 * area)) ** 0.5 - 1) < 0.1
        assert (block.norm.weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_run_in_the_precision_of_the_parameters_and_losses_in_single_at_least(dtype):
    head, maps = build(3).to(dtype), maps_of(3, dtype=torch.float32)
    assert head(maps).dtype == dtype
    losses = head.losses(maps, torch.zeros(2, 32, 48, dtype=torch.uint8))
    at_least = torch.float64 if dtype == torch.float64 else torch.float32
    assert {loss.dtype for loss in losses.values()} == {at_least}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_it_is_built_without_values():
    with torch.device("meta"):
        head = UperNetConfig().build([8] * 4, [4, 8, 16, 32], 150)
        logits = head.eval()([torch.empty(1, 8, 32 // 2**i, 64 // 2**i) for i in range(4)])
    assert logits.shape == (1, 150, 32, 64)


@pytest.mark.parametrize(
    ("dims", "strides", "message"),
    [
        ([4, 4], [4], "a width and a stride a map"),
        ([], [], "a width and a stride a map"),
        ([4, 4, 4], [4, 16, 8], "from the finest to the coarsest"),
        ([4, 4], [4, 8], "auxiliary_map 2 of 2 maps"),
    ],
)
def test_maps_that_do_not_fit_are_refused(dims, strides, message):
    with pytest.raises(ValueError, match=message):
        UperNetConfig(channels=2).build(dims, strides, 3)


@pytest.mark.parametrize("wrong", [{"chanels": 3}, {"pool_sizes": (0,)}, {"dropout": 1.0}, {"kind": "fcn"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        UperNetConfig(**wrong)
