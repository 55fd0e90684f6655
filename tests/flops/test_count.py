"""Built networks, counted: against torchvision's figures, torch's own counter, and sums done by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from stepwell.encoders.catalogue import build_encoder
from stepwell.flops.count import count, count_macs, count_operations, count_params, paper_macs, part_of
from stepwell.flops.outlines import outlines
from stepwell.fuse.interaction import InteractionConfig, Message
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.pyramid import BranchConfig, build_pyramid
from stepwell.ops.adaptive_conv import adaptive_conv
from stepwell.ops.choose import prefer
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


def _image(branches):
    return torch.empty(1, 3, branches[-1].size, branches[-1].size, device="meta")


def _features():
    with outlines():
        return DenseSettings(branches=VITS).build()


def _count(encoder, size=(224, 224)):
    image = torch.empty(1, 3, *size, device="meta")
    return count_macs(encoder, partial(encoder, image), "D").total()


@pytest.mark.parametrize(
    ("name", "dim", "weights"),
    [
        ("vit_b", 768, models.ViT_B_16_Weights.IMAGENET1K_V1),
        ("vit_l", 1024, models.ViT_L_16_Weights.IMAGENET1K_V1),
    ],
)
def test_a_vit_with_its_head_costs_what_torchvision_publishes(name, dim, weights):
    with outlines():
        encoder = build_encoder(name, class_token=True, class_slot=True, final_norm=True)
    assert (_count(encoder) + 1000 * dim) / 1e9 == pytest.approx(weights.meta["_ops"], abs=5e-4)
    assert count_params(encoder).total() + 1000 * (dim + 1) == weights.meta["num_params"]


@pytest.mark.parametrize(
    ("name", "dim", "weights"),
    [
        ("convnext_t", 768, models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
        ("convnext_s", 768, models.ConvNeXt_Small_Weights.IMAGENET1K_V1),
        ("convnext_b", 1024, models.ConvNeXt_Base_Weights.IMAGENET1K_V1),
        ("convnext_l", 1536, models.ConvNeXt_Large_Weights.IMAGENET1K_V1),
    ],
)
def test_a_convnext_costs_what_torchvision_publishes(name, dim, weights):
    with outlines():
        encoder = build_encoder(name)
    macs = _count(encoder) + 1000 * dim
    assert macs / 1e9 == pytest.approx(weights.meta["_ops"], rel=6e-4)  # they leave conv biases out
    assert count_params(encoder).total() + 2 * dim + 1000 * (dim + 1) == weights.meta["num_params"]


def _tiny(**arguments):
    with outlines():
        return build_encoder("vit_t", dim=8, depth=1, num_heads=1, **arguments)


def test_a_window_is_charged_whole_even_where_it_is_larger_than_the_grid():
    wide, narrow = (_count(_tiny(windows=w, window_padding="qkv"), (32, 48)) for w in (5, 0))
    cells = 2 * 3
    assert wide - narrow == 2 * cells * (25 - cells) * 8


def test_padded_tokens_pass_the_qkv_layer_only():
    padded, bare = (_count(_tiny(windows=2, window_padding=p), (48, 16)) for p in ("tokens", "qkv"))
    assert padded - bare == (8 - 3) * 8 * 24  # a 3x1 grid becomes 4x2


def test_an_rms_norm_costs_what_a_row_says_and_those_of_queries_and_keys_nothing():
    encoder = _tiny(norm="rmsnorm", qk_norm=True)
    run = partial(encoder, torch.empty(1, 3, 32, 48, device="meta"))
    bare, charged = (count_macs(encoder, run, "A", rms_norm=n).total() for n in (0, 2))
    assert charged - bare == 2 * 2 * 6 * 8  # norm1 and norm2


def _message(**interaction):
    """Macs and parameters of 2x3 cells of width 8 that read 4x5 cells of width 12."""
    branches = tuple(_branch("vit_t", 16, dim=dim, depth=4, num_heads=1) for dim in (8, 12))
    with outlines():
        config = InteractionConfig(**interaction)
        encoder = build_pyramid(branches, config)
    views = [torch.empty(1, 3, 16 * rows, 16 * cols, device="meta") for rows, cols in ((2, 3), (4, 5))]
    macs = count_macs(encoder, partial(encoder, views), "D")
    path, message = next(
        (p, m) for p, m in encoder.named_modules() if isinstance(m, Message) and m.target == 0
    )
    return sum(charge for name, charge in macs.items() if name.startswith(path)), count_params(
        message
    ).total()


def test_a_deformable_message_by_hand():
    macs, params = _message(num_heads=2, num_points=3)
    projection, value, offsets_and_weights, out = 20 * 12 * 8, 20 * 8 * 4, 6 * 8 * 18, 6 * 4 * 8
    norms, sampling = 2 * (6 + 20 + 6) * 8, 5 * 6 * 3 * 8
    ffn = 6 * 8 * 2 * 2 + 6 * (9 * 2 + 2)
    assert macs == projection + value + offsets_and_weights + out + norms + sampling + ffn
    linears = (12 * 8 + 8) + (8 * 4 + 4) + (8 * 18 + 18) + (4 * 8 + 8) + (8 * 2 + 2) + (2 * 8 + 8)
    assert params == linears + (9 * 2 + 2) + 3 * 16 + 2 * 8


def test_a_regular_message_by_hand():
    macs, _ = _message(attention="regular", num_heads=2, norm=False, ffn_ratio=None)
    assert macs == 20 * 12 * 8 + 6 * 8 * 8 + 2 * 20 * 8 * 8 + 6 * 8 * 8 + 2 * 6 * 20 * 8


def test_without_projection_the_value_layer_bridges_the_widths():
    slow, fast = (
        _message(num_heads=2, project=project, norm=False, ffn_ratio=None)[0] for project in (True, False)
    )
    assert slow - fast == 20 * 12 * 8 + 20 * 8 * 4 - 20 * 12 * 4


def test_sampling_is_charged_on_the_first_interactions_grid_under_convention_l_only():
    with outlines():
        encoder = build_pyramid(MIXED, InteractionConfig())
        views = image_pyramid(_image(MIXED), [branch.size / 128 for branch in MIXED])
    first, own = (paper_macs(encoder, partial(encoder, views), convention) for convention in ("L", "D"))
    extra = 5 * 4 * (16 * 16 - 4 * 4) * (96 + 768)  # both ConvNeXts have 16x16 cells, then 4x4
    assert first == {**own, "interactions": own["interactions"] + extra}


def test_heads_and_merges_by_hand():
    """A norm and a linear layer a branch; or GroupNorms and a linear layer to the width of branch 1."""
    macs = {}
    for head in ("cls", "first_patch", "merge"):
        branches = tuple(_branch(e, s, depth=4, class_token=True) for e, s in (("vit_s", 32), ("vit_t", 80)))
        with outlines():
            model = ClassifierSettings(branches=branches, head=head).build(num_classes=10)
        macs[head] = paper_macs(model, partial(model, _image(branches)), "A")
    for head in ("cls", "first_patch"):
        assert macs[head]["head"] == (384 + 192) * (2 + 10)
    assert macs["merge"]["merges"] == 2 * 2 * 2 * 384 + 5 * 5 * (2 * 192 + 192 * 384 + 2 * 384)
    assert macs["merge"]["head"] == 5 * 5 * 2 * 384 + 384 * 10


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


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_an_adaptive_convolution_is_two_operations_a_neighbour_on_either_path(path):
    """As it is defined: without the zeros that its fast twin multiplies."""

    class Pooled(nn.Module):
        def forward(self, image, x, kernels):
            return adaptive_conv(x, kernels), F.adaptive_avg_pool2d(image, (4, 5))

    tensors = [torch.empty(shape, device="meta") for shape in [(1, 3, 14, 21), (1, 8, 10, 11), (1, 49, 4, 5)]]
    with prefer(path):
        cost = count_operations(Pooled(), partial(Pooled(), *tensors)).total()
    assert cost == 2 * 49 * 8 * 4 * 5 + 3 * 14 * 21


def test_parts_cover_the_whole_model():
    model = _features()
    parts = count(model, partial(model, _image(VITS)), "D")
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
