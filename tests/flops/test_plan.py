"""The planner: against the paper's own choices, brute force, and what a user may get wrong."""

from __future__ import annotations

import itertools
import json
import math
import re
from importlib import resources

import pytest

from stepwell import cli
from stepwell.encoders.catalogue import encoder_spec
from stepwell.flops.branches import parse_branches
from stepwell.flops.plan import plan, plans_as_json, plans_as_table, plans_as_yaml
from stepwell.flops.prices import branch_prices, quantities
from stepwell.flops.report import report
from stepwell.flops.text import aligned
from stepwell.models.piip import PiipConfig
from stepwell.models.pyramid import BranchConfig
from stepwell.train.recipe import load_recipe


@pytest.mark.parametrize(
    ("branches", "budget", "printed"),
    [
        ("deit:B,S,T", 243, (448, 896, 1120)),
        ("deit:B,S,T", 463, (672, 1120, 1568)),
        ("deit:L,B,S", 727, (448, 672, 1120)),
        ("deit:L,B,S,T", 1535, (448, 1120, 1568, 1792)),
    ],
)
def test_the_papers_choice_is_among_the_plans_or_beaten_by_one(branches, budget, printed):
    plans = plan(branches, budget)
    assert any(all(a >= b for a, b in zip(p.sizes, printed, strict=True)) for p in plans)
    assert all(p.gflops <= 1.01 * budget for p in plans)


def test_the_papers_choice_costs_what_the_paper_prints():
    (found,) = [p for p in plan("deit:B,S,T", 243) if p.resolution == "1120/896/448"]
    assert found.printed_gflops == pytest.approx(243.13, abs=0.01)
    assert found.tokens == 70 * 70


def _unbeaten(branches, budget, sizes):
    """By definition: every tuple is priced, every pair compared."""
    runs = tuple((i, i) for i in range(12))
    configs = [
        BranchConfig(encoder=name, size=1, interactions=runs, arguments={"windows": 14})
        for name in parse_branches(branches)
    ]
    costs = []
    for config, prices in zip(configs, branch_prices(configs, "L"), strict=True):
        spec = encoder_spec(config.encoder, config.arguments)
        amounts = {size: quantities(spec, (size, size), padded=False) for size in sizes}
        costs.append({size: sum(prices[n] * amounts[size][n] for n in prices) for size in sizes})
    fits = [
        chosen
        for chosen in itertools.combinations(sizes, len(configs))
        if sum(cost[size] for cost, size in zip(costs, chosen, strict=True)) <= budget * 1e9
    ]

    def beats(a, b):
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    return {b for b in fits if not any(beats(a, b) for a in fits)}


def test_plans_are_those_that_brute_force_finds():
    """Sides of 224 hold one of the windows."""
    found = {p.sizes for p in plan("deit:B,S,T", 150, slack=0)}
    assert found == _unbeaten("deit:B,S,T", 150, range(224, 2500, 112))
    assert len(found) > 5


def test_plans_begin_with_the_largest_image_and_are_strictly_ordered():
    plans = plan("deit:B,S,T", 100, step=64)
    reversed_sizes = [p.sizes[::-1] for p in plans]
    assert reversed_sizes == sorted(reversed_sizes, reverse=True)
    assert all(a < b for p in plans for a, b in itertools.pairwise(p.sizes))
    assert all(size % 64 == 0 for p in plans for size in p.sizes)


def test_images_of_another_aspect_have_views_of_one_shape_and_cost_less():
    plans = plan("deit:B,S,T", 243, aspect="4:3")
    for p in plans:
        assert all(width == size for (_, width), size in zip(p.views, p.sizes, strict=True))
        assert len({height / width for height, width in p.views}) == 1
        assert all(height % 16 == 0 for height, _ in p.views)
    tall = plan("deit:B,S,T", 243, aspect="3:4")
    assert [p.views for p in tall] == [tuple(view[::-1] for view in p.views) for p in plans]
    assert plans[0].sizes[-1] > plan("deit:B,S,T", 243)[0].sizes[-1]


def test_no_view_is_bent_by_more_than_a_twentieth():
    plans = plan("deit:B,S,T", 243, aspect="4:3", step=16, smallest=400)
    assert plans
    for height, width in (view for p in plans for view in p.views):
        assert height / width == pytest.approx(3 / 4, rel=0.05)
    kept = plan("deit:B,S,T", 243 * 880 / 1120, aspect="4:3")
    assert any(all(a >= b for a, b in zip(p.sizes, (448, 896, 1120), strict=True)) for p in kept)


@pytest.mark.parametrize("aspect", ["1:10", "100:1", "4:3"])
def test_long_images_are_planned_after_few_candidates(aspect, monkeypatch):
    monkeypatch.setattr("stepwell.flops.plan.MOST_CANDIDATES", 30_000)
    assert plan("deit:B,S,T", 243, aspect=aspect, windows=0)


def test_sizes_divide_by_the_stride_of_their_own_branch_only():
    """Table XI of the paper has ConvNeXt-B at 1024 beside CLIP-L at 336, which 32 does not divide."""
    (found,) = [p for p in plan("CLIP:L + ConvNeXt_CLIP:B", 600, windows=0) if p.sizes[0] == 336]
    assert found.sizes[1] >= 1024
    assert all(p.sizes[1] % 32 == 0 and p.sizes[0] % 112 == 0 for p in plan("clip:L+convnext_clip:B", 600))
    assert found.vision.framing == "pad"


@pytest.mark.parametrize(
    ("branches", "budget", "options", "resolution", "windows", "printed"),
    [
        ("convnext:B,S,T", 295, {"step": 32}, "1024/672/448", (0, 0, 0), 326),  # Table II
        ("convnext:B,S + deit:T", 210, {"step": 32}, "1024/672/448", (0, 0, 14), 231),  # Table II
        ("clip_l_336 + clip:B", 422, {"step": 64}, "512/448", (0, 0), 422),  # Table XI
        ("deit:L,B,S", 727, {"step": 224}, "1120/672/448", (28, 28, 28), 727),  # Table I
        ("augreg:L,B,S", 1740, {"step": 224}, "1568/1120/672", (28, 28, 28), 1874),  # README
        ("internvit:6B", 6364, {"step": 512}, "512", (0,), 6364),  # README
    ],
)
def test_every_kind_of_pyramid_is_priced_as_its_own_table_prints_it(
    branches, budget, options, resolution, windows, printed
):
    plans = plan(branches, budget, smallest=448, **options)
    (found,) = [p for p in plans if p.resolution == resolution]
    assert found.windows == windows
    assert printed in (math.floor(found.printed_gflops), round(found.printed_gflops))
    assert found.gflops <= found.printed_gflops


def test_slack_widens_the_budget():
    without, some = ([p.resolution for p in plan("deit:B,S,T", 241, slack=s)] for s in (0, 0.01))
    assert "1120/896/448" not in without
    assert "1120/896/448" in some


@pytest.mark.parametrize(
    "branches", ["clip:L + convnext:B", "convnext:B,S,T", "internvit:6B + mae:H", "dinov2:L,B,S"]
)
def test_every_family_can_be_planned(branches):
    assert plan(branches, 4000, step=224 if "6B" not in branches else 112)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("deit:B,S,T", ["deit_b", "deit_s", "deit_t"]),
        ("deit3: L, B,t", ["deit3_l", "deit3_b", "deit_t"]),
        ("clip:L + convnext_clip:B", ["clip_l", "convnext_b_clip"]),
        ("clip_l_336+convnext_b", ["clip_l_336", "convnext_b"]),
    ],
)
def test_branches_are_written_as_family_and_sizes(text, names):
    assert parse_branches(text) == names


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"branches": "regnet:B"}, "unknown family 'regnet'; choose from augreg"),
        ({"branches": "clip:S"}, "clip has no size 'S'; the catalogue has clip_b"),
        ({"branches": "deit_b"} | {"branches": "deit_xl"}, "unknown encoder 'deit_xl'"),
        ({"branches": "deit:T,S"}, "largest network first"),
        ({"branches": "deit:B,B"}, "largest network first"),
        ({"step": 100}, "n x 16, not 100"),
        ({"branches": "convnext:B,S", "step": 112}, "n x 32, not 112"),
        ({"step": 0}, "n x 16, not 0"),
        ({"aspect": "1:100", "budget_gflops": 20, "windows": 0}, "no sizes in steps of 112 within 20 GFLOPs"),
        ({"branches": "deit:B,S,T,"}, "lacks a size"),
        ({"branches": "convnext:B,S,T", "interactions": 5}, "do not fall into 5 runs; 0, 1, 2, 3, 4, 6, 12"),
        ({"budget_gflops": float("inf")}, "budget above 0"),
        ({"slack": float("nan")}, "slack of 0 or more"),
        ({"slack": float("inf")}, "slack of 0 or more"),
        ({"smallest": 0}, "1 pixel or more"),
        ({"budget_gflops": 0}, "budget above 0"),
        ({"budget_gflops": float("nan")}, "budget above 0"),
        ({"budget_gflops": 5, "windows": 0}, r"the smallest pyramid, 336/224/112, takes 16.7; .*step .112.$"),
        ({"budget_gflops": 5}, r"the smallest pyramid, 448/336/224, takes 43.6; .* or the windows .14."),
        ({"budget_gflops": 5, "aspect": "4:3"}, "the smallest pyramid, 560/448/336, takes"),
        ({"branches": "beitv2:L,B", "windows": 0}, "relative positions, .* take windows above 0"),
        ({"branches": ["timm:resnet18"]}, "unknown encoder 'timm:resnet18'"),
        ({"slack": -1}, "slack of 0 or more"),
        ({"aspect": "4x3"}, "such as 4:3"),
        ({"aspect": "0:3"}, "such as 4:3"),
        ({"windows": -1}, "0 .none. or positive"),
        ({"interactions": 5}, "do not fall into 5 runs; 0, 1, 2, 3, 4, 6, 12 interactions"),
        ({"branches": "clip:L,B", "windows": 14}, "class token"),
        ({"budget_gflops": 1e7, "step": 16}, "take a step above 16"),
    ],
)
def test_nonsense_is_refused_with_a_way_out(arguments, complaint, monkeypatch):
    monkeypatch.setattr("stepwell.flops.plan.MOST_CANDIDATES", 2000)
    with pytest.raises(ValueError, match=complaint):
        plan(**{"branches": "deit:B,S,T", "budget_gflops": 60, **arguments})


RECIPE = """task: chat
name: pasted
{model}
  text: {{model_type: llama, hidden_size: 64, num_hidden_layers: 1, num_attention_heads: 4}}
  tokenizer: {tokenizer}
stages:
- {{name: only, steps: 1, data: [{{kind: conversations, path: conversations.json}}]}}
"""
TOKENIZER = resources.files("stepwell") / "assets" / "reader_tiny"


def _pasted(plans, folder):
    """A recipe file for each document that is printed, as a person pastes it."""
    for number, document in enumerate(plans_as_yaml(plans).split("\n---\n")):
        path = folder / f"pasted_{number}.yaml"
        path.write_text(RECIPE.format(model=document, tokenizer=TOKENIZER))
        yield path


@pytest.mark.parametrize(
    ("branches", "budget", "options"),
    [
        ("deit:B,S,T", 100, {"aspect": "4:3"}),
        ("deit:L,B", 500, {"interactions": 4, "windows": 5, "aspect": "1:3"}),
        ("augreg:B,S", 150, {"aspect": "4:3", "interactions": 3}),
        ("beitv2:L,B", 700, {}),
        ("clip:L+convnext_clip:B", 600, {}),
        ("clip:L+convnext_clip:B", 600, {"aspect": "4:3", "interactions": 3}),
        ("clip:L+convnext_clip:B", 600, {"aspect": "25:24"}),
        ("clip_l_14_336+beitv2:B", 900, {"aspect": "16:9", "interactions": 1}),
        ("convnext:B+vit:S", 300, {"aspect": "3:2"}),
        ("dinov2_b_reg+dinov2_s_reg", 200, {}),
        ("internvit:6B+mae:H", 6000, {"interactions": 0}),
        ("siglip_so400m_384+siglip_b", 900, {"interactions": 3, "aspect": "1:2", "step": 112}),
        ("vit_s+vit_nano", 7, {"interactions": 2, "windows": 0, "step": 16}),
        ("vit_s+vit_nano", 20, {"interactions": 2, "aspect": "3:1", "step": 64}),
    ],
)
def test_every_plan_pastes_into_a_recipe_and_costs_there_what_it_says(branches, budget, options, tmp_path):
    """On an image of the aspect, its views have the planned sides, and the aspect within a twentieth."""
    plans = plan(branches, budget, **options)
    width, height = (400 * int(side) for side in options.get("aspect", "1:1").split(":"))
    pasted = list(_pasted(plans, tmp_path))
    assert len(pasted) == len(plans)
    for p, path in zip(plans, pasted, strict=True):
        vision = load_recipe(path).model.vision
        assert vision == p.vision
        layout = vision.geometry().layout((height, width))
        assert tuple(view.size for view in layout.views) == p.views
        assert tuple(max(view.size) for view in layout.views) == p.sizes
        assert all(rows / cols == pytest.approx(height / width, rel=0.05) for rows, cols in p.views)
        if vision.framing == "pad":
            assert width == height
        assert layout.num_visual == p.tokens
        assert p.gflops <= 1.01 * budget
    found = report(plans[0].vision, size=(height, width), out_dim=64)
    assert (found.gmacs, found.convention) == (plans[0].gflops, "L")


def test_a_pasted_plan_is_counted_as_its_comment_says(tmp_path, capsys):
    plans = plan("vit_s + vit_nano", 20, aspect="4:3", interactions=2)
    path = next(_pasted(plans, tmp_path))
    comment = path.read_text().splitlines()[2]
    said = re.match(r"# (\S+): ([\d.]+) GFLOPs .* by stepwell flops RECIPE (--size) (\d+x\d+)$", comment)
    assert said is not None
    resolution, gflops, *size = said.groups()
    assert resolution == plans[0].resolution
    assert cli.main(["flops", str(path), *size]) == 0
    (total,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("total")]
    assert total.split()[1] == gflops


def test_a_plan_holds_the_networks_as_they_are_printed():
    (p, *_) = plan("deit:B,S,T", 150)
    assert isinstance(p.vision, PiipConfig)
    assert p.vision.framing == "aspect"
    assert p.vision.branches[0] == BranchConfig(
        encoder="deit_b",
        size=p.sizes[0],
        interactions=tuple((i, i) for i in range(12)),
        arguments={"windows": 14, "window_padding": "qkv"},
    )


def test_json_and_table_say_the_same():
    plans = plan("deit:B,S,T", 150)
    entries = json.loads(plans_as_json(plans))
    assert [tuple(entry["sizes"]) for entry in entries] == [p.sizes for p in plans]
    assert entries[0]["encoders"] == ["deit_b", "deit_s", "deit_t"]
    lines = plans_as_table(plans).splitlines()[2:]
    for line, entry, p in zip(lines, entries, plans, strict=True):
        costs = [f"{gflops:.2f}" for gflops in (p.gflops, p.printed_gflops)]
        assert line.split()[:5] == [entry["resolution"], *costs, str(entry["tokens"]), entry["framing"]]
        assert entry["gflops"] == round(p.gflops, 3)
        assert entry["printed_gflops"] == round(p.printed_gflops, 3)


def test_columns_of_numbers_are_set_to_the_right():
    assert (
        aligned(["name", "n"], [["a", "10"], ["bcdef", "-"]]) == "name    n\n-----  --\na      10\nbcdef   -"
    )
