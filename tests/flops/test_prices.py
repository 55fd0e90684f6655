"""The planner's table, held equal to what counting built networks gives."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from write_prices import STACKS, count_prices

from stepwell.encoders.catalogue import ENCODERS, build_encoder, encoder_spec
from stepwell.encoders.vit import VisionTransformer
from stepwell.flops.count import count_macs, count_params, paper_macs
from stepwell.flops.outlines import outlines
from stepwell.flops.prices import branch_macs, branch_prices, parameters, prices
from stepwell.flops.report import build_outlined
from stepwell.fuse.interaction import InteractionConfig, Message
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.pyramid import BranchConfig, build_pyramid
from stepwell.models.runs import STAGE_MERGES, layer_runs

TABLE = prices()
WIDTHS = [int(dim) for dim in TABLE["widths"]]


def _meta(*shape):
    return torch.empty(*shape, device="meta")


def _price(branches, sizes, convention):
    return sum(map(branch_macs, branches, branch_prices(branches, convention), sizes))


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_costs_at_an_odd_size_what_its_prices_say(name):
    entry = ENCODERS[name]
    has_tokens = entry.arguments.get("class_token")  # for which windows have no place
    is_plain = entry.build is VisionTransformer and not has_tokens and entry.family != "beitv2"
    arguments = {"windows": 3} if is_plain else {}  # changes no parameters but those of relative positions
    with outlines():
        encoder = build_encoder(name, **arguments).eval()
    assert encoder_spec(name, arguments) == encoder.spec
    size = (4 * encoder.spec.stride + 3, 5 * encoder.spec.stride + encoder.spec.strides[0] + 1)
    counted = count_macs(encoder, partial(encoder, _meta(1, 3, *size)), "D").total()
    assert _price([BranchConfig(encoder=name, size=1, arguments=arguments)], [size], "L") == counted
    assert parameters(name) == count_params(encoder).total()


def test_padding_after_the_qkv_layer_adds_no_cells_to_it():
    arguments = {"windows": 4, "window_padding": "qkv"}
    with outlines():
        encoder = build_encoder("vit_nano", **arguments)
    counted = count_macs(encoder, partial(encoder, _meta(1, 3, 80, 112)), "D").total()
    assert (
        _price([BranchConfig(encoder="vit_nano", size=1, arguments=arguments)], [(80, 112)], "L") == counted
    )


def _branches(*encoders, interactions, **arguments):
    return tuple(
        BranchConfig(
            encoder=name,
            size=size,
            interactions=layer_runs(encoder_spec(name).depth, interactions),
            arguments=arguments if ENCODERS[name].family in ("vit", "deit") else {},
        )
        for name, size in encoders
    )


def _views(branches):
    """As made from an image of an odd shape whose width is the last branch's size."""
    width = branches[-1].size
    image = (width * 5 // 7, width)
    return [
        (int(image[0] * (branch.size / width)), int(image[1] * (branch.size / width))) for branch in branches
    ]


@pytest.mark.parametrize("windows", [0, 3])
@pytest.mark.parametrize("encoders", [[("vit_s", 80), ("deit_t", 120), ("vit_nano", 200)], [("vit_s", 150)]])
def test_a_planned_classifier_costs_what_the_built_one_does(encoders, windows):
    branches = _branches(*encoders, interactions=4, windows=windows, window_padding="qkv")
    views = _views(branches)
    model, run = build_outlined(ClassifierSettings(branches=branches, head="merge"), views[-1])
    assert _price(branches, views, "A") == sum(paper_macs(model, run, "A").values())


@pytest.mark.parametrize(
    ("encoders", "interactions"),
    [
        ([("vit_s", 80), ("convnext_t", 210), ("vit_t", 300)], 12),
        ([("convnext_s", 160), ("convnext_t", 300)], 12),
        ([("convnext_t", 160)], 12),
        ([("vit_s", 80), ("convnext_t", 210)], 3),
        ([("vit_s", 80), ("convnext_nano", 210)], 1),
    ],
)
def test_a_planned_detector_costs_what_the_built_one_does(encoders, interactions):
    branches = _branches(*encoders, interactions=interactions, windows=2)
    by_stage = interactions == 12
    settings = DenseSettings(
        branches=branches,
        merge="stages" if by_stage else "dense",
        merge_after=STAGE_MERGES if by_stage else (),
        operations=(),
    )
    views = _views(branches)
    model, run = build_outlined(settings, views[-1])
    assert _price(branches, views, "D") == sum(paper_macs(model, run, "D").values())


@pytest.mark.parametrize("smallest", ["convnext_t", "clip_b"])
def test_planned_branches_of_an_assistant_cost_what_built_ones_do(smallest):
    branches = _branches(("clip_b", 100), (smallest, 170), interactions=3)
    views = _views(branches)
    with outlines():
        encoder = build_pyramid(branches, InteractionConfig())
    run = partial(encoder, [_meta(1, 3, *view) for view in views])
    assert _price(branches, views, "L") == sum(paper_macs(encoder, run, "L").values())


def test_messages_between_all_widths_cost_what_the_table_says():
    branches = tuple(
        BranchConfig(
            encoder="vit_t",
            size=16,
            interactions=((0, 0),),
            arguments={"dim": dim, "depth": 1, "num_heads": 1},
        )
        for dim in WIDTHS
    )
    interaction = InteractionConfig(directions="all_pairs")
    with outlines():
        encoder = build_pyramid(branches, interaction)
    grids = [(1 + j % 3, 2 + j % 4) for j in range(len(WIDTHS))]
    cells = [rows * cols for rows, cols in grids]
    views = [_meta(1, 3, 16 * rows, 16 * cols) for rows, cols in grids]
    macs = count_macs(encoder, partial(encoder, views), "D")
    messages = {
        (m.source, m.target): sum(
            charge for part, charge in macs.items() if f"{part}.".startswith(f"{path}.")
        )
        for path, m in encoder.named_modules()
        if isinstance(m, Message)
    }
    assert len(messages) == len(WIDTHS) * (len(WIDTHS) - 1)
    for (source, target), counted in messages.items():
        price = TABLE["widths"][str(WIDTHS[target])]
        key = price["key"][str(WIDTHS[source])]
        assert (price["query"] + price["sampling"]) * cells[target] + key * cells[source] == counted


@pytest.mark.parametrize("kind", STACKS)
def test_merges_of_all_widths_cost_what_the_table_says(kind):
    for out in WIDTHS:
        with outlines():
            stacks = dict(zip(["first", *WIDTHS], STACKS[kind]([out, *WIDTHS]), strict=True))
        for dim, stack in stacks.items():
            counted = count_macs(stack, partial(stack, _meta(1, out if dim == "first" else dim, 3, 5)), "D")
            assert TABLE["widths"][str(out)][kind][str(dim)] * 15 == counted.total()


def test_the_table_is_what_counting_writes():
    names, widths = ["vit_nano", "clip_b", "beitv2_b", "convnext_nano"], [64, 192]
    counted = json.loads(json.dumps(count_prices(names, widths)))
    assert counted["encoders"] == {name: TABLE["encoders"][name] for name in names}
    for dim, by_name in counted["widths"].items():
        for name, price in by_name.items():
            written = TABLE["widths"][dim][name]
            assert price == ({key: written[key] for key in price} if isinstance(price, dict) else written)


def test_widths_that_cannot_meet_are_refused():
    branches = _branches(("vit_s", 64), ("convnext_nano", 128), interactions=4)
    with pytest.raises(ValueError, match="width 384 and 48 cannot interact"):
        branch_prices(branches, "D")
    with pytest.raises(ValueError, match="48"), torch.device("meta"):
        build_pyramid(branches, InteractionConfig())
