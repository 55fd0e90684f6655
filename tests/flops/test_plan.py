"""The planner: against the paper's own choices, brute force, and what a user may get wrong."""

from __future__ import annotations

import itertools
import json

import pytest
import yaml

from stepwell.encoders.catalogue import encoder_spec
from stepwell.flops.plan import parse_branches, plan, plans_as_json, plans_as_table, plans_as_yaml
from stepwell.flops.prices import branch_prices, quantities
from stepwell.flops.text import aligned
from stepwell.models.piip import PiipConfig
from stepwell.models.pyramid import BranchConfig
from stepwell.train.chat import ChatModel


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
    assert found.gflops == pytest.approx(243.13, abs=0.01)
    assert found.tokens == 70 * 70


def _unbeaten(branches, budget, sizes):
    """By definition: every tuple is priced, every pair compared."""
    runs = tuple((i, i) for i in range(12))
    configs = [
        BranchConfig(encoder=name, size=1, interactions=runs, arguments={"windows": 14})
        for name in parse_branches(branches)
    ]
    costs = []
    for config, prices in zip(configs, branch_prices(configs, "A"), strict=True):
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
    found = {p.sizes for p in plan("deit:B,S,T", 60, slack=0)}
    assert found == _unbeaten("deit:B,S,T", 60, range(112, 1400, 112))


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
    assert plan("deit:B,S,T", 243, aspect=aspect)


def test_sizes_divide_by_the_stride_of_their_own_branch_only():
    """Table XI of the paper has ConvNeXt-B at 1024 beside CLIP-L at 336, which 32 does not divide."""
    (found,) = [p for p in plan("CLIP:L + ConvNeXt_CLIP:B", 600, windows=0) if p.sizes[0] == 336]
    assert found.sizes[1] >= 1024
    assert all(p.sizes[1] % 32 == 0 and p.sizes[0] % 112 == 0 for p in plan("clip:L+convnext_clip:B", 600))
    assert "framing: pad" in plans_as_yaml([found])


@pytest.mark.parametrize(
    ("branches", "options", "resolution", "windows", "printed"),
    [
        ("convnext:B,S,T", {"step": 32, "smallest": 448}, "1024/672/448", (0, 0, 0), 326),  # Table II
        ("clip_l_336 + clip:B", {"step": 64, "smallest": 448}, "512/448", (0, 0), 422),  # Table XI
        ("deit:L,B,S", {"step": 224, "smallest": 448}, "1120/672/448", (28, 28, 28), 727),  # Table I
        ("internvit:6B", {"step": 512}, "512", (0,), 6364),  # README
    ],
)
def test_every_kind_of_pyramid_is_priced_as_its_own_table_prints_it(
    branches, options, resolution, windows, printed
):
    (found,) = [p for p in plan(branches, printed, **options) if p.resolution == resolution]
    assert found.windows == windows
    assert found.gflops == pytest.approx(printed, rel=0.003)


def test_slack_widens_the_budget():
    assert "1120/896/448" not in [p.resolution for p in plan("deit:B,S,T", 243, slack=0)]


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
        ({"branches": "resnet:B"}, "unknown family 'resnet'; choose from augreg"),
        ({"branches": "clip:S"}, "clip has no size 'S'; the catalogue has clip_b"),
        ({"branches": "deit_b"} | {"branches": "deit_xl"}, "unknown encoder 'deit_xl'"),
        ({"branches": "deit:T,S"}, "largest network first"),
        ({"branches": "deit:B,B"}, "largest network first"),
        ({"step": 100}, "n x 16, not 100"),
        ({"branches": "convnext:B,S", "step": 112}, "n x 32, not 112"),
        ({"step": 0}, "n x 16, not 0"),
        ({"aspect": "1:100", "budget_gflops": 20}, "no sizes in steps of 112 within 20 GFLOPs"),
        ({"branches": "deit:B,S,T,"}, "lacks a size"),
        ({"branches": "convnext:B,S,T", "interactions": 5}, "do not fall into 5 runs; 0, 1, 2, 3, 4, 6, 12"),
        ({"budget_gflops": float("inf")}, "budget above 0"),
        ({"slack": float("nan")}, "slack of 0 or more"),
        ({"slack": float("inf")}, "slack of 0 or more"),
        ({"smallest": 0}, "1 pixel or more"),
        ({"budget_gflops": 0}, "budget above 0"),
        ({"budget_gflops": float("nan")}, "budget above 0"),
        ({"budget_gflops": 5}, "nothing fits 5 GFLOPs: the smallest pyramid, 336/224/112, takes 16.4"),
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


def test_yaml_fits_into_a_recipe():
    plans = plan("deit:B,S,T", 60)
    documents = list(yaml.safe_load_all(plans_as_yaml(plans)))
    assert len(documents) == len(plans)
    for document, p in zip(documents, plans, strict=True):
        vision = ChatModel(**document, text={"model_type": "llama"}).vision
        assert isinstance(vision, PiipConfig)
        assert tuple(branch.size for branch in vision.branches) == p.sizes
        assert vision.framing == "aspect"
        assert vision.branches[0] == BranchConfig(
            encoder="deit_b",
            size=p.sizes[0],
            interactions=tuple((i, i) for i in range(12)),
            arguments={"windows": 14},
        )


def test_json_and_table_say_the_same():
    plans = plan("deit:B,S,T", 60)
    entries = json.loads(plans_as_json(plans))
    assert [tuple(entry["sizes"]) for entry in entries] == [p.sizes for p in plans]
    assert entries[0]["encoders"] == ["deit_b", "deit_s", "deit_t"]
    lines = plans_as_table(plans).splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [[e["resolution"], f"{e['gflops']:.1f}"] for e in entries]


def test_columns_of_numbers_are_set_to_the_right():
    assert (
        aligned(["name", "n"], [["a", "10"], ["bcdef", "-"]]) == "name    n\n-----  --\na      10\nbcdef   -"
    )
