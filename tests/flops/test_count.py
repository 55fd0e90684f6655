"""Built networks, counted: against the closed form, torch's own counter, and sums done by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from stepwell.flops.cost import CONVENTIONS
from stepwell.flops.pyramid import PyramidCost
from stepwell.models.settings import (
    BranchConfig,
    ClassifierSettings,
    DenseSettings,
    InteractionConfig,
    PiipConfig,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stepwell.flops.count import BACKBONE, count, count_macs, count_operations, count_params, part_of
from stepwell.models.vision import build_classifier, build_features, build_pyramid_encoder
from stepwell.views.pyramid import image_pyramid


def _branch(encoder, size, **arguments):
    return BranchConfig(encoder=encoder, size=size, interactions=((0, 1), (2, 3)), arguments=arguments)


VITS = (
    _branch("vit_nano", 64, windows=3),
    _branch("vit_t", 96, depth=4, layer_scale=1.0, windows=[2, 2, 2, 0], window_padding="qkv"),
    _branch("vit_s", 160, depth=4, norm="rmsnorm", qk_norm=True, windows=4),
)
MIXED = (
    BranchConfig(encoder="convnext_nano", size=64, interactions=((0, 0), (1, 7))),
    BranchConfig(encoder="vit_nano", size=96, interactions=((0, 1), (2, 3))),
    BranchConfig(encoder="convnext_t", size=128, interactions=((0, 4), (5, 20))),
)
CLASS_TOKENS = tuple(_branch(e, s, depth=4, class_token=True) for e, s in (("vit_s", 32), ("vit_t", 80)))


def _image(branches):
    return torch.empty(1, 3, branches[-1].size, branches[-1].size, device="meta")


def _features():
    with torch.device("meta"):
        return build_features(DenseSettings(branches=VITS))


def _counted(model, run, convention):
    macs = count_macs(model, run, convention)
    return {
        part: (macs[part], params) for part, params in count_params(model).items() if BACKBONE.fullmatch(part)
    }


def _in_closed_form(cost, branches):
    parts = cost.parts([(branch.size, branch.size) for branch in branches])
    return {name: (part.macs, part.params) for name, part in parts.items() if part.params}


@pytest.mark.parametrize(
    "interaction",
    [
        InteractionConfig(),
        InteractionConfig(project=False, norm=False, directions="all_pairs"),
        InteractionConfig(attention="regular", ffn_ratio=None, directions="cycle_up"),
        InteractionConfig(num_heads=8, num_points=2, ratio=1.0, directions="alternating"),
    ],
    ids=["released", "fast", "regular", "other"],
)
@pytest.mark.parametrize("branches", [VITS, MIXED], ids=["vits", "mixed"])
def test_a_tower_costs_what_the_closed_form_says(branches, interaction):
    convention = CONVENTIONS["L"]
    with torch.device("meta"):
        encoder = build_pyramid_encoder(PiipConfig(branches=branches, interaction=interaction))
    views = image_pyramid(_image(branches), [branch.size / branches[-1].size for branch in branches])
    counted = _counted(encoder, partial(encoder, views), convention)
    assert counted == _in_closed_form(PyramidCost(branches, interaction, convention), branches)


@pytest.mark.parametrize("branches", [VITS, CLASS_TOKENS, VITS[-1:]], ids=["three", "class tokens", "one"])
@pytest.mark.parametrize("head", ["merge", "first_patch"])
def test_a_classifier_costs_what_the_closed_form_says(branches, head):
    convention = CONVENTIONS["A"]
    with torch.device("meta"):
        model = build_classifier(ClassifierSettings(branches=branches, head=head), num_classes=10)
    counted = _counted(model, partial(model, _image(branches)), convention)
    merge = "linear" if head == "merge" else "none"
    cost = PyramidCost(branches, InteractionConfig(), convention, merge=merge, num_classes=10)
    assert counted == _in_closed_form(cost, branches)


def test_a_detection_backbone_costs_what_the_closed_form_says_and_its_pyramid_is_not_counted():
    convention = CONVENTIONS["D"]
    model = _features()
    counted = _counted(model, partial(model, _image(VITS)), convention)
    assert counted == _in_closed_form(PyramidCost(VITS, InteractionConfig(), convention, merge="dense"), VITS)
    assert count_params(model)["neck"] > 0


def test_sampling_is_charged_on_the_first_interactions_grid_under_convention_l_only():
    costs = {
        name: PyramidCost(MIXED, InteractionConfig(), CONVENTIONS[name]).parts(
            [(64,) * 2, (96,) * 2, (128,) * 2]
        )
        for name in "DL"
    }
    assert costs["L"]["interactions"].macs > costs["D"]["interactions"].macs
    assert costs["L"]["branches.2"] == costs["D"]["branches.2"]


def test_matrix_products_agree_with_torchs_counter_and_the_rest_adds_little():
    model = _features()
    run = partial(model, _image(VITS))
    with torch.no_grad(), FlopCounterMode(display=False) as torchs:
        run()
    total = count_operations(model, run).total()
    assert torchs.get_total_flops() < total < 1.1 * torchs.get_total_flops()


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(5, 7), (3, 5), 2 * 3 * 5 * 7 + 3 * 7),
        (nn.Linear(5, 7, bias=False), (3, 5), 2 * 3 * 5 * 7),
        (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5), 2 * 9 * 6 * 2 * 9 + 6 * 9),
        (nn.LayerNorm(8), (3, 8), 7 * 24),
        (nn.GELU(), (3, 8), 5 * 24),
        (nn.Softmax(-1), (3, 8), 5 * 24),
        (nn.ReLU(), (3, 8), 24),
        (nn.Flatten(), (3, 8), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_operations_of_one_layer_by_hand(module, shape, expected):
    module = module.to("meta")
    assert count_operations(module, partial(module, torch.empty(shape, device="meta"))).total() == expected


def test_deformable_sampling_is_two_operations_an_element_read():
    from stepwell.flops.count import operations

    rows, index = torch.empty(20, 6, device="meta"), torch.empty(4, 16, dtype=torch.long, device="meta")
    op = torch.ops.aten._embedding_bag_forward_only.default
    assert operations(op, (rows, index), {}, (torch.empty(4, 6, device="meta"),)) == 2 * 4 * 16 * 6


def test_parts_cover_the_whole_model():
    model = _features()
    parts = count(model, partial(model, _image(VITS)), CONVENTIONS["D"])
    names = ["branches.0", "branches.1", "branches.2", "interactions", "merges", "neck", "other"]
    assert [part.name for part in parts] == names
    assert sum(part.params for part in parts) == sum(p.numel() for p in model.parameters())
    assert [part.name for part in parts if part.macs is None] == ["neck", "other"]


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("model.vision.encoder.branches.1.blocks.0.mlp.fc1", "branches.1"),
        ("encoder.interactions.3.units.0", "interactions"),
        ("head.merge.stacks.0", "merges"),
        ("head.classifier", "head"),
        ("model.language_model.layers.0", "language_model"),
        ("encoder", "other"),
        ("", "other"),
    ],
)
def test_a_module_belongs_to_the_part_its_path_names(path, part):
    assert part_of(path) == part
